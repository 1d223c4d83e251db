"""A run of blocks of K through `wgmma` in bf16 or fp16: levels looked up in shared memory, x from a ring (`ring`).

As `wgmma_blocks`, but that the tensor cores add up a block in fp32, whose sums are multiplied by the norms: a level is
rounded once and a norm not at all. A row of a chunk is 256 bytes, two rows of a ring.
"""

import triton
import triton.language as tl

from polar_kernels.kernels.decode_pairs import decode_eight_pairs, spread_signs
from polar_kernels.kernels.part_levels import load_norms
from polar_kernels.kernels.ptx import first_lane
from polar_kernels.kernels.ring import chunk_words, release_slot, ring_bytes, wait_for_slot
from polar_kernels.kernels.tile_access import norm_of
from polar_kernels.kernels.tile_ring import (
    TILE_SLOTS,
    chunk_parity,
    lane_places,
    load_ring_tile,
    open_rings,
    refill,
    tile_ring_bytes,
)

_STEPS = tl.constexpr(TILE_SLOTS)


@triton.constexpr_function
def exact_piece_bytes(rows: int, x_slots: int, width: int, warps: int) -> int:
    """Shared memory that `multiply_bands_exactly` takes, in bytes, but for the table of pairs."""
    return -(-(ring_bytes(2 * rows, x_slots, False) + tile_ring_bytes(width, warps)) // 1024) * 1024


@triton.constexpr_function
def exact_chunk_words(rows: int) -> int:
    """int32 words of a block of so many rows of x."""
    return chunk_words(2 * rows, False)


@triton.constexpr_function
def _start_code(rows: int, dtype: str) -> str:
    """PTX: start 64 rows of the weight by one 128-block, 32 registers a thread, times so many rows of x.

    $0..: the sums of a thread; then the 32 registers and the address of x in shared memory.
    """
    count = rows // 2
    sums = ", ".join(f"${i}" for i in range(count))
    code = [
        "{ .reg .b32 at; .reg .b64 x; .reg .pred p; setp.ne.b32 p, 0, 0; wgmma.fence.sync.aligned;"
        f"shr.u32 at, ${count + 32}, 4; or.b32 at, at, 0x10000;"
    ]
    for step in range(8):
        a = ", ".join(f"${count + 4 * step + i}" for i in range(4))
        # The descriptor's upper half: bytes from 8 rows to the next, over 16, and the swizzle of 128 bytes.
        code.append("mov.b64 x, {at, 0x40000040};")
        code.append(
            f"wgmma.mma_async.sync.aligned.m64n{rows}k16.f32.{dtype}.{dtype} {{{sums}}}, {{{a}}}, x, p, 1, 1, 0;"
        )
        code.append(f"setp.eq.b32 p, 0, 0; add.u32 at, at, {2 if step != 3 else 8 * rows - 6};")
    code.append("wgmma.commit_group.sync.aligned; }")
    return " ".join(code)


@triton.constexpr_function
def _start_constraints(rows: int) -> str:
    return ",".join(["=&f"] * (rows // 2) + ["r"] * 33)


@triton.constexpr_function
def _finish_constraints(rows: int) -> str:
    return ",".join(["=f"] * (rows // 2) + [str(i) for i in range(rows // 2)])


_ADD = tl.constexpr("{ " + " ".join(f"fma.rn.f32 ${i}, ${8 + i}, ${12 + i // 2}, ${i};" for i in range(4)) + " }")
_FINISH = tl.constexpr("wgmma.wait_group.sync.aligned 0;")
_TYPES_32, _TYPES_64, _TYPES_128 = (tl.constexpr((tl.float32,) * (rows // 2)) for rows in (32, 64, 128))


@triton.jit
def _start(a, x, ROWS: tl.constexpr, DTYPE: tl.constexpr):
    """The products of a block, once they are finished."""
    code: tl.constexpr = _start_code(ROWS, "bf16" if tl.bfloat16 == DTYPE else "f16")
    constraints: tl.constexpr = _start_constraints(ROWS)
    if ROWS == 32:
        return tl.inline_asm_elementwise(code, constraints, a + (x,), _TYPES_32, False, 1)
    elif ROWS == 64:
        return tl.inline_asm_elementwise(code, constraints, a + (x,), _TYPES_64, False, 1)
    else:
        return tl.inline_asm_elementwise(code, constraints, a + (x,), _TYPES_128, False, 1)


@triton.jit
def _finish(products, ROWS: tl.constexpr):
    """The products, once the tensor cores have written them."""
    constraints: tl.constexpr = _finish_constraints(ROWS)
    if ROWS == 32:
        return tl.inline_asm_elementwise(_FINISH, constraints, products, _TYPES_32, False, 1)
    elif ROWS == 64:
        return tl.inline_asm_elementwise(_FINISH, constraints, products, _TYPES_64, False, 1)
    else:
        return tl.inline_asm_elementwise(_FINISH, constraints, products, _TYPES_128, False, 1)


@triton.jit
def _add_scaled(sums, products, at: tl.constexpr, n0, n1):
    """Sums `at` .. at + 3 plus the products of two rows of the weight, times their norms.

    One block of assembly, so that a sum stays in its register.
    """
    return tl.inline_asm_elementwise(
        _ADD,
        "=f,=f,=f,=f,0,1,2,3,f,f,f,f,f,f",
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
def _decode_half_tile(w0, w1, signs, pairs, WIDTH: tl.constexpr):
    """The A fragments of 16 rows by 128 columns: four registers for each of eight steps of 16 columns."""
    signs0 = spread_signs(signs[0])
    signs1 = spread_signs(signs[1])
    a = ()
    for s in tl.static_range(4):
        words = w0 if s < 2 else w1
        u0, u1, u2, u3 = decode_eight_pairs(s, words[s % 2 * 2], signs0, pairs, WIDTH)
        v0, v1, v2, v3 = decode_eight_pairs(s, words[s % 2 * 2 + 1], signs1, pairs, WIDTH)
        a = a + (u0, v0, u1, v1, u2, v2, u3, v3)
    return a


@triton.jit
def multiply_bands_exactly(
    tiles_ptr,
    norms_ptr,
    x_ptr,
    first_chunk,
    first_tile,
    band_tiles,
    bands,
    count,
    steps,
    shared,
    pairs,
    thread,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    X_SLOTS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """As `multiply_bands`, with chunks of `rotate_chunks`, of which there are `count`. pairs: see `open_pairs`."""
    R: tl.constexpr = 2 * ROWS  # of the ring
    lane = thread % 32
    warp = first_lane(thread // 32)
    tile = first_tile + tl.minimum(warp // 2, bands - 1) * band_tiles
    norms_place = norms_ptr + tile.to(tl.int64) * 16 + lane // 4 * 2 + warp % 2
    norms = load_norms(norms_place, 0, count)
    ring, place, role, first_chunk_at, first_tile_at = open_rings(
        shared, tiles_ptr, tile, count - 1, x_ptr, first_chunk, count - 1, thread, warp, WIDTH, R, WARPS, X_SLOTS, False
    )
    sums = ()
    for _ in tl.static_range(ROWS // 2):
        sums = sums + (tl.zeros(lane.shape, tl.float32),)
    lanes = lane_places(place, warp % 2, lane)
    for start in range(0, steps, _STEPS):
        parity = start // _STEPS % 2
        own = norms
        norms = load_norms(norms_place, start + _STEPS, count)
        for block in tl.static_range(_STEPS):
            words = load_ring_tile(place, lanes, block, parity, WIDTH, WARPS)
            a = _decode_half_tile(words[0], words[1], words[2], pairs, WIDTH)
            slot = start * 0 + block % X_SLOTS
            x = wait_for_slot(ring, slot, chunk_parity(parity, block, X_SLOTS), R, X_SLOTS, False)
            products = _start(a, x, ROWS, DTYPE)
            refill(
                ring,
                place,
                chunk_parity(parity, block - 1, X_SLOTS),
                role if block > 0 else tl.where(start > 0, role, 0),
                start + block,
                steps,
                count - 1,
                count - 1,
                first_chunk_at,
                first_tile_at,
                block,
                R,
                X_SLOTS,
                WIDTH,
                WARPS,
                False,
            )
            products = _finish(products, ROWS)
            release_slot(ring, slot, lane, R, X_SLOTS, False)
            n0 = norm_of(own[block], 0)
            n1 = norm_of(own[block], 16)
            added = ()
            for group in tl.static_range(ROWS // 8):
                added = added + _add_scaled(sums, products, 4 * group, n0, n1)
            sums = added
    return sums
