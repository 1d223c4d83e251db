"""The kinds of `PolarError` that speak of models, files and folders."""

from collections.abc import Sequence

from polar_kernels.errors import PolarError

_SHOWN = 20  # problems spelled out in a message; all of them are in `.problems`


class UnsupportedModelError(PolarError):
    """A model of an architecture this package does not know, or in which there is nothing to do."""


class ConfigError(PolarError, ValueError):
    """A quantisation config with an unknown key, version or value."""


class CheckpointError(PolarError):
    """A checkpoint on disk is not what it should be. `problems` lists everything that was found, one line each."""

    def __init__(self, where: object, problems: Sequence[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        lines = self.problems[:_SHOWN]
        if len(self.problems) > _SHOWN:
            lines.append(f"... and {len(self.problems) - _SHOWN} more")
        text = f" {lines[0]}" if len(lines) == 1 else "".join(f"\n  {line}" for line in lines)
        super().__init__(f"{where}:{text}")


class OutputError(PolarError, OSError):
    """An output folder exists already, or could not be written; what was there before is untouched."""
