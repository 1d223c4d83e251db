"""A mixture of experts from the stored bytes: the pairs of a token and an expert, grouped by expert into row tiles.

Nothing waits for the GPU: how many tiles the routing really makes is known only there, so that the grid has as many as
any routing could need, and those without rows return at once.
"""

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from polar_kernels.codebook import bits_of
from polar_kernels.hadamard import BLOCK_SIZE
from polar_kernels.kernels.blocks import BLOCK, load_levels
from polar_kernels.kernels.rotate import rotate

_BLOCK_N = 64


@triton.jit
def _grouped_matmul_kernel(
    x_ptr,
    order_ptr,
    tiles_ptr,
    packed_ptr,
    norms_ptr,
    centroids_ptr,
    out_ptr,
    N,
    row_bytes,
    pairs_per_row,
    ROW_BLOCKS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile = tiles_ptr + tl.program_id(0).to(tl.int64) * 3
    expert, start, stop = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if start < stop:
        first = tl.program_id(1).to(tl.int64) * BLOCK_N
        n, row = first + tl.arange(0, BLOCK_N), first + tl.arange(0, BLOCK_N * BLOCK) // BLOCK
        m, k = start + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK)
        pair = tl.load(order_ptr + m, mask=m < stop, other=0)
        x_row = pair // pairs_per_row * (ROW_BLOCKS * BLOCK)
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        # A constexpr bound: Triton 3.6's interpreter cannot loop to a run-time one.
        for block in range(ROW_BLOCKS):
            levels = load_levels(packed_ptr, centroids_ptr, expert * N + row, row < N, block, row_bytes, BITS, BLOCK_N)
            x = tl.load(x_ptr + x_row[None, :] + block * BLOCK + k[:, None], mask=(m < stop)[None, :], other=0.0)
            partial = tl.dot(levels.to(x_ptr.dtype.element_ty), x, input_precision="ieee")
            norms = tl.load(norms_ptr + (expert * N + n) * ROW_BLOCKS + block, mask=n < N, other=0.0).to(tl.float32)
            acc += partial * norms[:, None]
        out = out_ptr + pair[None, :] * N + n[:, None]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (m < stop)[None, :])


def experts(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_packed: torch.Tensor,
    gate_up_norms: torch.Tensor,
    gate_up_awq_scales: torch.Tensor | None,
    gate_up_centroids: torch.Tensor,
    down_packed: torch.Tensor,
    down_norms: torch.Tensor,
    down_awq_scales: torch.Tensor | None,
    down_centroids: torch.Tensor,
) -> torch.Tensor:
    """`reference.experts` of x [T, H] contiguous; a token with an expert that does not exist becomes NaN."""
    (count, out_features, _), top_k = down_packed.shape, top_k_index.shape[1]
    pairs = top_k_index.numel()
    if not pairs or not x.numel():
        return torch.zeros_like(x)
    many = pairs > 16 * count
    block_m = 16 if not many else 64 if x.dtype != torch.float32 else 32
    order, tiles = _group(top_k_index.flatten().long(), count, block_m)
    rotated = rotate(x, gate_up_awq_scales, gain=BLOCK_SIZE**-0.5)
    gate_up = _grouped_matmul(rotated, order, tiles, gate_up_packed, gate_up_norms, gate_up_centroids, top_k, block_m)
    gate, up = gate_up.chunk(2, -1)
    middle = F.silu(gate.float()).mul_(up).to(x.dtype)
    rotated = rotate(middle, down_awq_scales, gain=BLOCK_SIZE**-0.5)
    made = _grouped_matmul(rotated, order, tiles, down_packed, down_norms, down_centroids, 1, block_m)
    weighted = made.view(len(x), top_k, out_features) * top_k_weights.float()[..., None]
    return weighted.sum(1).to(x.dtype)


def _group(index: torch.Tensor, count: int, block_m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs in order of their experts, int64 [P], and the tiles over them: expert, first place and end, int64 [*, 3].

    index: int64 [P], the expert of each pair. A tile that the routing does not need ends where it begins or before.
    """
    ordered, order = index.sort(stable=True)
    edges = torch.searchsorted(ordered, torch.arange(count + 1, device=index.device))
    per_expert = (edges.diff() + block_m - 1) // block_m
    last = per_expert.cumsum(0)
    tile = torch.arange(index.numel() // block_m + min(count, index.numel()), device=index.device)
    expert = torch.searchsorted(last, tile, right=True).clamp_(max=count - 1)
    start = edges[expert] + (tile - (last - per_expert)[expert]) * block_m
    stop = torch.minimum(edges[expert + 1], start + block_m)
    return order, torch.stack([expert, start, stop], 1)


def _grouped_matmul(
    rotated: torch.Tensor,
    order: torch.Tensor,
    tiles: torch.Tensor,
    packed: torch.Tensor,
    norms: torch.Tensor,
    centroids: torch.Tensor,
    pairs_per_row: int,
    block_m: int,
) -> torch.Tensor:
    """Row p // pairs_per_row of rotated [*, Kp], divided by sqrt(128), times the weight of pair p's expert: [P, N]."""
    out_features = packed.shape[1]
    # No tile covers a pair whose expert does not exist.
    out = torch.full((order.numel(), out_features), torch.nan, dtype=rotated.dtype, device=rotated.device)
    _grouped_matmul_kernel[(len(tiles), triton.cdiv(out_features, _BLOCK_N))](
        x_ptr=rotated,
        order_ptr=order,
        tiles_ptr=tiles,
        packed_ptr=packed,
        norms_ptr=norms,
        centroids_ptr=centroids,
        out_ptr=out,
        N=out_features,
        row_bytes=packed.shape[2],
        pairs_per_row=pairs_per_row,
        ROW_BLOCKS=norms.shape[2],
        BITS=bits_of(centroids),
        BLOCK_M=block_m,
        BLOCK_N=_BLOCK_N,
        num_warps=4,
        enable_fp_fusion=True,
        num_stages=1,  # as in matmul.py
    )
    return out
