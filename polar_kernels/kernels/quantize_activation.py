"""Activations into the rotated domain and into int8, in one launch: divide by the AWQ scales, rotate, round.

After the rotation a 128-block is spread flat, so that one int8 scale a block costs next to nothing.
One warp takes one block of one row; lane l holds columns 4 l .. 4 l + 3.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from polar_kernels.hadamard import BLOCK_SIZE, padded_size
from polar_kernels.kernels.fragments import word_place
from polar_kernels.kernels.ptx import max_lanes, sum_lanes
from polar_kernels.kernels.rotate_block import rotate_block
from polar_kernels.tiles import LEVEL_STEP

_WARPS = 4
_STEP = tl.constexpr(LEVEL_STEP)
# 1.5 * 2^23: adding it rounds a small float to an integer in its low mantissa bits.
_ROUND = tl.constexpr(12582912.0)
_ROUND_BITS = tl.constexpr(0x4B400000)


@triton.jit
def quantize_block(x_ptr, scales_ptr, row, block, lane, K, delta, HAS_SCALES: tl.constexpr, GATED: tl.constexpr):
    """Four columns of a block as the bytes of a word; half the sum of the block's integers, times the scale; it."""
    x0, x1, x2, x3 = rotate_block(x_ptr, scales_ptr, row, block, lane, K, HAS_SCALES, GATED)
    return quantize_lanes(x0, x1, x2, x3, delta)


@triton.jit
def quantize_lanes(x0, x1, x2, x3, delta):
    """The same of a block that is rotated and in registers."""
    peak = max_lanes(largest_of_four(x0, x1, x2, x3), 5)
    inverse, scale = scales_of_peak(peak, delta)
    word, total = pack_lanes(x0, x1, x2, x3, inverse)
    # Levels are (v + 1/2) * delta, so that half the block's sum is missing from the integer product.
    return word, 0.5 * sum_lanes(total.to(tl.float32), 5) * scale, scale


@triton.jit
def pack_lanes(x0, x1, x2, x3, inverse):
    """Four values times `inverse` as the bytes of a word, and the sum of the integers that they were rounded to."""
    q0 = _round(x0 * inverse)
    q1 = _round(x1 * inverse)
    q2 = _round(x2 * inverse)
    q3 = _round(x3 * inverse)
    return (q0 & 0xFF) | ((q1 & 0xFF) << 8) | ((q2 & 0xFF) << 16) | (q3 << 24), q0 + q1 + q2 + q3


@triton.jit(do_not_specialize=["K", "blocks", "padded_rows"])
def _quantize_kernel(
    x_ptr,
    scales_ptr,
    out_ptr,
    meta_ptr,
    table_ptr,
    K,
    blocks,
    padded_rows,
    HAS_SCALES: tl.constexpr,
    GATED: tl.constexpr,
    ROUTED: tl.constexpr,
    GATHERED: tl.constexpr,
    WARPS: tl.constexpr,
):
    if not ROUTED:
        gdc_launch_dependents()
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * WARPS + thread // 32
    delta = tl.load(table_ptr + _STEP).to(tl.float32, bitcast=True)
    gdc_wait()
    if ROUTED:
        gdc_launch_dependents()
    word, half, scale = quantize_block(x_ptr, scales_ptr, row, block, lane, K, delta, HAS_SCALES, GATED)
    store_block(word, half, scale, out_ptr, meta_ptr, row, block, lane, blocks, padded_rows, GATHERED)


@triton.jit
def store_block(
    word, half, scale, out_ptr, meta_ptr, row, block, lane, blocks, padded_rows, GATHERED: tl.constexpr = False
):
    """What `quantize_lanes` gives, to where a product reads it; blocks from `blocks` on are left out."""
    inside = block < blocks
    tl.store(out_ptr + word_place(row, block, blocks, lane, 1, GATHERED), word, mask=inside)
    meta = meta_ptr + (block.to(tl.int64) * padded_rows + row) * 2
    # The product's accumulator starts at _ROUND: its bits, read as a float and times scale, plus the base. That is
    # rounded by little more than a unit of the integer product: nothing beside the rounding of x.
    tl.store(meta, half - _ROUND * scale, mask=inside & (lane == 0))
    tl.store(meta + 1, scale, mask=inside & (lane == 0))


@triton.jit
def largest_of_four(x0, x1, x2, x3):
    """Their largest magnitude, NaN where any is."""
    return _max(_max(tl.abs(x0), tl.abs(x1)), _max(tl.abs(x2), tl.abs(x3)))


@triton.jit
def _max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _round(x):
    return rounded_bits(x) - _ROUND_BITS


@triton.jit
def rounded_bits(x):
    """Bits whose low byte is x rounded, x in -128..127."""
    return (x + _ROUND).to(tl.int32, bitcast=True)


@triton.jit
def scales_of_peak(peak, delta):
    """What a block is multiplied by to fill int8, and the scale of its products; peak: its largest magnitude.

    A NaN or an infinity anywhere in the block makes its scale NaN, and so the row's results.
    """
    # sqrt(128) of the rotation and sqrt(128) of the levels.
    scale = tl.where(peak * 0 == 0, peak / 127.0 / 128.0 * delta, float("nan"))
    return tl.where(peak > 0, 127.0 / peak, 0.0), scale


def quantize_activation(
    x: torch.Tensor,
    awq_scales: torch.Tensor | None,
    table: torch.Tensor,
    padded_rows: int,
    *,
    gated: bool = False,
    routed: bool = False,
    gathered: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] contiguous -> words int32 [Mp, Kp / 4] and (base, scale) fp32 [Kp / 128, Mp, 2].

    The words are in fragments (see there), or, gathered, a row's together. table: `tiles.level_table`. padded_rows: Mp,
    at least M, and in fragments a multiple of 8. Rows beyond M are left unwritten: each column of the product depends
    on its own row. gated: x is [M, 2 K], and silu(first half) * second half is taken. routed: the kernel that follows
    may read what was written before this one without waiting, and so starts only after that.
    """
    rows, in_features = x.shape[0], x.shape[1] // 2 if gated else x.shape[1]
    words, meta = empty_words(padded_rows, in_features, x.device)
    blocks = len(meta)
    _quantize_kernel[(triton.cdiv(blocks, _WARPS), rows)](
        x_ptr=x,
        scales_ptr=awq_scales,
        out_ptr=words,
        meta_ptr=meta,
        table_ptr=table,
        K=in_features,
        blocks=blocks,
        padded_rows=padded_rows,
        HAS_SCALES=awq_scales is not None,
        GATED=gated,
        ROUTED=routed,
        GATHERED=gathered,
        WARPS=_WARPS,
        num_warps=_WARPS,
        enable_fp_fusion=True,
        launch_pdl=True,
    )
    return words, meta


def empty_words(padded_rows: int, in_features: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the words and for (base, scale) of so many rows."""
    blocks = padded_size(in_features) // BLOCK_SIZE
    words = torch.empty(padded_rows, blocks * 32, dtype=torch.int32, device=device)
    return words, torch.empty(blocks, padded_rows, 2, dtype=torch.float32, device=device)
