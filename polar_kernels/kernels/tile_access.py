"""How a lane reads its part of a tile: five planes of four words, and the norms of its four rows; or of half a tile."""

import triton
import triton.language as tl

from polar_kernels.kernels.ptx import load_stream, load_stream_two
from polar_kernels.tiles import TILE_WORDS

_TILE_WORDS = tl.constexpr(TILE_WORDS)
_PLANE_WORDS = tl.constexpr(TILE_WORDS // 5)


@triton.jit
def load_tile(tiles_ptr, tile, lane):
    """The four planes of magnitudes and the one of signs, four words each; tile: its number."""
    plane = tiles_ptr + tile.to(tl.int64) * _TILE_WORDS + lane * 4
    return (
        load_stream(plane),
        load_stream(plane + _PLANE_WORDS),
        load_stream(plane + 2 * _PLANE_WORDS),
        load_stream(plane + 3 * _PLANE_WORDS),
        load_stream(plane + 4 * _PLANE_WORDS),
    )


@triton.jit
def load_half_tile(tiles_ptr, norms_ptr, tile, half, lane):
    """16 rows of a tile, the first or the second: two planes of magnitudes, two words of signs, and one of two norms.

    norms_ptr: int32, two norms a word.
    """
    plane = tiles_ptr + tile.to(tl.int64) * _TILE_WORDS + half * (2 * _PLANE_WORDS) + lane * 4
    signs = tiles_ptr + tile.to(tl.int64) * _TILE_WORDS + 4 * _PLANE_WORDS + lane * 4 + half * 2
    norms = tl.load(norms_ptr + tile.to(tl.int64) * 16 + lane // 4 * 2 + half)
    return load_stream(plane), load_stream(plane + _PLANE_WORDS), load_stream_two(signs), norms


@triton.jit
def norm_of(word, shift: tl.constexpr):
    """One of the fp16 norms in a word, as fp32; shift: its lowest bit."""
    return ((word >> shift) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
