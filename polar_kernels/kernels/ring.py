"""A ring of slots in shared memory for chunks of quantised activations, copied there ahead of their use.

A chunk is 64 rows of x by one 128-block: 64 * 128 bytes of int8 in the order that wgmma's 128-byte swizzle expects,
then 64 pairs (offset, scale) of fp32. One thread starts one bulk copy a chunk. Each slot has two mbarriers: `full`
opens when the copy has landed, `empty` when every warp has released the slot.
"""

import triton
import triton.language as tl

CHUNK_ROWS = 64
_X, _PAIR = 128 * CHUNK_ROWS, 8  # bytes of x, and of a row's pair
CHUNK_BYTES = _X + _PAIR * CHUNK_ROWS
_ALIGNMENT = 1024  # of x in a slot: the swizzle's period
_STRIDE = -(-CHUNK_BYTES // _ALIGNMENT) * _ALIGNMENT  # from one slot to the next


@triton.constexpr_function
def _open_code(slots: int, warps: int) -> str:
    """PTX: $0 = address of the ring, its barriers initialised by the thread whose $1 is 0."""
    full = _STRIDE * slots
    code = [
        f"{{ .reg .pred p; .shared .align {_ALIGNMENT} .b8 ring[{full + 16 * slots}]; mov.u32 $0, ring;",
        "setp.eq.u32 p, $1, 0;",
    ]
    for slot in range(slots):
        code.append(f"@p mbarrier.init.shared::cta.b64 [$0+{full + 8 * slot}], 1;")
        code.append(f"@p mbarrier.init.shared::cta.b64 [$0+{full + 8 * (slots + slot)}], {warps};")
    code.append("fence.proxy.async.shared::cta; bar.sync 0; }")
    return " ".join(code)


@triton.constexpr_function
def _fill_code(slots: int, wait: bool) -> str:
    """PTX: where $1 is not 0, fill slot $3 of the ring at $2 from $5, once its chunk of parity $4 is released."""
    until_empty = (
        f"again: mbarrier.try_wait.parity.shared::cta.b64 done, [bar+{8 * slots}], $4; @!done bra again;"
        if wait
        else ""
    )
    return (
        "{ .reg .pred p, done; .reg .b32 bar, to; setp.eq.u32 p, $1, 0; @p bra past;"
        f"mad.lo.u32 bar, $3, 8, $2; add.u32 bar, bar, {_STRIDE * slots}; {until_empty}"
        f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], {CHUNK_BYTES}; mad.lo.u32 to, $3, {_STRIDE}, $2;"
        f"cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [to], [$5], {CHUNK_BYTES}, [bar];"
        "past: bar.warp.sync 0xffffffff; mov.b32 $0, 0; }"
    )


@triton.constexpr_function
def _wait_code(slots: int) -> str:
    """PTX: wait until slot $2 of the ring at $1 is full for the time of parity $3; $0 = the address of its x."""
    return (
        f"{{ .reg .pred done; .reg .b32 bar; mad.lo.u32 bar, $2, 8, $1; add.u32 bar, bar, {_STRIDE * slots};"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [bar], $3; @!done bra again;"
        f"mad.lo.u32 $0, $2, {_STRIDE}, $1; }}"
    )


@triton.constexpr_function
def _release_code(slots: int) -> str:
    """PTX: this warp has done with slot $2 of the ring at $1; $3: its lane."""
    return (
        "{ .reg .pred p; .reg .b32 bar; bar.warp.sync 0xffffffff; setp.eq.u32 p, $3, 0;"
        f"mad.lo.u32 bar, $2, 8, $1; add.u32 bar, bar, {(_STRIDE + 8) * slots};"
        "@p mbarrier.arrive.shared::cta.b64 _, [bar]; mov.b32 $0, 0; }"
    )


@triton.constexpr_function
def _add_code(group: int) -> str:
    """PTX: four sums $0..$3 plus the products $8..$11 of `group`'s 8 rows of x, scaled.

    $12, $13: the norms of a thread's two rows of the weight; $14: the address of the chunk, $15: the byte of a pair.
    """
    pair = _X + 8 * _PAIR * group
    code = [
        "{ .reg .b32 at; .reg .f32 offset<2>, scale<2>, product, factor; add.u32 at, $14, $15;",
        f"ld.shared.v4.f32 {{offset0, scale0, offset1, scale1}}, [at+{pair}];",
    ]
    for i in range(4):
        code.append(
            f"add.f32 product, ${8 + i}, offset{i % 2}; mul.f32 factor, ${12 + i // 2}, scale{i % 2};"
            f"fma.rn.f32 ${i}, product, factor, ${i};"
        )
    return " ".join(code) + " }"


@triton.jit
def open_ring(thread, SLOTS: tl.constexpr, WARPS: tl.constexpr):
    """Shared memory for SLOTS chunks: its address. All threads of the program together."""
    return tl.inline_asm_elementwise(_open_code(SLOTS, WARPS), "=&r,r", [thread], tl.int32, False, 1)


@triton.jit
def fill_slot(ring, slot, parity, copies, source, SLOTS: tl.constexpr, WAIT: tl.constexpr):
    """Start copying the chunk at `source` into a slot. copies: not 0 in the thread that is to do it, if any.

    WAIT: until the slot's chunk of the given parity has been released by all warps.
    """
    values = [copies, ring, slot, parity, source]
    tl.inline_asm_elementwise(_fill_code(SLOTS, WAIT), "=r,r,r,r,r,l", values, tl.int32, False, 1)


@triton.jit
def wait_for_slot(ring, slot, parity, SLOTS: tl.constexpr):
    """The address of a slot's chunk, once it is there."""
    return tl.inline_asm_elementwise(_wait_code(SLOTS), "=r,r,r,r", [ring, slot, parity], tl.int32, False, 1)


@triton.jit
def release_slot(ring, slot, lane, SLOTS: tl.constexpr):
    tl.inline_asm_elementwise(_release_code(SLOTS), "=r,r,r,r", [ring, slot, lane], tl.int32, False, 1)


@triton.jit
def add_scaled(sums, at: tl.constexpr, products, group: tl.constexpr, n0, n1, chunk, byte):
    """Sums `at`.. at + 3 plus a group's four products, times the norms and the scales in the chunk's pairs.

    One block of assembly, so that a sum stays in its register and no other value lives long.
    """
    return tl.inline_asm_elementwise(
        _add_code(group),
        "=f,=f,=f,=f,0,1,2,3,r,r,r,r,f,f,r,r",
        [
            sums[at], sums[at + 1], sums[at + 2], sums[at + 3],
            products[4 * group], products[4 * group + 1], products[4 * group + 2], products[4 * group + 3],
            n0, n1, chunk, byte,
        ],
        (tl.float32, tl.float32, tl.float32, tl.float32),
        False,
        1,
    )  # fmt: skip
