"""What the products of experts share: one tile times 8 rows of x at a time, in int8 or exactly."""

import triton
import triton.language as tl

from polar_kernels.kernels.decode_halves import decode_eight_halves, load_levels
from polar_kernels.kernels.decode_int8 import decode_half_tile
from polar_kernels.kernels.int8_matmul import multiply_half_tile
from polar_kernels.kernels.ptx import as_float, load_cached, mma_halves
from polar_kernels.tiles import BF16_LEVELS, FP16_LEVELS

_FP16_LEVELS, _BF16_LEVELS = tl.constexpr(FP16_LEVELS), tl.constexpr(BF16_LEVELS)


@triton.jit
def load_table(table_ptr, thread, EXACT: tl.constexpr, DTYPE: tl.constexpr):
    """The table a thread decodes with: bytes, or the low and the high bytes of levels in DTYPE."""
    if EXACT:
        LEVELS: tl.constexpr = _BF16_LEVELS if tl.bfloat16 == DTYPE else _FP16_LEVELS
        return load_levels(table_ptr, thread % 32, LEVELS)
    else:
        table = load_cached(table_ptr + thread * 0)
        return table, table


@triton.jit
def load_x(x_ptr, row, blocks, block, q, EXACT: tl.constexpr):
    """A lane's words of one block of a row: two runs of four in int8, four in 16 bits."""
    start = row.to(tl.int64) * blocks + block
    if EXACT:
        words = x_ptr + start * 64 + q * 16
        return load_cached(words), load_cached(words + 4), load_cached(words + 8), load_cached(words + 12)
    else:
        words = x_ptr + start * 32 + q * 8
        return load_cached(words), load_cached(words + 4)


@triton.jit
def load_scale(meta_ptr, rows, row, block):
    """(base, scale) of one block of a row of x; meta_ptr: int64."""
    word = tl.load(meta_ptr + block * rows + row)
    return as_float(word.to(tl.int32)), as_float((word >> 32).to(tl.int32))


@triton.jit
def decode_tile(tile, levels, WIDTH: tl.constexpr):
    """The upper and the lower 16 rows of a tile in int8."""
    upper = decode_half_tile(tile[0], tile[1], tile[4][0], tile[4][1], levels[0], levels[0], WIDTH)
    lower = decode_half_tile(tile[2], tile[3], tile[4][2], tile[4][3], levels[0], levels[0], WIDTH)
    return upper, lower


@triton.jit
def multiply_tile(upper, lower, x):
    """32 rows of the weight times 8 rows of x: eight products a thread, as yet without base and scale."""
    u = multiply_half_tile(upper, x[0], x[1])
    v = multiply_half_tile(lower, x[0], x[1])
    return u[0], u[1], u[2], u[3], v[0], v[1], v[2], v[3]


@triton.jit
def multiply_half_tile_exactly(
    w0, w1, signs0, signs1, low, high, x, WIDTH: tl.constexpr, GROUPS: tl.constexpr, DTYPE: tl.constexpr
):
    """16 rows by 128 columns times GROUPS groups of 8 rows of x: four sums a thread and group."""
    sums = ()
    for _ in tl.static_range(4 * GROUPS):
        sums = sums + (tl.zeros(signs0.shape, tl.float32),)
    for s in tl.static_range(4):
        words = w0 if s < 2 else w1
        u0, u1, u2, u3 = decode_eight_halves(s, words[s % 2 * 2], signs0, low, high, WIDTH)
        v0, v1, v2, v3 = decode_eight_halves(s, words[s % 2 * 2 + 1], signs1, low, high, WIDTH)
        added = ()
        for group in tl.static_range(GROUPS):
            b = x[4 * group + s]
            c = (sums[4 * group], sums[4 * group + 1], sums[4 * group + 2], sums[4 * group + 3])
            c = mma_halves(u0, v0, u1, v1, b[0], b[1], c[0], c[1], c[2], c[3], DTYPE)
            c = mma_halves(u2, v2, u3, v3, b[2], b[3], c[0], c[1], c[2], c[3], DTYPE)
            added = added + (c[0], c[1], c[2], c[3])
        sums = added
    return sums


@triton.jit
def multiply_tile_exactly(tile, levels, x, WIDTH: tl.constexpr, GROUPS: tl.constexpr, DTYPE: tl.constexpr):
    """32 rows of the weight times GROUPS groups of 8 rows of x: four products a group for each 16 of them."""
    low = levels[0]
    high = levels[1]
    upper = multiply_half_tile_exactly(tile[0], tile[1], tile[4][0], tile[4][1], low, high, x, WIDTH, GROUPS, DTYPE)
    lower = multiply_half_tile_exactly(tile[2], tile[3], tile[4][2], tile[4][3], low, high, x, WIDTH, GROUPS, DTYPE)
    return upper, lower
