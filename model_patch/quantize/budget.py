"""Bits of each part of a model under a budget: the smallest loss that a number of bytes allows.

A part's loss goes with the squared error of its weights, and that with the distortion of the Lloyd-Max table, which is
known for all bits; so one measured loss a part gives all. The error of a sum of parts is taken as the sum of theirs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from model_patch.errors import ConfigError
from polar_kernels.codebook import lloyd_max_distortion

SMALLEST, LARGEST = 3, 8  # bits that are chosen from
_ROUNDING = 1e-9  # of a sum of losses: smaller differences are none


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

    The next bit goes where it lowers the loss most for its bytes, as long as it fits. Since a table's distortion is
    convex in its bits, no choice of the same size is better, until a part is passed over because its bit does not fit.
    What that wastes, exchanges win back: a bit more for one part, taken from others, until none lowers the loss. For
    parts of one size the choice is the best there is; for others, rarely, a better one is left.

    Raises ConfigError for a budget below 3 bits each.
    """
    least = SMALLEST * sum(part.bytes_per_bit for part in parts.values())
    if budget < 0:
        raise ConfigError(
            f"the target is too small: tensors whose bits are not chosen take {-budget} bytes more than it; "
            "leave out fewer layers, or ask for more"
        )
    if budget < least:
        raise ConfigError(
            f"the target is too small: the layers it is for take {least} bytes at {SMALLEST} bits each, and "
            f"{budget} are left for them; leave out fewer layers, or ask for more"
        )
    chosen = _filled(parts, dict.fromkeys(parts, SMALLEST), budget)
    while exchanged := _best_exchange(parts, chosen, budget):
        chosen = exchanged
    return chosen


def _filled(parts: Mapping[str, Part], chosen: Mapping[str, int], budget: int) -> dict[str, int]:
    """The same with all bits more that the budget allows, each where it lowers the loss most for its bytes."""
    chosen = dict(chosen)
    left = budget - _size(parts, chosen)
    while fitting := [n for n, part in parts.items() if chosen[n] < LARGEST and part.bytes_per_bit <= left]:
        best = max(fitting, key=lambda name: _gain(parts[name], chosen[name]))
        chosen[best] += 1
        left -= parts[best].bytes_per_bit
    return chosen


def _best_exchange(parts: Mapping[str, Part], chosen: Mapping[str, int], budget: int) -> dict[str, int] | None:
    """Of one bit more for a part, taken from others, that which lowers the loss most; None when none does."""
    made = (bits for name in parts if chosen[name] < LARGEST for bits in _exchanges(parts, chosen, name, budget))
    best = min(made, key=lambda bits: _loss(parts, bits), default=None)
    return best if best is not None and _loss(parts, best) < _loss(parts, chosen) * (1 - _ROUNDING) else None


def _exchanges(
    parts: Mapping[str, Part], chosen: Mapping[str, int], name: str, budget: int
) -> Iterator[dict[str, int]]:
    """One bit more for a part, taken where it costs least for its bytes; the last of what is taken, where it costs
    least of all that is enough."""
    bits = {**chosen, name: chosen[name] + 1}
    while others := [other for other in parts if other != name and bits[other] > SMALLEST]:
        over = _size(parts, bits) - budget
        costs = {other: _gain(parts[other], bits[other] - 1) for other in others}
        if enough := [other for other in others if parts[other].bytes_per_bit >= over]:
            last = min(enough, key=lambda other: costs[other] * parts[other].bytes_per_bit)
            yield _filled(parts, {**bits, last: bits[last] - 1}, budget)
        cheapest = min(others, key=lambda other: costs[other])
        if cheapest in enough:
            return
        bits[cheapest] -= 1


def _gain(part: Part, bits: int) -> float:
    """By which a bit more lowers the loss, for each byte."""
    return (part.loss_at(bits) - part.loss_at(bits + 1)) / part.bytes_per_bit


def _loss(parts: Mapping[str, Part], chosen: Mapping[str, int]) -> float:
    return sum(part.loss_at(chosen[name]) for name, part in parts.items())


def _size(parts: Mapping[str, Part], chosen: Mapping[str, int]) -> int:
    return sum(part.bytes_per_bit * chosen[name] for name, part in parts.items())
