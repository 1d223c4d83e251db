"""A ring of slots in shared memory for chunks of quantised activations, copied there ahead of their use.

A chunk is one 128-block of some rows of x, int8 in the order that wgmma's swizzle of 128 bytes expects, and then a
scale of fp32 for each of those rows. One thread starts the copies of a chunk. Each slot has two mbarriers: `full` opens
when they have landed, `empty` when every warp has released the slot. In the ring, all slots' x come first, then all
scales, then the barriers.
"""

import triton
import triton.language as tl

ROW_BYTES, SCALE_BYTES = 128, 4  # of a row of x in a chunk


@triton.constexpr_function
def chunk_words(rows: int) -> int:
    """int32 words of a chunk of so many rows, a multiple of 8."""
    return rows * (ROW_BYTES + SCALE_BYTES) // 4


@triton.constexpr_function
def choose_slots(rows: int, shared_bytes: int) -> int:
    """How many slots fit."""
    return shared_bytes // (rows * (ROW_BYTES + SCALE_BYTES) + 16)


@triton.constexpr_function
def _barriers(rows: int, slots: int) -> int:
    return slots * rows * (ROW_BYTES + SCALE_BYTES)


@triton.constexpr_function
def _open_code(rows: int, slots: int, warps: int) -> str:
    """PTX: $0 = address of the ring, its barriers initialised by the thread whose $1 is 0."""
    full = _barriers(rows, slots)
    code = ["{ .reg .pred p; mov.u32 $0, global_smem; setp.eq.u32 p, $1, 0;"]
    for slot in range(slots):
        code.append(f"@p mbarrier.init.shared::cta.b64 [$0+{full + 8 * slot}], 1;")
        code.append(f"@p mbarrier.init.shared::cta.b64 [$0+{full + 8 * (slots + slot)}], {warps};")
    code.append("fence.proxy.async.shared::cta; bar.sync 0; }")
    return " ".join(code)


@triton.constexpr_function
def _fill_code(rows: int, slots: int, wait: bool) -> str:
    """PTX: where $1 is not 0, fill slot $3 of the ring at $2 from $5, once its chunk of parity $4 is released."""
    until_empty = (
        f"again: mbarrier.try_wait.parity.shared::cta.b64 done, [bar+{8 * slots}], $4; @!done bra again;"
        if wait
        else ""
    )
    x_bytes, scale_bytes = rows * ROW_BYTES, rows * SCALE_BYTES
    copy = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    return (
        "{ .reg .pred p, done; .reg .b32 bar, to; .reg .b64 from; setp.eq.u32 p, $1, 0; @p bra past;"
        f"mad.lo.u32 bar, $3, 8, $2; add.u32 bar, bar, {_barriers(rows, slots)}; {until_empty}"
        f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], {x_bytes + scale_bytes};"
        f"mad.lo.u32 to, $3, {x_bytes}, $2; {copy} [to], [$5], {x_bytes}, [bar];"
        f"mad.lo.u32 to, $3, {scale_bytes}, $2; add.u32 to, to, {slots * x_bytes}; add.u64 from, $5, {x_bytes};"
        f"{copy} [to], [from], {scale_bytes}, [bar];"
        "past: bar.warp.sync 0xffffffff; mov.b32 $0, 0; }"
    )


@triton.constexpr_function
def _wait_code(rows: int, slots: int) -> str:
    """PTX: wait until slot $2 of the ring at $1 is full for the time of parity $3; $0 = the address of its x."""
    return (
        f"{{ .reg .pred done; .reg .b32 bar; mad.lo.u32 bar, $2, 8, $1; add.u32 bar, bar, {_barriers(rows, slots)};"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [bar], $3; @!done bra again;"
        f"mad.lo.u32 $0, $2, {rows * ROW_BYTES}, $1; }}"
    )


@triton.constexpr_function
def _release_code(rows: int, slots: int) -> str:
    """PTX: this warp has done with slot $2 of the ring at $1; $3: its lane."""
    return (
        "{ .reg .pred p; .reg .b32 bar; bar.warp.sync 0xffffffff; setp.eq.u32 p, $3, 0;"
        f"mad.lo.u32 bar, $2, 8, $1; add.u32 bar, bar, {_barriers(rows, slots) + 8 * slots};"
        "@p mbarrier.arrive.shared::cta.b64 _, [bar]; mov.b32 $0, 0; }"
    )


@triton.constexpr_function
def _load_scales_code(group: int) -> str:
    return f"ld.shared.v2.f32 {{$0, $1}}, [$2+{8 * SCALE_BYTES * group}];"


@triton.jit
def reserve_shared(pointer, never, thread, BYTES: tl.constexpr):
    """Make Triton launch the kernel with BYTES of shared memory, a power of two, at `global_smem`, all ours.

    never: false, which the compiler must not know. Triton has no words for plain shared memory, and assembly may
    declare 48 KB at the most; but a gather over several warps goes through as much as its source has.
    """
    if never:
        source = tl.full((BYTES // 4,), 0, tl.int32) + tl.load(pointer)
        tl.store(pointer + thread, tl.gather(source, thread, 0))


@triton.jit
def open_ring(thread, ROWS: tl.constexpr, SLOTS: tl.constexpr, WARPS: tl.constexpr):
    """The address of the ring, its barriers made. All threads of the program together."""
    return tl.inline_asm_elementwise(_open_code(ROWS, SLOTS, WARPS), "=&r,r", [thread], tl.int32, False, 1)


@triton.jit
def fill_slot(ring, slot, parity, copies, source, ROWS: tl.constexpr, SLOTS: tl.constexpr, WAIT: tl.constexpr):
    """Start copying the chunk at `source` into a slot. copies: not 0 in the thread that is to do it, if any.

    WAIT: until the slot's chunk of the given parity has been released by all warps.
    """
    values = [copies, ring, slot, parity, source]
    tl.inline_asm_elementwise(_fill_code(ROWS, SLOTS, WAIT), "=r,r,r,r,r,l", values, tl.int32, False, 1)


@triton.jit
def wait_for_slot(ring, slot, parity, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """The address of a slot's x, once it is there."""
    return tl.inline_asm_elementwise(_wait_code(ROWS, SLOTS), "=r,r,r,r", [ring, slot, parity], tl.int32, False, 1)


@triton.jit
def release_slot(ring, slot, lane, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    tl.inline_asm_elementwise(_release_code(ROWS, SLOTS), "=r,r,r,r", [ring, slot, lane], tl.int32, False, 1)


@triton.jit
def scales_of(ring, q, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """The address, in the first slot, of the scales of rows 2 q and the next."""
    return ring + SLOTS * ROWS * 128 + q * 8


@triton.jit
def load_scales(first_scales, slot, group: tl.constexpr, ROWS: tl.constexpr):
    """The scales of rows 8 group + 2 q and the next of a slot's chunk; first_scales: as `scales_of`."""
    values = [first_scales + slot * (ROWS * 4)]
    return tl.inline_asm_elementwise(_load_scales_code(group), "=f,=f,r", values, (tl.float32, tl.float32), False, 1)


@triton.jit
def next_slot(slot, parity, SLOTS: tl.constexpr):
    last = slot == SLOTS - 1
    return tl.where(last, 0, slot + 1), tl.where(last, parity ^ 1, parity)
