"""Levels of a row of the weight in which its norms are worked in, so that several blocks can be added up in integers.

Four blocks share a scale, the largest of their norms. A block looks up its levels times its own norm over the largest,
rounded to int8, among the tables PART_LEVELS of `tiles.level_table`.
"""

import triton
import triton.language as tl

from polar_kernels.kernels.ptx import load_shared
from polar_kernels.kernels.tile_access import norm_of
from polar_kernels.kernels.wgmma_forms import SCALE_BLOCKS
from polar_kernels.tiles import PARTS

_SHARE = tl.constexpr(SCALE_BLOCKS)
_ROUND = 0x4B400000  # 1.5 * 2^23, adding which leaves an integer in a float's low bits
_ROUND_BITS = tl.constexpr(_ROUND)
_LARGEST = tl.constexpr("{ .reg .b32 a, b; max.NaN.f16x2 a, $1, $2; max.NaN.f16x2 b, $3, $4; max.NaN.f16x2 $0, a, b; }")
_INVERT = tl.constexpr("rcp.approx.ftz.f32 $0, $1;")
# A part that is NaN becomes zero.
_PART = tl.constexpr(
    "{ .reg .f32 part; mul.sat.f32 part, $1, $2;"
    f"fma.rn.f32 part, part, {PARTS}.0, 0f{_ROUND:08X}; mov.b32 $0, part; }}"
)


@triton.jit
def load_norms(norms_ptr, further, count):
    """The words of two fp16 norms of four tiles from the one that comes so many later on, zeros from `count` on."""
    words = ()
    for tile in tl.static_range(_SHARE):
        words = words + (tl.load(norms_ptr + (further + tile) * 16, mask=further + tile < count, other=0),)
    return words


@triton.jit
def largest_norms(words):
    """Of two rows the largest norm of four blocks, and one over it."""
    word = tl.inline_asm_elementwise(_LARGEST, "=r,r,r,r,r", list(words), tl.int32, True, 1)
    n0 = norm_of(word, 0)
    n1 = norm_of(word, 16)
    return n0, n1, _invert(n0), _invert(n1)


@triton.jit
def _invert(x):
    return tl.inline_asm_elementwise(_INVERT, "=f,f", [x], tl.float32, True, 1)


@triton.jit
def load_part_levels(tables, word, shift: tl.constexpr, inverse):
    """The table of levels times one of the norms in a word, over the largest; inverse: one over that; tables: the
    address of PART_LEVELS in shared memory."""
    part = tl.inline_asm_elementwise(_PART, "=r,f,f", [norm_of(word, shift), inverse], tl.int32, True, 1)
    return load_shared(tables + (part - _ROUND_BITS) * 16)
