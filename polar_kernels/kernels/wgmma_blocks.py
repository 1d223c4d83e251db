"""A run of blocks of K through `wgmma`: codes decoded to int8 in registers, x from a ring in shared memory (`ring`).

A warpgroup takes 64 rows of the weight. It decodes a block of K, multiplies it by 64 or 128 rows of x at a time, and
turns the integer sums into floats, times the norm of the weight's row and the scale of x's row. Each of these waits for
the one before; several warpgroups of a multiprocessor take turns.
"""

import triton
import triton.language as tl

from polar_kernels.kernels.decode_int8 import decode_half_tile
from polar_kernels.kernels.ptx import hidden_zero, load_cached, wait_for_previous_kernel
from polar_kernels.kernels.ring import (
    choose_slots,
    chunk_words,
    fill_slot,
    load_scales,
    next_slot,
    open_ring,
    release_slot,
    reserve_shared,
    scales_of,
    shared_memory,
    wait_for_slot,
)
from polar_kernels.kernels.tile_access import further_place, half_tile_place, load_half_tile_at, norm_of


def _start_code(rows: int) -> str:
    """PTX: start 64 rows of the weight by one 128-block, 16 registers a thread, times 64 or 128 rows of x.

    $0..: the sums of a thread; then the 16 registers and the address of x in shared memory.
    """
    count = rows // 2
    sums = ", ".join(f"${i}" for i in range(count))
    code = [
        "{ .reg .b32 at; .reg .b64 x; .reg .pred p; setp.ne.b32 p, 0, 0; wgmma.fence.sync.aligned;",
        f"shr.u32 at, ${count + 16}, 4; or.b32 at, at, 0x10000;",
    ]
    for step in range(4):
        a = ", ".join(f"${count + 4 * step + i}" for i in range(4))
        # The descriptor's upper half: bytes from 8 rows to the next, over 16, and the swizzle of 128 bytes.
        code.append("mov.b64 x, {at, 0x40000040};")
        code.append(f"wgmma.mma_async.sync.aligned.m64n{rows}k32.s32.s8.s8 {{{sums}}}, {{{a}}}, x, p;")
        if step == 0:  # the first product is not added to what was there
            code.append("setp.eq.b32 p, 0, 0;")
        code.append("add.u32 at, at, 2;")
    code.append("wgmma.commit_group.sync.aligned; }")
    return " ".join(code)


_START_64, _START_128 = tl.constexpr(_start_code(64)), tl.constexpr(_start_code(128))
_START_64_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 32 + ["r"] * 17))
_START_128_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 64 + ["r"] * 17))
_FINISH_64_CONSTRAINTS = tl.constexpr(",".join(["=r"] * 32 + [str(i) for i in range(32)]))
_FINISH_128_CONSTRAINTS = tl.constexpr(",".join(["=r"] * 64 + [str(i) for i in range(64)]))
_TYPES_64, _TYPES_128 = tl.constexpr((tl.int32,) * 32), tl.constexpr((tl.int32,) * 64)
_FINISH = tl.constexpr("wgmma.wait_group.sync.aligned 0;")
# Four sums $0..$3 plus the integers $8..$11 times the norms of two rows of the weight and, of these, the scales of two
# rows of x.
_ADD_SCALED = tl.constexpr(
    "{ .reg .f32 product, factor;"
    + " ".join(
        f"cvt.rn.f32.s32 product, ${8 + i}; mul.f32 factor, ${12 + i // 2}, ${14 + i % 2};"
        f"fma.rn.f32 ${i}, product, factor, ${i};"
        for i in range(4)
    )
    + " }"
)
_ADD = tl.constexpr(
    "{ .reg .f32 product;"
    + " ".join(f"cvt.rn.f32.s32 product, ${8 + i}; fma.rn.f32 ${i}, product, ${12 + i // 2}, ${i};" for i in range(4))
    + " }"
)


@triton.jit
def _start(a, x, ROWS: tl.constexpr):
    if ROWS == 64:
        return tl.inline_asm_elementwise(_START_64, _START_64_CONSTRAINTS, a + (x,), _TYPES_64, False, 1)
    else:
        return tl.inline_asm_elementwise(_START_128, _START_128_CONSTRAINTS, a + (x,), _TYPES_128, False, 1)


@triton.jit
def _finish(products, ROWS: tl.constexpr):
    """The products, once the tensor cores have written them."""
    if ROWS == 64:
        return tl.inline_asm_elementwise(_FINISH, _FINISH_64_CONSTRAINTS, products, _TYPES_64, False, 1)
    else:
        return tl.inline_asm_elementwise(_FINISH, _FINISH_128_CONSTRAINTS, products, _TYPES_128, False, 1)


@triton.jit
def _add(sums, products, at: tl.constexpr, n0, n1):
    """Sums `at` .. at + 3 plus the products of two rows of x and two of the weight, times the norms of those.

    One block of assembly, so that a sum stays in its register.
    """
    return tl.inline_asm_elementwise(
        _ADD,
        "=f,=f,=f,=f,0,1,2,3,r,r,r,r,f,f",
        [
            sums[at], sums[at + 1], sums[at + 2], sums[at + 3],
            products[at], products[at + 1], products[at + 2], products[at + 3],
            n0, n1,
        ],
        (tl.float32, tl.float32, tl.float32, tl.float32),
        False,
        1,
    )  # fmt: skip


@triton.jit
def add_scaled(sums, products, at: tl.constexpr, n0, n1, scales):
    """Sums `at` .. at + 3 plus the products of two rows of x and two of the weight, times the scales of both."""
    return tl.inline_asm_elementwise(
        _ADD_SCALED,
        "=f,=f,=f,=f,0,1,2,3,r,r,r,r,f,f,f,f",
        [
            sums[at], sums[at + 1], sums[at + 2], sums[at + 3],
            products[at], products[at + 1], products[at + 2], products[at + 3],
            n0, n1, scales[0], scales[1],
        ],
        (tl.float32, tl.float32, tl.float32, tl.float32),
        False,
        1,
    )  # fmt: skip


@triton.jit
def _times_scales(sums, first_scales, slot, ROWS: tl.constexpr, INVERSE: tl.constexpr):
    """Sums of a product times the scales of its rows of x, or divided by them."""
    scaled = ()
    for group in tl.static_range(ROWS // 8):
        s0, s1 = load_scales(first_scales, slot, group, ROWS, INVERSE)
        scaled = scaled + (
            sums[4 * group] * s0,
            sums[4 * group + 1] * s1,
            sums[4 * group + 2] * s0,
            sums[4 * group + 3] * s1,
        )
    return scaled


@triton.jit
def _refill(ring, slot, parity, done, count, source, thread, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """Start copying a later chunk into the slot of some chunks ago, once all warps have left it.

    Of two chunks ago, so that a warpgroup that lags is not waited for; with few slots of the last.
    """
    LATE: tl.constexpr = 2 if SLOTS > 3 else 1
    slot -= LATE
    parity = tl.where(slot < 0, parity ^ 1, parity)
    slot = tl.where(slot < 0, slot + SLOTS, slot)
    later = done - LATE + SLOTS
    copies = ((thread == 0) & (done >= LATE) & (later < count)).to(tl.int32)
    fill_slot(ring, slot, parity, copies, source + later.to(tl.int64) * (4 * chunk_words(ROWS)), ROWS, SLOTS, True)


@triton.jit
def _load_following(place, block: tl.constexpr, more, UNROLLED: tl.constexpr, WIDTH: tl.constexpr):
    """The tile after the one of a block, and the place of the first of the next blocks once it is the last of UNROLLED.
    more: whether there are any; the last tile is followed by itself."""
    if block == UNROLLED - 1:
        place = further_place(place, tl.where(more, UNROLLED, UNROLLED - 1), WIDTH)
        return place, load_half_tile_at(place, WIDTH)
    else:
        return place, load_half_tile_at(further_place(place, block + 1, WIDTH), WIDTH)


@triton.jit
def multiply_bands(
    tiles_ptr,
    norms_ptr,
    table_ptr,
    x_ptr,
    first_chunk,
    first,
    count,
    thread,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    PRODUCTS: tl.constexpr,
    WARPS: tl.constexpr,
    SHARED: tl.constexpr,
    SHARE: tl.constexpr,
    UNROLLED: tl.constexpr,
    LATE: tl.constexpr,
):
    """Two warps a band times the program's rows of x: ROWS / 2 * PRODUCTS sums a thread, as `wgmma_output` has them,
    the halves of the levels left out; q; and the address of SHARED bytes of shared memory.

    first: a thread's first tile, after which come count - 1 more; first_chunk: the number of the program's first chunk.
    Waits for the kernel before, which writes x, and starts to read weights before that. SHARE: how many blocks of a row
    of x, from the first on, have one scale. UNROLLED: so many blocks, 1 or SCALE_BLOCKS, are done without a branch, of
    which count is a multiple. LATE: see `Form`.
    """
    SLOTS: tl.constexpr = choose_slots(ROWS, PRODUCTS, SHARED, UNROLLED)
    SUMS: tl.constexpr = ROWS // 2  # of a product
    reserve_shared(x_ptr, count < 0, thread, SHARED)
    lane = thread % 32
    half = thread // 32 % 2
    place = half_tile_place(tiles_ptr, norms_ptr, first, half, lane, WIDTH)
    tile = load_half_tile_at(place, WIDTH)
    # Of an address that could differ between lanes, so that ptxas keeps the words out of uniform registers.
    table = load_cached(table_ptr + hidden_zero(lane))
    ring = open_ring(shared_memory(thread), thread, ROWS, SLOTS, WARPS)
    # Everything above was there before; x comes from the kernel before this one.
    q = lane % 4 + wait_for_previous_kernel(thread)
    chunks = count * PRODUCTS
    source = x_ptr.to(tl.int64) + first_chunk.to(tl.int64) * (4 * chunk_words(ROWS))
    for filled in tl.static_range(SLOTS):
        copies = ((thread == 0) & (filled < chunks)).to(tl.int32)
        fill_slot(ring, filled, 0, copies, source + filled * (4 * chunk_words(ROWS)), ROWS, SLOTS, False)
    sums = ()
    for _ in tl.static_range(SUMS * PRODUCTS):
        sums = sums + (tl.zeros(lane.shape, tl.float32),)
    first_scales = scales_of(ring, q, ROWS, SLOTS)
    slot = 0
    parity = 0
    for start in range(0, count, UNROLLED):
        for block in tl.static_range(UNROLLED):
            step = start + block
            a = decode_half_tile(tile[0], tile[1], tile[2][0], tile[2][1], table, WIDTH)
            n0 = norm_of(tile[3], 0)
            n1 = norm_of(tile[3], 16)
            if not LATE:
                place, tile = _load_following(place, block, start + UNROLLED < count, UNROLLED, WIDTH)
            added = ()
            for product in tl.static_range(PRODUCTS):
                done = step * PRODUCTS + product
                if (UNROLLED * PRODUCTS) % SLOTS == 0:  # each block has its own slots: known to the compiler
                    slot = start * 0 + (block * PRODUCTS + product) % SLOTS
                    parity = done // SLOTS % 2
                products = _start(a, wait_for_slot(ring, slot, parity, ROWS, SLOTS), ROWS)
                _refill(ring, slot, parity, done, chunks, source, thread, ROWS, SLOTS)
                products = _finish(products, ROWS)
                if LATE and product == PRODUCTS - 1:
                    place, tile = _load_following(place, block, start + UNROLLED < count, UNROLLED, WIDTH)
                own = sums[SUMS * product : SUMS * product + SUMS]
                # Between the first and the last block that share scales, sums are what is to be multiplied by those.
                if SHARE > 1 and block % SHARE == 0 and start % SHARE == 0:
                    own = _times_scales(own, first_scales, slot, ROWS, True)
                new = ()
                for group in tl.static_range(ROWS // 8):
                    if SHARE > 1:
                        new = new + _add(own, products, 4 * group, n0, n1)
                    else:
                        scales = load_scales(first_scales, slot, group, ROWS, False)
                        new = new + add_scaled(own, products, 4 * group, n0, n1, scales)
                if SHARE > 1 and block == UNROLLED - 1 and (step % SHARE == SHARE - 1 or step == count - 1):
                    new = _times_scales(new, first_scales, slot, ROWS, False)
                added = added + new
                release_slot(ring, slot, lane, ROWS, SLOTS)
                if (UNROLLED * PRODUCTS) % SLOTS != 0:
                    slot, parity = next_slot(slot, parity, SLOTS)
            sums = added
    return sums, q, ring
