"""What `polar quantize` is asked for: checks of its options, and what their texts mean."""

from enum import StrEnum
from pathlib import Path

import torch

from model_patch.checkpoint.writer import parse_size
from model_patch.errors import ConfigError
from model_patch.quantize import Target
from model_patch.quantize.streamed import fits


class Method(StrEnum):
    """Choices of --method."""

    polar = "polar"
    absmax = "absmax"


def check_options(method: Method, awq: bool | None, feedback: bool, resume: bool, dry_run: bool) -> None:
    """Raise ConfigError for options that exclude each other."""
    if method is Method.absmax and awq:
        raise ConfigError("--method absmax has no AWQ scales: leave out --awq")
    if method is Method.absmax and feedback:
        raise ConfigError("--method absmax has no error feedback: leave out --feedback")
    if method is Method.absmax and resume:
        raise ConfigError("--method absmax cannot be resumed: leave out --resume")
    if resume and dry_run:
        raise ConfigError("--dry-run writes nothing that could be resumed: leave out --resume")


def parse_target(bits: float | None, size: str | None, uniform: int | None, method: Method) -> Target | None:
    """--target-bits or --target-size; `uniform`: what --bits was given."""
    if bits is None and size is None:
        return None
    if bits is not None and size is not None:
        raise ConfigError("--target-bits and --target-size are two targets: give one")
    option = "--target-bits" if size is None else "--target-size"
    if uniform is not None:
        raise ConfigError(f"{option} chooses the bits of each layer: leave out --bits")
    if method is Method.absmax:
        raise ConfigError(f"{option} chooses bits for the layers of --method polar")
    return Target(bits, None if size is None else parse_size(size, option))


def parse_bits_for(options: list[str]) -> dict[str, int]:
    """--bits-for: pattern -> bits."""
    parsed = {}
    for option in options:
        pattern, separator, bits = option.rpartition("=")
        if not separator or not pattern or not bits.isdecimal():
            raise ConfigError(f"--bits-for takes PATTERN=BITS, found {option!r}")
        parsed[pattern] = int(bits)
    return parsed


def pick_streamed(asked: bool | None, source: Path, device: torch.device, target: Target | None) -> bool:
    """--layer-by-layer or --whole; by default what the model's size asks for. Measuring for a target takes it whole."""
    if target is not None:
        if asked:
            raise ConfigError("a target is measured on the model as a whole: leave out --layer-by-layer")
        return False
    return not fits(source, device) if asked is None else asked
