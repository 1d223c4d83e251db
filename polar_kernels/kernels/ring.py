"""A ring of slots in shared memory for chunks of quantised activations, copied there ahead of their use.

A chunk is 8192 bytes of int8 in the order that wgmma's swizzle expects, 64 rows of x by one 128-block or 128 rows by
half of one, then 64 pairs (base, scale) of fp32. One thread starts one bulk copy a chunk. Each slot has two mbarriers:
`full` opens when the copy has landed, `empty` when every warp has released the slot.
"""

import triton
import triton.language as tl

from polar_kernels.kernels.ptx import as_float

CHUNK_PAIRS = 64
CHUNK_X_BYTES, _PAIR = 8192, 8  # of x, and of a row's pair
CHUNK_BYTES = CHUNK_X_BYTES + _PAIR * CHUNK_PAIRS
CHUNK_X = tl.constexpr(CHUNK_X_BYTES)
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


_LOAD_PAIRS = tl.constexpr("ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];")
# Four sums $0..$3 plus the products $8..$11 times the scales and norms: bases $12 and $14, scales $13 and $15 of two
# rows of x, norms $16 and $17 of two rows of the weight.
_ADD_SCALED = tl.constexpr(
    "{ .reg .f32 product;"
    + " ".join(
        f"fma.rn.f32 product, ${8 + i}, ${13 + 2 * (i % 2)}, ${12 + 2 * (i % 2)};"
        f"fma.rn.f32 ${i}, product, ${16 + i // 2}, ${i};"
        for i in range(4)
    )
    + " }"
)


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
def load_pairs(chunk, group: tl.constexpr, q):
    """(base, scale) of rows 8 group + 2 q and the next, of the chunk's 64."""
    address = chunk + CHUNK_X + 64 * group + q * 16
    return tl.inline_asm_elementwise(
        _LOAD_PAIRS, "=f,=f,=f,=f,r", [address], (tl.float32, tl.float32, tl.float32, tl.float32), False, 1
    )


@triton.jit
def add_scaled(sums, products, at: tl.constexpr, pairs, n0, n1):
    """Sums `at`.. at + 3 plus the products of two rows of x and two of the weight, times their scales and norms.

    One block of assembly, so that a sum stays in its register.
    """
    return tl.inline_asm_elementwise(
        _ADD_SCALED,
        "=f,=f,=f,=f,0,1,2,3,f,f,f,f,f,f,f,f,f,f",
        [
            sums[at], sums[at + 1], sums[at + 2], sums[at + 3],
            as_float(products[at]), as_float(products[at + 1]), as_float(products[at + 2]), as_float(products[at + 3]),
            pairs[0], pairs[1], pairs[2], pairs[3],
            n0, n1,
        ],
        (tl.float32, tl.float32, tl.float32, tl.float32),
        False,
        1,
    )  # fmt: skip
