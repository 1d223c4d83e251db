"""What the products of experts share: one tile times 8 rows of x at a time, in int8 or exactly."""

import triton
import triton.language as tl

from polar_kernels.kernels.decode_int8 import decode_half_tile
from polar_kernels.kernels.decode_pairs import open_pairs
from polar_kernels.kernels.exact_matmul import multiply_half_tile_exactly
from polar_kernels.kernels.int8_matmul import multiply_half_tile
from polar_kernels.kernels.ptx import as_float, load_cached


@triton.jit
def load_table(table_ptr, thread, EXACT: tl.constexpr, DTYPE: tl.constexpr, THREADS: tl.constexpr):
    """What a thread decodes with: the words of a table of bytes, or the address of one of pairs in DTYPE."""
    if EXACT:
        return open_pairs(table_ptr, thread, DTYPE, THREADS)
    else:
        return load_cached(table_ptr + thread * 0)


@triton.jit
def load_scale(meta_ptr, rows, row, block):
    """(base, scale) of one block of a row of x; meta_ptr: int64."""
    word = tl.load(meta_ptr + block * rows + row)
    return as_float(word.to(tl.int32)), as_float((word >> 32).to(tl.int32))


@triton.jit
def decode_tile(tile, levels, WIDTH: tl.constexpr):
    """The upper and the lower 16 rows of a tile in int8."""
    upper = decode_half_tile(tile[0], tile[1], tile[4][0], tile[4][1], levels, levels, WIDTH)
    lower = decode_half_tile(tile[2], tile[3], tile[4][2], tile[4][3], levels, levels, WIDTH)
    return upper, lower


@triton.jit
def multiply_tile(upper, lower, x):
    """32 rows of the weight times 8 rows of x: eight products a thread, as yet without base and scale."""
    u = multiply_half_tile(upper, x[0], x[1])
    v = multiply_half_tile(lower, x[0], x[1])
    return u[0], u[1], u[2], u[3], v[0], v[1], v[2], v[3]


@triton.jit
def multiply_tile_exactly(tile, pairs, x, WIDTH: tl.constexpr, GROUPS: tl.constexpr, DTYPE: tl.constexpr):
    """32 rows of the weight times GROUPS groups of 8 rows of x: four products a group for each 16 of them."""
    upper = multiply_half_tile_exactly(tile[0], tile[1], tile[4][0], tile[4][1], pairs, x, WIDTH, GROUPS, DTYPE)
    lower = multiply_half_tile_exactly(tile[2], tile[3], tile[4][2], tile[4][3], pairs, x, WIDTH, GROUPS, DTYPE)
    return upper, lower
