"""A mixture of experts from weights in tile layout: which kernels for how many tokens.

| pairs of a token and an expert | |
|---|---|
| few | expert_pairs: a row of x at a time, straight from the router's choice; the last sums a token's experts |
| more | expert_groups, then expert_matmul: rows of x by expert; a kernel of its own sums |
| over 20 an expert, on Hopper, not exact | expert_groups, then expert_wgmma |

x is rotated and rounded once for all experts; silu(gate) * up by the kernel that rotates and rounds it.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from polar_kernels.codebook import bits_of
from polar_kernels.kernels import expert_matmul, expert_wgmma
from polar_kernels.kernels import experts as stored
from polar_kernels.kernels.expert_groups import group_pairs
from polar_kernels.kernels.expert_pairs import expert_pairs
from polar_kernels.kernels.gpu import has_wgmma
from polar_kernels.kernels.quantize_activation import quantize_activation
from polar_kernels.kernels.quantize_grouped import GROUP_ROWS, quantize_grouped
from polar_kernels.kernels.rotate_activation import rotate_activation
from polar_kernels.tiles import untile_weight

_FEW_PAIRS = 128
_MOST_PAIRS = 1 << 15  # at a time: bounds what lies between the products, and a grid's second dimension
_SUM_SIZE = 1024


class Tiled(NamedTuple):
    """One projection of all experts in tile layout: a weight [E * N, K], N a multiple of 32."""

    tiles: torch.Tensor
    tile_norms: torch.Tensor
    awq_scales: torch.Tensor | None
    level_table: torch.Tensor
    centroids: torch.Tensor


@triton.jit(do_not_specialize=["N", "experts"])
def _weighted_sum_kernel(
    made_ptr, index_ptr, weights_ptr, out_ptr, N, experts, TOP_K: tl.constexpr, SIZE: tl.constexpr
):
    gdc_wait()
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    keep = column < N
    y = tl.zeros((SIZE,), tl.float32)
    for slot in tl.static_range(TOP_K):
        pair = tl.program_id(0).to(tl.int64) * TOP_K + slot
        expert = tl.load(index_ptr + pair)
        weight = tl.load(weights_ptr + pair).to(tl.float32)
        weight = tl.where((expert >= 0) & (expert < experts), weight, float("nan"))
        y += weight * tl.load(made_ptr + pair * N + column, mask=keep, other=0.0).to(tl.float32)
    out = out_ptr + tl.program_id(0).to(tl.int64) * N + column
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=keep)


def tiled_experts(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: Tiled,
    down: Tiled,
    count: int,
    middle: int,
    exact: bool,
) -> torch.Tensor:
    """`reference.experts` of x [T, H] contiguous, router's choice [T, k] contiguous; a token with an expert that does
    not exist becomes NaN. count: of experts; middle: I. exact: no int8 activations."""
    top_k = top_k_index.shape[1]
    if not top_k_index.numel() or not x.numel():
        return torch.zeros_like(x)
    if x.dtype == torch.float32:
        parts = [*_stored(gate_up, count, 2 * middle), *_stored(down, count, x.shape[1])]
        return stored.experts(x, top_k_index, top_k_weights, *parts)
    run = _few if top_k_index.numel() <= _FEW_PAIRS else _many
    step = max(1, _MOST_PAIRS // top_k)
    routed = zip(x.split(step), top_k_index.split(step), top_k_weights.split(step), strict=True)
    outs = [run(*part, gate_up, down, count, middle, exact) for part in routed]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _few(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Tiled,
    down: Tiled,
    count: int,
    middle: int,
    exact: bool,
) -> torch.Tensor:
    words, meta = _rotated(x, gate_up, exact, routed=True)
    both = x.new_empty(index.numel(), 2 * middle)
    own = (gate_up.tiles, gate_up.tile_norms, gate_up.level_table, count)
    expert_pairs(words, meta, index.view(-1, 1), None, both, *own)
    words, meta = _rotated(both, down, exact, gated=True)
    own = (down.tiles, down.tile_norms, down.level_table, count)
    return expert_pairs(words, meta, index, weights, torch.empty_like(x), *own)


def _many(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Tiled,
    down: Tiled,
    count: int,
    middle: int,
    exact: bool,
) -> torch.Tensor:
    wgmma = has_wgmma(x.device)
    grouped = group_pairs(index.view(-1), count, _choose_group_rows(index.numel(), count, exact, wgmma))
    both = x.new_empty(index.numel(), 2 * middle)
    made = x.new_empty(index.numel(), x.shape[1])
    if grouped.rows == GROUP_ROWS:
        for source, weight, out in ((x, gate_up, both), (both, down, made)):
            gated = source is both
            scales, table = weight.awq_scales, weight.level_table
            words = quantize_grouped(source, scales, table, grouped.places, len(grouped.groups), gated=gated)
            expert_wgmma.expert_wgmma(words, grouped, out, weight.tiles, weight.tile_norms, table, count)
    else:
        for source, weight, out in ((x, gate_up, both), (both, down, made)):
            words, meta = _rotated(source, weight, exact, gated=source is both, routed=True)
            own = (weight.tiles, weight.tile_norms, weight.level_table, count)
            expert_matmul.expert_matmul(words, meta, grouped, out, *own)
    return weighted_sum(made, index, weights, count)


def weighted_sum(made: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, count: int) -> torch.Tensor:
    """made [T * k, N] times weights [T, k], summed over k: [T, N]; NaN where an index is outside 0..count-1."""
    tokens, top_k = index.shape
    out = made.new_empty(tokens, made.shape[1])
    _weighted_sum_kernel[(tokens, triton.cdiv(out.shape[1], _SUM_SIZE))](
        made_ptr=made,
        index_ptr=index,
        weights_ptr=weights,
        out_ptr=out,
        N=out.shape[1],
        experts=count,
        TOP_K=top_k,
        SIZE=_SUM_SIZE,
        num_warps=4,
        enable_fp_fusion=True,
        launch_pdl=True,
    )
    return out


def _rotated(
    x: torch.Tensor, weight: Tiled, exact: bool, *, gated: bool = False, routed: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    how = {"gated": gated, "routed": routed, "gathered": True}
    if exact:
        return rotate_activation(x, weight.awq_scales, len(x), **how), None
    return quantize_activation(x, weight.awq_scales, weight.level_table, len(x), **how)


def _choose_group_rows(pairs: int, count: int, exact: bool, wgmma: bool) -> int:
    """Rows of a group by the pairs an expert has on average, which are not spread evenly. Measured on an H100."""
    if pairs <= 4 * count:
        return 8
    if exact or pairs <= 20 * count:
        return 16
    return GROUP_ROWS if wgmma else 32


def _stored(weight: Tiled, count: int, out_features: int) -> Any:
    """Its parts as `experts` takes them."""
    parts = untile_weight(weight.tiles, weight.tile_norms, count * out_features, bits_of(weight.centroids))
    packed, norms = (part.view(count, out_features, -1) for part in parts)
    return packed, norms, weight.awq_scales, weight.centroids
