"""A run of blocks of K through `wgmma`: codes decoded to int8 in registers, x from a ring in shared memory (`ring`).

A warpgroup takes 64 rows of the weight. Four blocks of K at a time are multiplied by 64 or 128 rows of x and added up
in integers: a row of the weight looks up its levels times its norm of the block over the largest of the four
(`part_levels`). Then the integers become floats, times that largest norm and the scale of x's row. Decoding and
multiplying wait for each other; several warpgroups of a multiprocessor take turns.
"""

import triton
import triton.language as tl

from polar_kernels.kernels.decode_int8 import decode_half_tile
from polar_kernels.kernels.part_levels import (
    TABLES_BYTES,
    copy_tables,
    largest_norms,
    load_norms,
    load_part_levels,
    wait_for_tables,
)
from polar_kernels.kernels.ptx import first_lane
from polar_kernels.kernels.ring import (
    load_scales,
    release_slot,
    ring_bytes,
    scales_of,
    wait_for_slot,
)
from polar_kernels.kernels.tile_ring import (
    chunk_parity,
    lane_places,
    load_ring_tile,
    open_rings,
    refill,
    tile_ring_bytes,
)
from polar_kernels.kernels.wgmma_forms import SCALE_BLOCKS

_SHARE = tl.constexpr(SCALE_BLOCKS)


def _start_code(rows: int, first: bool) -> str:
    """PTX: start 64 rows of the weight by one 128-block, 16 registers a thread, times 64 or 128 rows of x.

    $0..: the sums of a thread, to which they are added unless this is the first; then the 16 registers and the address
    of x in shared memory.
    """
    count = rows // 2
    a_start = count if first else 2 * count
    sums = ", ".join(f"${i}" for i in range(count))
    code = [
        f"{{ .reg .b32 at; .reg .b64 x; .reg .pred p; setp.{'ne' if first else 'eq'}.b32 p, 0, 0;"
        f"wgmma.fence.sync.aligned; shr.u32 at, ${a_start + 16}, 4; or.b32 at, at, 0x10000;",
    ]
    for step in range(4):
        a = ", ".join(f"${a_start + 4 * step + i}" for i in range(4))
        # The descriptor's upper half: bytes from 8 rows to the next, over 16, and the swizzle of 128 bytes.
        code.append("mov.b64 x, {at, 0x40000040};")
        code.append(f"wgmma.mma_async.sync.aligned.m64n{rows}k32.s32.s8.s8 {{{sums}}}, {{{a}}}, x, p;")
        code.append("setp.eq.b32 p, 0, 0; add.u32 at, at, 2;")
    code.append("wgmma.commit_group.sync.aligned; }")
    return " ".join(code)


def _same(count: int) -> list[str]:
    """Constraints: inputs that are in the registers of the outputs."""
    return [str(i) for i in range(count)]


_START_64, _START_128 = tl.constexpr(_start_code(64, True)), tl.constexpr(_start_code(128, True))
_GO_ON_64, _GO_ON_128 = tl.constexpr(_start_code(64, False)), tl.constexpr(_start_code(128, False))
_START_64_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 32 + ["r"] * 17))
_START_128_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 64 + ["r"] * 17))
_GO_ON_64_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 32 + _same(32) + ["r"] * 17))
_GO_ON_128_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 64 + _same(64) + ["r"] * 17))
_FINISH_64_CONSTRAINTS = tl.constexpr(",".join(["=r"] * 32 + _same(32)))
_FINISH_128_CONSTRAINTS = tl.constexpr(",".join(["=r"] * 64 + _same(64)))
_TYPES_64, _TYPES_128 = tl.constexpr((tl.int32,) * 32), tl.constexpr((tl.int32,) * 64)
_FINISH = tl.constexpr("wgmma.wait_group.sync.aligned 0;")
# Four sums $0..$3 plus the integers $8..$11 times the scales of two rows of x, plus their halves, all times the norms
# of two rows of the weight.
_ADD = tl.constexpr(
    "{ .reg .f32 product;"
    + " ".join(
        f"cvt.rn.f32.s32 product, ${8 + i}; fma.rn.f32 product, product, ${14 + i % 2}, ${16 + i % 2};"
        f"fma.rn.f32 ${i}, product, ${12 + i // 2}, ${i};"
        for i in range(4)
    )
    + " }"
)


@triton.jit
def _start(products, a, x, FIRST: tl.constexpr, ROWS: tl.constexpr):
    """The products plus those of a block, or those alone, once they are finished."""
    if ROWS == 64 and FIRST:
        return tl.inline_asm_elementwise(_START_64, _START_64_CONSTRAINTS, a + (x,), _TYPES_64, False, 1)
    elif ROWS == 64:
        return tl.inline_asm_elementwise(_GO_ON_64, _GO_ON_64_CONSTRAINTS, products + a + (x,), _TYPES_64, False, 1)
    elif FIRST:
        return tl.inline_asm_elementwise(_START_128, _START_128_CONSTRAINTS, a + (x,), _TYPES_128, False, 1)
    else:
        return tl.inline_asm_elementwise(_GO_ON_128, _GO_ON_128_CONSTRAINTS, products + a + (x,), _TYPES_128, False, 1)


@triton.jit
def _finish(products, ROWS: tl.constexpr):
    """The products, once the tensor cores have written them."""
    if ROWS == 64:
        return tl.inline_asm_elementwise(_FINISH, _FINISH_64_CONSTRAINTS, products, _TYPES_64, False, 1)
    else:
        return tl.inline_asm_elementwise(_FINISH, _FINISH_128_CONSTRAINTS, products, _TYPES_128, False, 1)


@triton.jit
def add_scaled(sums, products, at: tl.constexpr, n0, n1, scales):
    """Sums `at` .. at + 3 plus the products of two rows of x and two of the weight, times the scales of both.

    scales: as `load_scales` gives them. One block of assembly, so that a sum stays in its register.
    """
    return tl.inline_asm_elementwise(
        _ADD,
        "=f,=f,=f,=f,0,1,2,3,r,r,r,r,f,f,f,f,f,f",
        [
            sums[at], sums[at + 1], sums[at + 2], sums[at + 3],
            products[at], products[at + 1], products[at + 2], products[at + 3],
            n0, n1, scales[0], scales[1], scales[2], scales[3],
        ],
        (tl.float32, tl.float32, tl.float32, tl.float32),
        False,
        1,
    )  # fmt: skip


@triton.constexpr_function
def piece_bytes(rows: int, x_slots: int, width: int, warps: int) -> int:
    """Shared memory that `multiply_bands` takes, in bytes."""
    return -(-(_tables_at(rows, x_slots, width, warps) + TABLES_BYTES) // 1024) * 1024


@triton.constexpr_function
def _tables_at(rows: int, x_slots: int, width: int, warps: int) -> int:
    return -(-(ring_bytes(rows, x_slots) + tile_ring_bytes(width, warps)) // 16) * 16


@triton.jit
def multiply_bands(
    tiles_ptr,
    norms_ptr,
    table_ptr,
    x_ptr,
    first_chunk,
    first_tile,
    band_tiles,
    bands,
    count,
    chunks,
    steps,
    shared,
    thread,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    X_SLOTS: tl.constexpr,
):
    """What WARPS warps do: two a band, times ROWS rows of x. A thread's ROWS / 2 sums, as `wgmma_output` has them.

    first_tile: the first of `count` tiles of the first band; band_tiles: from there to the next band's; bands: how many
    there are, of which warps beyond the last take the last. first_chunk: the number of the first of `chunks` chunks,
    whole groups of SCALE_BLOCKS. steps: of blocks, for all warps of the program, as many or more; of those beyond the
    last, norms are zero. shared: the address of `piece_bytes`; thread: of the warps; X_SLOTS: for chunks, 1, 2 or 4.
    Waits for the kernel before, which writes x, and starts to read weights before that.
    """
    lane = thread % 32
    warp = first_lane(thread // 32)
    tile = first_tile + tl.minimum(warp // 2, bands - 1) * band_tiles
    norms_place = norms_ptr + tile.to(tl.int64) * 16 + lane // 4 * 2 + warp % 2
    norms = load_norms(norms_place, 0, count)
    tables = copy_tables(shared + _tables_at(ROWS, X_SLOTS, WIDTH, WARPS), table_ptr, thread)
    ring, place, role, first_chunk_at, first_tile_at = open_rings(
        shared, tiles_ptr, tile, count - 1, x_ptr, first_chunk, chunks - 1, thread, warp, WIDTH, ROWS, WARPS, X_SLOTS
    )
    sums = ()
    for _ in tl.static_range(ROWS // 2):
        sums = sums + (tl.zeros(lane.shape, tl.float32),)
    first_scales = scales_of(ring, lane % 4, ROWS, X_SLOTS)
    lanes = lane_places(place, warp % 2, lane)
    wait_for_tables(tables)
    for start in range(0, steps, _SHARE):
        parity = start // _SHARE % 2
        n0, n1, inverse0, inverse1 = largest_norms(norms)
        own = norms
        norms = load_norms(norms_place, start + _SHARE, count)
        products = ()
        for block in tl.static_range(_SHARE):
            upper = load_part_levels(tables, own[block], 0, inverse0)
            lower = load_part_levels(tables, own[block], 16, inverse1)
            words = load_ring_tile(place, lanes, block, parity, WIDTH, WARPS)
            a = decode_half_tile(words[0], words[1], words[2][0], words[2][1], upper, lower, WIDTH, True)
            slot = start * 0 + block % X_SLOTS
            x = wait_for_slot(ring, slot, chunk_parity(parity, block, X_SLOTS), ROWS, X_SLOTS)
            products = _start(products, a, x, block == 0, ROWS)
            refill(
                ring,
                place,
                chunk_parity(parity, block - 1, X_SLOTS),
                role if block > 0 else tl.where(start > 0, role, 0),
                start + block,
                steps,
                chunks - 1,
                count - 1,
                first_chunk_at,
                first_tile_at,
                block,
                ROWS,
                X_SLOTS,
                WIDTH,
                WARPS,
            )
            products = _finish(products, ROWS)
            if block == _SHARE - 1:
                added = ()
                for group in tl.static_range(ROWS // 8):
                    scales = load_scales(first_scales, slot, group, ROWS)
                    added = added + add_scaled(sums, products, 4 * group, n0, n1, scales)
                sums = added
            release_slot(ring, slot, lane, ROWS, X_SLOTS)
    return sums
