"""Levels of a row of the weight in which its norms are worked in, so that several blocks can be added up in integers.

Four blocks share a scale, the largest of their norms. A block looks up its levels times its own norm over the largest,
rounded to int8, among the tables PART_LEVELS of `tiles.level_table`.
"""

import triton
import triton.language as tl

from polar_kernels.kernels.ptx import load_shared
from polar_kernels.kernels.ring import BULK_COPY
from polar_kernels.kernels.tile_access import norm_of
from polar_kernels.kernels.tile_ring import wait_code
from polar_kernels.kernels.wgmma_forms import SCALE_BLOCKS
from polar_kernels.tiles import PART_LEVELS, PARTS

_TABLES_BYTES = 16 * (PARTS + 1)
TABLES_BYTES = _TABLES_BYTES + 8  # and a barrier
_SHARE, _BARRIER, _PART_LEVELS = tl.constexpr(SCALE_BLOCKS), tl.constexpr(_TABLES_BYTES), tl.constexpr(PART_LEVELS)
_COPY_TABLES = tl.constexpr(
    "{ .reg .pred p; .reg .b32 bar; setp.ne.u32 p, $2, 0; @p bra past;"
    f"add.u32 bar, $1, {_TABLES_BYTES}; mbarrier.init.shared::cta.b64 [bar], 1; fence.proxy.async.shared::cta;"
    f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], {_TABLES_BYTES};"
    f"{BULK_COPY} [$1], [$3], {_TABLES_BYTES}, [bar]; past: mov.u32 $0, $1; }}"
)
_WAIT = tl.constexpr(wait_code(0))
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
def copy_tables(tables, table_ptr, thread):
    """PART_LEVELS on their way to TABLES_BYTES of shared memory at an address, which is returned. All threads that are
    to wait have to meet before they do."""
    source = table_ptr.to(tl.int64) + 4 * _PART_LEVELS
    return tl.inline_asm_elementwise(_COPY_TABLES, "=&r,r,r,l", [tables, thread, source], tl.int32, False, 1)


@triton.jit
def wait_for_tables(tables):
    tl.inline_asm_elementwise(_WAIT, "=r,r,r", [tables + _BARRIER, tables * 0], tl.int32, False, 1)


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
