"""What is compared: ways to quantise a weight, from rounding to the whole scheme, each by what it leaves of it.

Those that are in the format come from `quantize_weight`, as `polar quantize` makes them; the others, baselines without
rotation or Lloyd-Max levels, are rounded here.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from model_patch.errors import ConfigError
from model_patch.quantize.absmax import absmax_round
from polar_kernels import lloyd_max_levels, ops, published_levels, quantize_weight
from polar_kernels.hadamard import BLOCK_SIZE, pad_blocks, transform_blocks

# Weight [N, K], or of experts [E, N, K], of any float dtype, bits, AWQ scales [K] or None, moments [K, K], or of each
# expert, or None -> fp32, of the weight's shape.
Quantize = Callable[[torch.Tensor, int, torch.Tensor | None, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class Variant:
    """quantize: what is left of a weight; awq, feedback: whether it is given scales, searched for with the variant's
    own error, and moments."""

    name: str
    quantize: Quantize
    awq: bool = False
    feedback: bool = False


def _scaled(round_weight: Callable[[torch.Tensor, int], torch.Tensor]) -> Quantize:
    """A rounding of weights, after AWQ scales where there are some."""

    def quantize(weight: torch.Tensor, bits: int, scales: torch.Tensor | None, _: torch.Tensor | None) -> torch.Tensor:
        if scales is None:
            return round_weight(weight.float(), bits)
        return round_weight(weight.float() * scales.float(), bits) / scales.float()

    return quantize


def _rotated_absmax(weight: torch.Tensor, bits: int) -> torch.Tensor:
    return transform_blocks(absmax_round(transform_blocks(pad_blocks(weight)), bits))[..., : weight.shape[-1]]


def _unrotated_lloyd_max(weight: torch.Tensor, bits: int) -> torch.Tensor:
    blocks = pad_blocks(weight).unflatten(-1, (-1, BLOCK_SIZE))
    deviation = blocks.norm(dim=-1, keepdim=True) / math.sqrt(BLOCK_SIZE)
    table = lloyd_max_levels(bits).to(weight.device)
    unit = blocks / deviation.clamp_min(torch.finfo(torch.float32).tiny)
    levels = table[torch.bucketize(unit, (table[1:] + table[:-1]) / 2)]
    return (levels * deviation).flatten(-2)[..., : weight.shape[-1]]


def _polar(
    weight: torch.Tensor,
    bits: int,
    scales: torch.Tensor | None,
    moments: torch.Tensor | None,
    *,
    levels: Callable[[int], torch.Tensor] = lloyd_max_levels,
    least_squares: bool = False,
) -> torch.Tensor:
    if weight.dim() == 3:
        own = [moments] * len(weight) if moments is None or moments.dim() == 2 else list(moments)
        single = partial(_polar, levels=levels, least_squares=least_squares)
        return torch.stack([single(w, bits, scales, m) for w, m in zip(weight, own, strict=True)])
    made = quantize_weight(
        weight, bits, awq_scales=scales, centroids=levels(bits), least_squares=least_squares, moments=moments
    )
    parts = (made.packed, made.norms, made.awq_scales, made.centroids)
    return ops.dequantize(*parts, made.in_features, torch.float32)


_published = partial(_polar, levels=published_levels)
_whole = partial(_polar, least_squares=True)

BASELINE = "Hadamard + Lloyd-Max (published table) + AWQ"  # what the others are compared with
FULL = "+ least-squares scale + error feedback"  # what bits of each layer's own are chosen and measured with
VARIANTS = (
    Variant("absmax", _scaled(absmax_round)),
    Variant("absmax + AWQ", _scaled(absmax_round), awq=True),
    Variant("Hadamard, uniform levels", _scaled(_rotated_absmax)),
    Variant("Lloyd-Max, no rotation", _scaled(_unrotated_lloyd_max)),
    Variant("Hadamard + Lloyd-Max (published table)", _published),
    Variant(BASELINE, _published, awq=True),
    Variant("Hadamard + Lloyd-Max", _polar),
    Variant("+ least-squares scale", _whole),
    Variant("+ least-squares scale + AWQ", _whole, awq=True),
    Variant(FULL, _whole, feedback=True),
    Variant("+ least-squares scale + AWQ + error feedback", _whole, awq=True, feedback=True),
)


def pick_variants(names: Sequence[str]) -> list[Variant]:
    """Those with the given names, and the baseline; all when there are none. Raises ConfigError for an unknown one."""
    known = {variant.name: variant for variant in VARIANTS}
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"--variant {unknown[0]!r}: must be one of {', '.join(map(repr, known))}")
    return [variant for variant in VARIANTS if not names or variant.name in {*names, BASELINE}]
