"""Rings of slots in shared memory for chunks of int8, copied there ahead of their use.

A chunk is one 128-block of some rows, in the order that wgmma's swizzle of 128 bytes expects. Activations, SCALED, have
a scale of fp32 for each of those rows after that, then one over each scale. One thread starts a chunk's copies. Each
slot has two mbarriers: `full` opens when they have landed, `empty` when every warp has released the slot. In a ring,
all slots' rows come first, then all scales, then the barriers.
"""

import triton
import triton.language as tl

ROW_BYTES, SCALE_BYTES = 128, 8  # of a row in a chunk; a scale and its inverse


@triton.constexpr_function
def chunk_words(rows: int) -> int:
    """int32 words of a chunk of so many rows of activations, a multiple of 8."""
    return rows * (ROW_BYTES + SCALE_BYTES) // 4


@triton.constexpr_function
def choose_slots(rows: int, products: int, shared_bytes: int, unrolled: int) -> int:
    """How many slots of activations: as many as fit, or where a loop is unrolled so many that it knows its slots."""
    fitting = shared_bytes // ring_bytes(rows, 1)
    if unrolled == 1:
        return fitting
    return max(slots for slots in range(1, fitting + 1) if unrolled * products % slots == 0)


@triton.constexpr_function
def ring_bytes(rows: int, slots: int, scaled: bool = True) -> int:
    return _barriers(rows, slots, scaled) + 16 * slots


@triton.constexpr_function
def _barriers(rows: int, slots: int, scaled: bool) -> int:
    return slots * rows * (ROW_BYTES + (SCALE_BYTES if scaled else 0))


@triton.constexpr_function
def _open_code(rows: int, slots: int, warps: int, scaled: bool) -> str:
    """PTX: the barriers of the ring at $1 initialised by the thread whose $2 is 0; $0 = its address."""
    full = _barriers(rows, slots, scaled)
    code = ["{ .reg .pred p; mov.u32 $0, $1; setp.eq.u32 p, $2, 0;"]
    for slot in range(slots):
        code.append(f"@p mbarrier.init.shared::cta.b64 [$0+{full + 8 * slot}], 1;")
        code.append(f"@p mbarrier.init.shared::cta.b64 [$0+{full + 8 * (slots + slot)}], {warps};")
    code.append("fence.proxy.async.shared::cta; bar.sync 0; }")
    return " ".join(code)


@triton.constexpr_function
def _fill_code(rows: int, slots: int, wait: bool, scaled: bool) -> str:
    """PTX: where $1 is not 0, fill slot $3 of the ring at $2 from $5, once its chunk of parity $4 is released."""
    full = _barriers(rows, slots, scaled)
    until_empty = (
        f"again: mbarrier.try_wait.parity.shared::cta.b64 done, [bar+{8 * slots}], $4; @!done bra again;"
        if wait
        else ""
    )
    row_bytes, scale_bytes = rows * ROW_BYTES, rows * SCALE_BYTES if scaled else 0
    copy = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    copy_scales = (
        f"mad.lo.u32 to, $3, {scale_bytes}, $2; add.u32 to, to, {slots * row_bytes}; add.u64 from, $5, {row_bytes};"
        f"{copy} [to], [from], {scale_bytes}, [bar];"
        if scaled
        else ""
    )
    return (
        "{ .reg .pred p, done; .reg .b32 bar, to; .reg .b64 from; setp.eq.u32 p, $1, 0; @p bra past;"
        f"mad.lo.u32 bar, $3, 8, $2; add.u32 bar, bar, {full}; {until_empty}"
        f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], {row_bytes + scale_bytes};"
        f"mad.lo.u32 to, $3, {row_bytes}, $2; {copy} [to], [$5], {row_bytes}, [bar]; {copy_scales}"
        "past: bar.warp.sync 0xffffffff; mov.b32 $0, 0; }"
    )


@triton.constexpr_function
def _wait_code(rows: int, slots: int, scaled: bool) -> str:
    """PTX: wait until slot $2 of the ring at $1 is full for the time of parity $3; $0 = the address of its rows."""
    return (
        "{ .reg .pred done; .reg .b32 bar;"
        f"mad.lo.u32 bar, $2, 8, $1; add.u32 bar, bar, {_barriers(rows, slots, scaled)};"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [bar], $3; @!done bra again;"
        f"mad.lo.u32 $0, $2, {rows * ROW_BYTES}, $1; }}"
    )


@triton.constexpr_function
def _release_code(rows: int, slots: int, scaled: bool) -> str:
    """PTX: this warp has done with slot $2 of the ring at $1; $3: its lane."""
    return (
        "{ .reg .pred p; .reg .b32 bar; bar.warp.sync 0xffffffff; setp.eq.u32 p, $3, 0;"
        f"mad.lo.u32 bar, $2, 8, $1; add.u32 bar, bar, {_barriers(rows, slots, scaled) + 8 * slots};"
        "@p mbarrier.arrive.shared::cta.b64 _, [bar]; mov.b32 $0, 0; }"
    )


@triton.constexpr_function
def _load_scales_code(rows: int, group: int, inverse: bool) -> str:
    return f"ld.shared.v2.f32 {{$0, $1}}, [$2+{4 * (8 * group + (rows if inverse else 0))}];"


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
def shared_memory(thread):
    """The address of what `reserve_shared` reserved."""
    return tl.inline_asm_elementwise("mov.u32 $0, global_smem; // $1", "=r,r", [thread], tl.int32, True, 1)


@triton.jit
def open_ring(ring, thread, ROWS: tl.constexpr, SLOTS: tl.constexpr, WARPS: tl.constexpr, SCALED: tl.constexpr = True):
    """The ring at an address of shared memory, its barriers made. All threads of the program together."""
    code: tl.constexpr = _open_code(ROWS, SLOTS, WARPS, SCALED)
    return tl.inline_asm_elementwise(code, "=&r,r,r", [ring, thread], tl.int32, False, 1)


@triton.jit
def fill_slot(
    ring,
    slot,
    parity,
    copies,
    source,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    WAIT: tl.constexpr,
    SCALED: tl.constexpr = True,
):
    """Start copying the chunk at `source` into a slot. copies: not 0 in the thread that is to do it, if any.

    WAIT: until the slot's chunk of the given parity has been released by all warps.
    """
    code: tl.constexpr = _fill_code(ROWS, SLOTS, WAIT, SCALED)
    tl.inline_asm_elementwise(code, "=r,r,r,r,r,l", [copies, ring, slot, parity, source], tl.int32, False, 1)


@triton.jit
def wait_for_slot(ring, slot, parity, ROWS: tl.constexpr, SLOTS: tl.constexpr, SCALED: tl.constexpr = True):
    """The address of a slot's rows, once they are there."""
    code: tl.constexpr = _wait_code(ROWS, SLOTS, SCALED)
    return tl.inline_asm_elementwise(code, "=r,r,r,r", [ring, slot, parity], tl.int32, False, 1)


@triton.jit
def release_slot(ring, slot, lane, ROWS: tl.constexpr, SLOTS: tl.constexpr, SCALED: tl.constexpr = True):
    code: tl.constexpr = _release_code(ROWS, SLOTS, SCALED)
    tl.inline_asm_elementwise(code, "=r,r,r,r", [ring, slot, lane], tl.int32, False, 1)


@triton.jit
def scales_of(ring, q, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """The address, in the first slot, of the scales of rows 2 q and the next."""
    return ring + SLOTS * ROWS * 128 + q * 8


@triton.jit
def load_scales(first_scales, slot, group: tl.constexpr, ROWS: tl.constexpr, INVERSE: tl.constexpr):
    """The scales of rows 8 group + 2 q and the next of a slot's chunk, or one over them; first_scales: see there."""
    return tl.inline_asm_elementwise(
        _load_scales_code(ROWS, group, INVERSE),
        "=f,=f,r",
        [first_scales + slot * (ROWS * 8)],
        (tl.float32, tl.float32),
        False,
        1,
    )


@triton.jit
def next_slot(slot, parity, SLOTS: tl.constexpr):
    last = slot == SLOTS - 1
    return tl.where(last, 0, slot + 1), tl.where(last, parity ^ 1, parity)
