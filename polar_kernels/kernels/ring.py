"""A ring of slots in shared memory for chunks of quantised activations, copied there ahead of their use.

A chunk is ROWS rows of x by one 128-block: ROWS * 128 bytes of int8 in the order that wgmma's 128-byte swizzle expects,
then ROWS pairs (offset, scale) of fp32. Every thread of the program copies its share. Each slot has two mbarriers:
`full` opens when all copies have landed, `empty` when every warp has released the slot.
"""

import triton
import triton.language as tl

_X_ROW, _PAIR = 128, 8  # bytes
CHUNK_ROW_BYTES = _X_ROW + _PAIR
_PIECE = 16  # bytes a copy


@triton.constexpr_function
def _open_code(rows: int, slots: int, warps: int) -> str:
    """PTX: $0 = address of the ring, its barriers initialised by the thread whose $1 is 0."""
    full = CHUNK_ROW_BYTES * rows * slots
    code = [
        f"{{ .reg .pred p; .shared .align 1024 .b8 ring[{full + 16 * slots}]; mov.u32 $0, ring;",
        "setp.eq.u32 p, $1, 0;",
    ]
    for slot in range(slots):
        code.append(f"@p mbarrier.init.shared::cta.b64 [$0+{full + 8 * slot}], {32 * warps};")
        code.append(f"@p mbarrier.init.shared::cta.b64 [$0+{full + 8 * (slots + slot)}], {warps};")
    code.append("bar.sync 0; }")
    return " ".join(code)


@triton.constexpr_function
def _fill_code(rows: int, slots: int, warps: int, wait: bool) -> str:
    """PTX: where $1 is not 0, fill slot $3 of the ring at $2 from $5, once its chunk of parity $4 is released.

    $6: the thread.
    """
    pairs = _X_ROW * rows * slots
    full = CHUNK_ROW_BYTES * rows * slots
    code = [
        "{ .reg .pred p, done; .reg .b32 bar, to; .reg .b64 from; setp.eq.u32 p, $1, 0; @p bra past;",
        f"mad.lo.u32 bar, $3, 8, $2; add.u32 bar, bar, {full};",
    ]
    if wait:
        code.append(
            f"again: mbarrier.try_wait.parity.shared::cta.b64 done, [bar+{8 * slots}], $4; @!done bra again;"
        )
    code.append(f"mul.wide.u32 from, $6, {_PIECE}; add.u64 from, from, $5;")
    code.append(f"mad.lo.u32 to, $3, {_X_ROW * rows}, $2; mad.lo.u32 to, $6, {_PIECE}, to;")
    copy = "cp.async.cg.shared.global"
    pieces, threads = _X_ROW * rows // _PIECE, 32 * warps
    if pieces < threads:
        code.append(f"setp.lt.u32 p, $6, {pieces}; @p {copy} [to], [from], {_PIECE};")
    for first in range(0, pieces - threads + 1, threads):
        code.append(f"{copy} [to+{first * _PIECE}], [from+{first * _PIECE}], {_PIECE};")
    code.append(f"mad.lo.u32 to, $3, {_PAIR * rows}, $2; mad.lo.u32 to, $6, {_PIECE}, to;")
    code.append(f"setp.lt.u32 p, $6, {_PAIR * rows // _PIECE};")
    code.append(f"@p {copy} [to+{pairs}], [from+{_X_ROW * rows}], {_PIECE};")
    code.append("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [bar]; past: mov.b32 $0, 0; }")
    return " ".join(code)


@triton.constexpr_function
def _wait_code(rows: int, slots: int) -> str:
    """PTX: wait until slot $2 of the ring at $1 is full for the time of parity $3; $0 = the address of its x."""
    return (
        f"{{ .reg .pred done; .reg .b32 bar; mad.lo.u32 bar, $2, 8, $1; add.u32 bar, bar, {CHUNK_ROW_BYTES * rows * slots};"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [bar], $3; @!done bra again;"
        f"fence.proxy.async.shared::cta; mad.lo.u32 $0, $2, {_X_ROW * rows}, $1; }}"
    )


@triton.constexpr_function
def _release_code(rows: int, slots: int) -> str:
    """PTX: this warp has done with slot $2 of the ring at $1; $3: its lane."""
    return (
        "{ .reg .pred p; .reg .b32 bar; bar.warp.sync 0xffffffff; setp.eq.u32 p, $3, 0;"
        f"mad.lo.u32 bar, $2, 8, $1; add.u32 bar, bar, {CHUNK_ROW_BYTES * rows * slots + 8 * slots};"
        "@p mbarrier.arrive.shared::cta.b64 _, [bar]; mov.b32 $0, 0; }"
    )


@triton.constexpr_function
def _add_code(rows: int, slots: int, group: int) -> str:
    """PTX: four sums $0..$3 plus the products $8..$11 of `group`'s 8 rows of x, scaled.

    $12, $13: the norms of a thread's two rows of the weight; $14: the ring, $15: the slot, $16: the byte of a pair.
    """
    code = [
        "{ .reg .b32 at; .reg .f32 offset<2>, scale<2>, product, factor;",
        f"mad.lo.u32 at, $15, {_PAIR * rows}, $14; add.u32 at, at, $16;",
        f"ld.shared.v4.f32 {{offset0, scale0, offset1, scale1}}, [at+{_X_ROW * slots * rows + 8 * _PAIR * group}];",
    ]
    for i in range(4):
        code.append(
            f"add.f32 product, ${8 + i}, offset{i % 2}; mul.f32 factor, ${12 + i // 2}, scale{i % 2};"
            f"fma.rn.f32 ${i}, product, factor, ${i};"
        )
    return " ".join(code) + " }"


@triton.jit
def open_ring(thread, ROWS: tl.constexpr, SLOTS: tl.constexpr, WARPS: tl.constexpr):
    """Shared memory for SLOTS chunks: its address. All threads of the program together."""
    return tl.inline_asm_elementwise(_open_code(ROWS, SLOTS, WARPS), "=&r,r", [thread], tl.int32, False, 1)


@triton.jit
def fill_slot(
    ring, slot, parity, fill, source, thread,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, WARPS: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Start copying the chunk at `source` into a slot, where `fill` is not 0, the same for all threads.

    WAIT: until the slot's chunk of the given parity has been released by all warps.
    """
    values = [fill, ring, slot, parity, source, thread]
    tl.inline_asm_elementwise(_fill_code(ROWS, SLOTS, WARPS, WAIT), "=r,r,r,r,r,l,r", values, tl.int32, False, 1)


@triton.jit
def wait_for_slot(ring, slot, parity, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """The address of a slot's x, once it is there."""
    return tl.inline_asm_elementwise(_wait_code(ROWS, SLOTS), "=r,r,r,r", [ring, slot, parity], tl.int32, False, 1)


@triton.jit
def release_slot(ring, slot, lane, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    tl.inline_asm_elementwise(_release_code(ROWS, SLOTS), "=r,r,r,r", [ring, slot, lane], tl.int32, False, 1)


@triton.jit
def add_scaled(
    sums, at: tl.constexpr, products, group: tl.constexpr, n0, n1, ring, slot, byte,
    ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Sums `at`.. at + 3 plus a group's four products, times the norms and the scales in the slot's pairs.

    One block of assembly, so that a sum stays in its register and no other value lives long.
    """
    return tl.inline_asm_elementwise(
        _add_code(ROWS, SLOTS, group),
        "=f,=f,=f,=f,0,1,2,3,r,r,r,r,f,f,r,r,r",
        [
            sums[at], sums[at + 1], sums[at + 2], sums[at + 3],
            products[4 * group], products[4 * group + 1], products[4 * group + 2], products[4 * group + 3],
            n0, n1, ring, slot, byte,
        ],
        (tl.float32, tl.float32, tl.float32, tl.float32),
        False,
        1,
    )  # fmt: skip
