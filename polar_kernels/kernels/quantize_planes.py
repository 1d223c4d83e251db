"""Activations into the rotated domain and into 16 bits, in one launch, as two planes of int8 for `exact_planes`.

A block of a row is rounded to integers X of one scale, and X = 256 h + l with h and l in int8: two columns of what the
tensor cores take, 2 m and 2 m + 1 of row m. One warp takes one block of one row, as in `quantize_activation`.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from polar_kernels.hadamard import BLOCK_SIZE, padded_size
from polar_kernels.kernels.ptx import as_float, max_lanes, sum_lanes
from polar_kernels.kernels.quantize_activation import largest_of_four, rounded_bits
from polar_kernels.kernels.rotate_block import rotate_block
from polar_kernels.tiles import LEVEL_HALVES, PLANE_STEP

_WARPS = 4
_STEP = tl.constexpr(PLANE_STEP)
_HALVES = tl.constexpr(LEVEL_HALVES / 256)
_LARGEST = tl.constexpr(127.0 * 256 + 127)  # of X
_START = tl.constexpr(12582912.0)  # what the bits of the product's accumulators start at, 0x4B400000, are as a float
# Of the products of two planes: with the high plane of the weight they count 128 times as much, with that of x 256.
_HIGH, _MIDDLE, _ALL = tl.constexpr(128.0 * 256), tl.constexpr(128.0), tl.constexpr(129.0 * 257)
_SMALLEST = tl.constexpr(2.0**-126)  # of a scale: the smallest whose bits can be rounded so


@triton.jit
def _scale_of_peak(peak, delta):
    """What a unit of the lowest product is worth; peak: the block's largest magnitude.

    A NaN or an infinity anywhere in the block makes it NaN, and so the row's results. It is rounded up to 7 bits, so
    that its products with small integers, by which the starts are taken away again, are exact.
    """
    # sqrt(128) of the rotation and sqrt(128) of the levels.
    bits = tl.maximum(peak / _LARGEST / 128.0 * delta, _SMALLEST).to(tl.int32, bitcast=True)
    return tl.where(peak * 0 == 0, as_float((bits + 0x1FFFF) & -0x20000), float("nan"))


@triton.jit(do_not_specialize=["K", "blocks", "padded_rows"])
def _quantize_planes_kernel(
    x_ptr,
    scales_ptr,
    out_ptr,
    meta_ptr,
    table_ptr,
    K,
    blocks,
    padded_rows,
    HAS_SCALES: tl.constexpr,
    WARPS: tl.constexpr,
):
    gdc_launch_dependents()
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * WARPS + thread // 32
    delta = tl.load(table_ptr + _STEP).to(tl.float32, bitcast=True)
    gdc_wait()
    x0, x1, x2, x3 = rotate_block(x_ptr, scales_ptr, row, block, lane, K, HAS_SCALES, False)
    scale = _scale_of_peak(max_lanes(largest_of_four(x0, x1, x2, x3), 5), delta)
    inverse = delta / 128.0 / scale
    q0 = rounded_bits(x0 * inverse)
    q1 = rounded_bits(x1 * inverse)
    q2 = rounded_bits(x2 * inverse)
    q3 = rounded_bits(x3 * inverse)
    total = sum_lanes(
        (as_float(q0) - _START) + (as_float(q1) - _START) + (as_float(q2) - _START) + (as_float(q3) - _START), 5
    )
    inside = block < blocks
    # Where lane q of the product reads its eight words (s, r) in a run, as in `quantize_activation`.
    position = (lane // 2) % 4 * 8 + lane // 8 * 2 + lane % 2
    out = out_ptr + (2 * row * blocks + block) * 32 + position
    # A low byte below 0 stands for 256 less, which the high one makes up for.
    tl.store(out, _word(q0 + 128, q1 + 128, q2 + 128, q3 + 128, 8), mask=inside)
    tl.store(out + blocks * 32, _word(q0, q1, q2, q3, 0), mask=inside)
    # The halves that the levels lack are added where sums of x's high plane and the levels' low one start.
    start = total * _HALVES + _START
    meta = meta_ptr + (block.to(tl.int64) * padded_rows + row) * 4
    first = inside & (lane == 0)
    tl.store(meta, scale * _HIGH, mask=first)
    tl.store(meta + 1, scale * _MIDDLE, mask=first)
    tl.store(meta + 2, scale * (_START * -_ALL), mask=first)
    tl.store(meta + 3, start, mask=first)


@triton.jit
def _word(q0, q1, q2, q3, SHIFT: tl.constexpr):
    """The bytes from bit SHIFT on."""
    low = ((q0 >> SHIFT) & 0xFF) | (((q1 >> SHIFT) & 0xFF) << 8)
    return low | (((q2 >> SHIFT) & 0xFF) << 16) | ((q3 >> SHIFT) << 24)


def quantize_planes(
    x: torch.Tensor, awq_scales: torch.Tensor | None, table: torch.Tensor, padded_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] contiguous -> words int32 [2 Mp, Kp / 4] and four fp32 [Kp / 128, Mp, 4].

    Those are what a unit is worth of the product of both high planes, and of the levels' high plane with x's low one;
    what to add for all sums having started at 12582912; and where the sum of the levels' low plane with x's high one
    has to start instead. table: `tiles.level_table`. padded_rows: Mp, at least M. Rows beyond M are left unwritten:
    each column of the product depends on its own row.
    """
    rows, in_features = x.shape
    blocks = padded_size(in_features) // BLOCK_SIZE
    words = torch.empty(2 * padded_rows, blocks * 32, dtype=torch.int32, device=x.device)
    meta = torch.empty(blocks, padded_rows, 4, dtype=torch.float32, device=x.device)
    _quantize_planes_kernel[(triton.cdiv(blocks, _WARPS), rows)](
        x_ptr=x,
        scales_ptr=awq_scales,
        out_ptr=words,
        meta_ptr=meta,
        table_ptr=table,
        K=in_features,
        blocks=blocks,
        padded_rows=padded_rows,
        HAS_SCALES=awq_scales is not None,
        WARPS=_WARPS,
        num_warps=_WARPS,
        enable_fp_fusion=True,
        launch_pdl=True,
    )
    return words, meta
