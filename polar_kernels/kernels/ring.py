"""Rings of slots in shared memory for chunks of int8, copied there ahead of their use.

A chunk is one 128-block of some rows, in the order that wgmma's swizzle of 128 bytes expects. Activations, SCALED, have
two fp32 for each of those rows after that, of each two rows their scales and then their halves (`quantize_chunks`).
Four blocks share them, and the last one's chunk has them; what the others have there is not read. One thread starts a
chunk's copies. Each slot has two mbarriers: `full` opens when they have landed, `empty` when every warp has released
the slot. In a ring, all slots' rows come first, then all scales, then the barriers.
"""

import triton
import triton.language as tl

from polar_kernels.kernels.ptx import as_float, load_shared

ROW_BYTES, SCALE_BYTES = 128, 8  # of a row in a chunk; its scale and its half
BULK_COPY = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"


@triton.constexpr_function
def chunk_words(rows: int, scaled: bool = True) -> int:
    """int32 words of a chunk of so many rows, a multiple of 8."""
    return rows * (ROW_BYTES + (SCALE_BYTES if scaled else 0)) // 4


@triton.constexpr_function
def ring_bytes(rows: int, slots: int, scaled: bool = True) -> int:
    return barriers_at(rows, slots, scaled) + 16 * slots


@triton.constexpr_function
def barriers_at(rows: int, slots: int, scaled: bool = True) -> int:
    return slots * 4 * chunk_words(rows, scaled)


@triton.constexpr_function
def _open_code(rows: int, slots: int, warps: int, scaled: bool) -> str:
    """PTX: the barriers of the ring at $1 initialised by the thread whose $2 is 0; $0 = its address."""
    full = barriers_at(rows, slots, scaled)
    code = ["{ .reg .pred p; mov.u32 $0, $1; setp.eq.u32 p, $2, 0;"]
    for slot in range(slots):
        code.append(f"@p mbarrier.init.shared::cta.b64 [$0+{full + 8 * slot}], 1;")
        code.append(f"@p mbarrier.init.shared::cta.b64 [$0+{full + 8 * (slots + slot)}], {warps};")
    code.append("fence.proxy.async.shared::cta; bar.sync 0; }")
    return " ".join(code)


@triton.constexpr_function
def copy_chunk_code(rows: int, slots: int, slot: int | str, ring: str, source: str, scaled: bool, scales: bool) -> str:
    """PTX of one thread: start copying a chunk into a slot, a number or what has it; scales: and its scales."""
    row_bytes, scale_bytes = rows * ROW_BYTES, rows * SCALE_BYTES if scales else 0
    code = (
        f"mad.lo.u32 bar, {slot}, 8, {ring}; add.u32 bar, bar, {barriers_at(rows, slots, scaled)};"
        f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], {row_bytes + scale_bytes};"
        f"mad.lo.u32 to, {slot}, {row_bytes}, {ring}; {BULK_COPY} [to], [{source}], {row_bytes}, [bar];"
    )
    if scales:
        code += (
            f"mad.lo.u32 to, {slot}, {scale_bytes}, {ring}; add.u32 to, to, {slots * row_bytes};"
            f"add.u64 from, {source}, {row_bytes}; {BULK_COPY} [to], [from], {scale_bytes}, [bar];"
        )
    return code


@triton.constexpr_function
def _fill_code(rows: int, slots: int, wait: bool, scaled: bool) -> str:
    """PTX: where $1 is not 0, fill slot $3 of the ring at $2 from $5, once its chunk of parity $4 is released."""
    until_empty = (
        f"mad.lo.u32 bar, $3, 8, $2; add.u32 bar, bar, {barriers_at(rows, slots, scaled) + 8 * slots};"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [bar], $4; @!done bra again;"
        if wait
        else ""
    )
    return (
        "{ .reg .pred p, done; .reg .b32 bar, to; .reg .b64 from; setp.eq.u32 p, $1, 0; @p bra past;"
        f"{until_empty} {copy_chunk_code(rows, slots, '$3', '$2', '$5', scaled, scaled)}"
        "past: bar.warp.sync 0xffffffff; mov.b32 $0, 0; }"
    )


@triton.constexpr_function
def _wait_code(rows: int, slots: int, scaled: bool) -> str:
    """PTX: wait until slot $2 of the ring at $1 is full for the time of parity $3; $0 = the address of its rows."""
    return (
        "{ .reg .pred done; .reg .b32 bar;"
        f"mad.lo.u32 bar, $2, 8, $1; add.u32 bar, bar, {barriers_at(rows, slots, scaled)};"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [bar], $3; @!done bra again;"
        f"mad.lo.u32 $0, $2, {rows * ROW_BYTES}, $1; }}"
    )


@triton.constexpr_function
def _release_code(rows: int, slots: int, scaled: bool) -> str:
    """PTX: this warp has done with slot $2 of the ring at $1; $3: its lane."""
    return (
        "{ .reg .pred p; .reg .b32 bar; bar.warp.sync 0xffffffff; setp.eq.u32 p, $3, 0;"
        f"mad.lo.u32 bar, $2, 8, $1; add.u32 bar, bar, {barriers_at(rows, slots, scaled) + 8 * slots};"
        "@p mbarrier.arrive.shared::cta.b64 _, [bar]; mov.b32 $0, 0; }"
    )


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
    return ring + SLOTS * ROWS * 128 + q * 16


@triton.jit
def load_scales(first_scales, slot, group: tl.constexpr, ROWS: tl.constexpr):
    """The scales of rows 8 group + 2 q and the next of a slot's chunk, and their halves; first_scales: see there."""
    words = load_shared(first_scales + slot * (ROWS * 8), 64 * group)
    return as_float(words[0]), as_float(words[1]), as_float(words[2]), as_float(words[3])


@triton.jit
def next_slot(slot, parity, SLOTS: tl.constexpr):
    last = slot == SLOTS - 1
    return tl.where(last, 0, slot + 1), tl.where(last, parity ^ 1, parity)
