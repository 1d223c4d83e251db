"""One 128-block of one row of activations, divided by the AWQ scales and rotated by the warp that loads it."""

import triton
import triton.language as tl

from polar_kernels.kernels.ptx import swap_lanes


@triton.jit
def rotate_block(x_ptr, scales_ptr, row, block, lane, K, HAS_SCALES: tl.constexpr, GATED: tl.constexpr):
    """Columns 4 lane .. 4 lane + 3 of the block, fp32, times sqrt(128): the transform is not normalised here.

    GATED: a row has 2 K columns, and x is silu(the first K) * the others.
    """
    column = block * 128 + 4 * lane
    x0 = _load(x_ptr, scales_ptr, row, column, K, HAS_SCALES, GATED)
    x1 = _load(x_ptr, scales_ptr, row, column + 1, K, HAS_SCALES, GATED)
    x2 = _load(x_ptr, scales_ptr, row, column + 2, K, HAS_SCALES, GATED)
    x3 = _load(x_ptr, scales_ptr, row, column + 3, K, HAS_SCALES, GATED)
    return rotate_lanes(x0, x1, x2, x3, lane)


@triton.jit
def rotate_lanes(x0, x1, x2, x3, lane):
    """The same of a block that is in registers."""
    x0, x1, x2, x3 = x0 + x1, x0 - x1, x2 + x3, x2 - x3
    x0, x1, x2, x3 = x0 + x2, x1 + x3, x0 - x2, x1 - x3
    for bit in tl.static_range(5):
        distance = tl.full(lane.shape, 1 << bit, tl.int32)
        sign = tl.where((lane >> bit) & 1 == 1, -1.0, 1.0)
        x0 = swap_lanes(x0, distance) + sign * x0
        x1 = swap_lanes(x1, distance) + sign * x1
        x2 = swap_lanes(x2, distance) + sign * x2
        x3 = swap_lanes(x3, distance) + sign * x3
    return x0, x1, x2, x3


@triton.jit
def _load(x_ptr, scales_ptr, row, column, K, HAS_SCALES: tl.constexpr, GATED: tl.constexpr):
    if GATED:
        gate = tl.load(x_ptr + row * (2 * K) + column, mask=column < K, other=0.0).to(tl.float32)
        up = tl.load(x_ptr + row * (2 * K) + K + column, mask=column < K, other=0.0).to(tl.float32)
        x = gate / (1 + tl.exp(-gate)) * up
    else:
        x = tl.load(x_ptr + row * K + column, mask=column < K, other=0.0).to(tl.float32)
    if HAS_SCALES:
        x = x / tl.load(scales_ptr + column, mask=column < K, other=1.0).to(tl.float32)
    return x
