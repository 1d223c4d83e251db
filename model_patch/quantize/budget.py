"""Bits of each part of a model under a budget: the smallest loss that a number of bytes allows.

A part's loss goes with the squared error of its weights, and that with the distortion of the Lloyd-Max table, which is
known for all bits; so one measured loss a part gives all. The error of a sum of parts is taken as the sum of theirs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from model_patch.errors import ConfigError
from polar_kernels.codebook import lloyd_max_distortion

SMALLEST, LARGEST = 3, 8  # bits that are chosen from


@dataclass(frozen=True)
class Part:
    """loss: measured with the part quantised at `bits`; bytes_per_bit: what one bit more costs; layers: of the part."""

    loss: float
    bits: int
    bytes_per_bit: int
    layers: tuple[str, ...] = ()

    def loss_at(self, bits: int) -> float:
        return self.loss * lloyd_max_distortion(bits) / lloyd_max_distortion(self.bits)


def choose_bits(parts: Mapping[str, Part], budget: int) -> dict[str, int]:
    """Part -> bits, whose bytes together are at most `budget`.

    The next bit goes where it lowers the loss most for its bytes, as long as it fits; since a table's distortion is
    convex in its bits, no other choice of the same size is better. Raises ConfigError for a budget below 3 bits each.
    """
    chosen = dict.fromkeys(parts, SMALLEST)
    left = budget - SMALLEST * sum(part.bytes_per_bit for part in parts.values())
    if left < 0:
        raise ConfigError(
            f"the target is too small: the layers it is for take {budget - left} bytes at {SMALLEST} bits each, and "
            f"{budget} are left for them; leave out fewer layers, or ask for more"
        )
    while fitting := [n for n, part in parts.items() if chosen[n] < LARGEST and part.bytes_per_bit <= left]:
        best = max(fitting, key=lambda name: _gain(parts[name], chosen[name]))
        chosen[best] += 1
        left -= parts[best].bytes_per_bit
    return chosen


def _gain(part: Part, bits: int) -> float:
    """By which a bit more lowers the loss, for each byte."""
    return (part.loss_at(bits) - part.loss_at(bits + 1)) / part.bytes_per_bit
