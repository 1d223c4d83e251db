"""Activations into the rotated domain and into int8, each row to the groups of the experts that its token chose.

A program takes the blocks of a row that share a scale, a warp one of them.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from polar_kernels.kernels.quantize_activation import largest_of_four, pack_lanes, scales_of_peak
from polar_kernels.kernels.quantize_chunks import shared_blocks, store_scale
from polar_kernels.kernels.ring import chunk_words
from polar_kernels.kernels.rotate_block import rotate_block
from polar_kernels.kernels.wgmma_forms import SCALE_BLOCKS
from polar_kernels.tiles import LEVEL_STEP

GROUP_ROWS = 64
_WARPS = SCALE_BLOCKS
_STEP, _ROWS, _CHUNK = tl.constexpr(LEVEL_STEP), tl.constexpr(GROUP_ROWS), tl.constexpr(chunk_words(GROUP_ROWS))


@triton.jit(do_not_specialize=["K", "blocks", "copies"])
def _quantize_grouped_kernel(
    x_ptr,
    scales_ptr,
    places_ptr,
    out_ptr,
    table_ptr,
    K,
    blocks,
    copies,
    HAS_SCALES: tl.constexpr,
    GATED: tl.constexpr,
    WARPS: tl.constexpr,
):
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * WARPS + thread // 32
    delta = tl.load(table_ptr + _STEP).to(tl.float32, bitcast=True)
    gdc_wait()
    gdc_launch_dependents()
    x0, x1, x2, x3 = rotate_block(x_ptr, scales_ptr, row, block, lane, K, HAS_SCALES, GATED)  # zeros beyond K
    # As integers, which order positive floats, and NaN above all.
    peak = tl.max(largest_of_four(x0, x1, x2, x3).to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    inverse, scale = scales_of_peak(peak, delta)
    word, total = pack_lanes(x0, x1, x2, x3, inverse)
    half = 0.5 * tl.sum(total).to(tl.float32) * scale
    for copy in range(copies):
        place = tl.load(places_ptr + row * copies + copy + lane * 0).to(tl.int64)
        keep = place >= 0
        out = out_ptr + (place // _ROWS * blocks + block) * _CHUNK
        own = place % _ROWS
        # As in `quantize_chunks`: column 32 s + 8 q + 4 r + i, of lane 8 s + 2 q + r.
        position = own * 32 + (lane // 8 * 2 + lane % 2 ^ own % 8) * 4 + lane // 2 % 4
        tl.store(out + position, word, mask=keep)
        store_scale(out, own, scale, half, keep & (thread == 32 * WARPS - 1), _ROWS)


def quantize_grouped(
    x: torch.Tensor,
    awq_scales: torch.Tensor | None,
    table: torch.Tensor,
    places: torch.Tensor,
    groups: int,
    *,
    gated: bool = False,
) -> torch.Tensor:
    """x [M, K] contiguous -> chunks of `ring` of GROUP_ROWS rows each, int32 [groups, blocks, words], as
    `quantize_chunks` has them.

    places: int32 [M * copies], where the copies of each row go, the GROUP_ROWS rows of one group after the other's;
    nowhere where negative. gated: as `quantize_activation`'s. Rows without an x are left unwritten. The kernel that
    follows may read what was written before this one without waiting.
    """
    rows, in_features = x.shape[0], x.shape[1] // 2 if gated else x.shape[1]
    blocks = shared_blocks(in_features)
    words = torch.empty(groups, blocks, chunk_words(GROUP_ROWS), dtype=torch.int32, device=x.device)
    _quantize_grouped_kernel[(rows, blocks // _WARPS)](
        x_ptr=x,
        scales_ptr=awq_scales,
        places_ptr=places,
        out_ptr=words,
        table_ptr=table,
        K=in_features,
        blocks=blocks,
        copies=places.numel() // rows,
        HAS_SCALES=awq_scales is not None,
        GATED=gated,
        WARPS=_WARPS,
        num_warps=_WARPS,
        enable_fp_fusion=True,
        launch_pdl=True,
    )
    return words
