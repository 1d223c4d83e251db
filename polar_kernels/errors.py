"""The root of the project's errors, and the two kinds this package raises.

`model_patch.errors` adds the kinds that speak of files and models.
"""


class PolarError(Exception):
    """Anything this project refuses to do; the message says what was found and what to do."""


class ArgumentError(PolarError, ValueError):
    """A function was given a tensor or a value it cannot take."""


class QuantizationError(PolarError, ValueError):
    """A weight cannot be represented in the format (NaN, infinity, or a range fp16 norms cannot hold)."""
