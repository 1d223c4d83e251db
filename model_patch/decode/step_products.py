"""Int8 products of few rows in two launches: the one that quantises does what comes before, a norm say, and the one
that multiplies adds the residual."""

from dataclasses import dataclass
from typing import Any

import torch

from polar_kernels import PolarGroup, PolarLinear
from polar_kernels.module import TiledWeight

_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Norm:
    """An RMSNorm. centered: it multiplies by 1 + weight, in fp32."""

    weight: torch.Tensor
    epsilon: float
    centered: bool


def takes(x: torch.Tensor, norm: Norm, *weights: TiledWeight | None) -> bool:
    """Whether x [rows, 1, width] is a token for each of few rows, and the weights are multiplied in int8."""
    from polar_kernels.kernels.tiled import NARROW_ROWS  # needs Triton, which CPUs go without

    if any(weight is None for weight in weights) or x.dtype != norm.weight.dtype or not x.is_contiguous():
        return False
    return x.dim() == 3 and x.shape[1] == 1 and len(x) <= NARROW_ROWS


def group_of(members: Any) -> PolarGroup | None:
    """The group of exactly these layers, if they are one and have no bias."""
    if not all(isinstance(member, PolarLinear) and member.bias is None for member in members):
        return None
    group = members[0].group
    return group if group is not None and [*map(id, group.members)] == [*map(id, members)] else None


def norm_of(module: Any) -> Norm | None:
    """What an RMSNorm multiplies by, found by what it does to a row; None for a module that does something else."""
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or weight.dim() != 1 or not isinstance(epsilon, float) or weight.dtype not in _DTYPES:
        return None
    x = torch.linspace(-3, 5, len(weight), dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        found, values, factors = type(module).forward(module, x[None])[0].float(), x.float(), weight.float()
    values = values * torch.rsqrt(values.square().mean() + epsilon)
    for centered in (False, True):
        if torch.allclose(values * (factors + centered), found, rtol=0.02, atol=1e-6):
            return Norm(weight, epsilon, centered)
    return None


def multiply_normed(
    x: torch.Tensor, norm: Norm, weight: TiledWeight, out_features: int, normed: torch.Tensor | None
) -> torch.Tensor:
    """The norm of x [rows, width], written to `normed` if that is given, times a weight: [rows, out_features]."""
    from polar_kernels.kernels.int8_matmul import multiply_quantized, padded_rows
    from polar_kernels.kernels.norm_quantize import norm_quantize

    words, meta = norm_quantize(
        x,
        norm.weight,
        norm.epsilon,
        weight.awq_scales,
        weight.level_table,
        padded_rows(len(x)),
        centered=norm.centered,
        out=normed,
    )
    out = x.new_empty(len(x), out_features)
    return multiply_quantized(words, meta, weight.tiles, weight.tile_norms, weight.level_table, None, None, out)


def multiply_plain(x: torch.Tensor, layer: PolarLinear, residual: torch.Tensor, *, gated: bool = False) -> torch.Tensor:
    """The layer's output for x [rows, in_features] plus the residual: [rows, out_features]. gated: x has twice as many
    columns, and silu(first half) * second half is taken."""
    from polar_kernels.kernels.int8_matmul import multiply_quantized, padded_rows
    from polar_kernels.kernels.quantize_activation import quantize_activation

    weight = layer.tiled
    assert weight is not None
    count = padded_rows(len(x))
    words, meta = quantize_activation(x.contiguous(), weight.awq_scales, weight.level_table, count, gated=gated)
    out = torch.empty_like(residual)
    return multiply_quantized(
        words, meta, weight.tiles, weight.tile_norms, weight.level_table, layer.bias, residual, out
    )
