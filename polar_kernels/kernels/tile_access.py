"""How a lane reads its part of a tile, or of half a tile: planes of four words, and the norms of its rows.

WIDTH: planes of a tile, 5, or 4 where the signs are in the planes of magnitudes; those stand in for the fifth then.
"""

import triton
import triton.language as tl

from polar_kernels.kernels.ptx import load_stream, load_stream_two
from polar_kernels.tiles import PLANE_WORDS

_PLANE_WORDS = tl.constexpr(PLANE_WORDS)


@triton.jit
def load_tile(tiles_ptr, tile, lane, WIDTH: tl.constexpr):
    """The four planes of magnitudes and the one of signs, four words each; tile: its number."""
    plane = tiles_ptr + tile.to(tl.int64) * (_PLANE_WORDS * WIDTH) + lane * 4
    first = load_stream(plane)
    signs = first
    if WIDTH == 5:
        signs = load_stream(plane + 4 * _PLANE_WORDS)
    return (
        first,
        load_stream(plane + _PLANE_WORDS),
        load_stream(plane + 2 * _PLANE_WORDS),
        load_stream(plane + 3 * _PLANE_WORDS),
        signs,
    )


@triton.jit
def load_half_tile(tiles_ptr, tile, half, lane, WIDTH: tl.constexpr):
    """16 rows of a tile, the first or the second: two planes of magnitudes and two words of signs."""
    start = tiles_ptr + tile.to(tl.int64) * (_PLANE_WORDS * WIDTH) + lane * 4
    first = load_stream(start + half * (2 * _PLANE_WORDS))
    second = load_stream(start + half * (2 * _PLANE_WORDS) + _PLANE_WORDS)
    signs = (first[0], first[1])
    if WIDTH == 5:
        signs = load_stream_two(start + 4 * _PLANE_WORDS + half * 2)
    return first, second, signs


@triton.jit
def load_part(tiles_ptr, tile, half, lane, HALVES: tl.constexpr, WIDTH: tl.constexpr):
    """A program's part of a tile, of which HALVES share it: all of it, or the given half."""
    if HALVES == 2:
        return load_half_tile(tiles_ptr, tile, half, lane, WIDTH)
    else:
        return load_tile(tiles_ptr, tile, lane, WIDTH)


@triton.jit
def half_of(part, number: tl.constexpr, HALVES: tl.constexpr):
    """16 of a part's rows: two planes of magnitudes, and two words of signs."""
    signs = part[4 // HALVES]
    return part[2 * number], part[2 * number + 1], signs[2 * number], signs[2 * number + 1]


@triton.jit
def norms_of_part(norms_ptr, tile, half, lane, HALVES: tl.constexpr):
    """Where a lane's norms of a part are, in one word. norms_ptr: int64, or int32 of halves."""
    if HALVES == 2:
        return norms_ptr + tile.to(tl.int64) * 16 + lane // 4 * 2 + half
    else:
        return norms_ptr + tile.to(tl.int64) * 8 + lane // 4


@triton.jit
def norm_of(word, shift: tl.constexpr):
    """One of the fp16 norms in a word, as fp32; shift: its lowest bit."""
    return ((word >> shift) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
