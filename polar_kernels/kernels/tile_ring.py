"""A ring of slots in shared memory for tiles, beside one of chunks of x (`ring`).

A slot has a tile of each of some bands, two warps a band, and an mbarrier for each, which opens when the tile has
landed. The first lane of a band's second warp starts its copies. Nobody releases a slot: a chunk is released only after
its block's tiles have been decoded.
"""

import triton
import triton.language as tl

from polar_kernels.kernels.ptx import load_shared, load_shared_two, wait_for_previous_kernel
from polar_kernels.kernels.ring import (
    BULK_COPY,
    barriers_at,
    chunk_words,
    copy_chunk_code,
    fill_slot,
    open_ring,
    ring_bytes,
)
from polar_kernels.kernels.wgmma_forms import SCALE_BLOCKS
from polar_kernels.tiles import PLANE_WORDS

TILE_SLOTS = SCALE_BLOCKS  # so that each block of a group has its own
_TILE_SLOTS = tl.constexpr(TILE_SLOTS)
_PLANE_WORDS, _PLANE_BYTES = tl.constexpr(PLANE_WORDS), tl.constexpr(4 * PLANE_WORDS)


@triton.constexpr_function
def tile_ring_bytes(width: int, warps: int) -> int:
    return _barriers_at(width, warps) + 8 * (TILE_SLOTS * warps // 2)


@triton.constexpr_function
def _tile_bytes(width: int) -> int:
    return 4 * PLANE_WORDS * width


@triton.constexpr_function
def _barriers_at(width: int, warps: int) -> int:
    """Those of the bands' tiles in the first slot, and so on."""
    return TILE_SLOTS * (warps // 2) * _tile_bytes(width)


@triton.constexpr_function
def _open_code(width: int, warps: int) -> str:
    """PTX: the ring at $1 gets its barriers from the thread whose $2 is 0."""
    bar = _barriers_at(width, warps)
    made = " ".join(
        f"mbarrier.init.shared::cta.b64 [$1+{bar + 8 * number}], 1;" for number in range(TILE_SLOTS * warps // 2)
    )
    return (
        f"{{ .reg .pred p; setp.ne.u32 p, $2, 0; @p bra past; {made} fence.proxy.async.shared::cta;"
        "past: bar.sync 0; mov.u32 $0, $1; }"
    )


@triton.constexpr_function
def _copy_tile_code(width: int, warps: int, slot: int, place: str, barrier: str, source: str, block: str) -> str:
    """PTX of one thread: start copying the tile of a block into a slot. place, barrier: of its band in the first slot;
    source: its band's first tile."""
    size, bands = _tile_bytes(width), warps // 2
    return (
        f"add.u32 bar, {barrier}, {8 * slot * bands};"
        f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], {size};"
        f"mad.wide.s32 from, {block}, {size}, {source}; add.u32 to, {place}, {slot * bands * size};"
        f"{BULK_COPY} [to], [from], {size}, [bar];"
    )


@triton.constexpr_function
def _fill_code(width: int, warps: int) -> str:
    """PTX: where $1 is 2, fill all slots. $2, $3: the band's place and barrier in the first one; $4: the number of the
    last tile; $5: the first one."""
    blocks = " ".join(
        f"min.s32 block, $4, {slot}; {_copy_tile_code(width, warps, slot, '$2', '$3', '$5', 'block')}"
        for slot in range(TILE_SLOTS)
    )
    return (
        "{ .reg .pred p; .reg .b32 bar, to, block; .reg .b64 from; setp.ne.u32 p, $1, 2; @p bra past;"
        f"{blocks} past: bar.warp.sync 0xffffffff; mov.b32 $0, 0; }}"
    )


@triton.constexpr_function
def _refill_code(rows: int, x_slots: int, block: int, width: int, warps: int, scaled: bool) -> str:
    """PTX: what `refill` says. $1: the role; $2: the ring of chunks; $3, $4: the band's place and barrier in the first
    slot; $5: the parity of the chunk before; $6: the block, whose number in its group is `block`; $7: how many there
    will be; $8, $9: the numbers of the last chunk and the last tile; $10, $11: the first ones."""
    empty = barriers_at(rows, x_slots, scaled) + 8 * (x_slots + (block - 1) % x_slots)
    ahead, tiles_ahead = block - 1 + x_slots, block - 1 + TILE_SLOTS
    scales = scaled and ahead % SCALE_BLOCKS == SCALE_BLOCKS - 1
    chunk = copy_chunk_code(rows, x_slots, ahead % x_slots, "$2", "source", scaled, scales)
    tile = _copy_tile_code(width, warps, tiles_ahead % TILE_SLOTS, "$3", "$4", "$11", "later")
    return (
        "{ .reg .pred p, done; .reg .b32 bar, to, later; .reg .b64 from, source; setp.eq.u32 p, $1, 0; @p bra past;"
        f"again: mbarrier.try_wait.parity.shared::cta.b64 done, [$2+{empty}], $5; @!done bra again;"
        f"setp.eq.u32 p, $1, 2; @p bra tiles; add.s32 later, $6, {x_slots - 1}; setp.ge.s32 p, later, $7; @p bra past;"
        f"min.s32 later, later, $8; mad.wide.s32 source, later, {4 * chunk_words(rows, scaled)}, $10; {chunk}"
        f"bra past; tiles: add.s32 later, $6, {TILE_SLOTS - 1}; setp.ge.s32 p, later, $7; @p bra past;"
        f"min.s32 later, later, $9; {tile} past: bar.warp.sync 0xffffffff; mov.b32 $0, 0; }}"
    )


@triton.constexpr_function
def wait_code(number: int) -> str:
    """PTX: wait until barrier `number` from $1 on has opened for the time of parity $2."""
    return (
        f"{{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [$1+{8 * number}], $2;"
        "@!done bra again; mov.b32 $0, 0; }"
    )


@triton.jit
def open_rings(
    shared,
    tiles_ptr,
    tile,
    last_tile,
    x_ptr,
    first_chunk,
    last_chunk,
    thread,
    warp,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    X_SLOTS: tl.constexpr,
    SCALED: tl.constexpr = True,
):
    """Both rings at an address of shared memory, with what is first in them on its way. All threads of the program
    together. Waits for the kernel before, which writes x, and starts to read tiles before that.

    tile: the number of a band's first one, and first_chunk that of x's; last_tile, last_chunk: counted from there,
    which all after them repeat; thread: of WARPS warps, and its warp. Returns the ring of chunks, `_band_place`, the
    role (see `refill`), and the addresses of the first chunk and the first tile.
    """
    TILE: tl.constexpr = 4 * _PLANE_WORDS * WIDTH  # bytes
    CHUNK: tl.constexpr = 4 * chunk_words(ROWS, SCALED)
    lane = thread % 32
    tile_ring = _open_tile_ring(shared + ring_bytes(ROWS, X_SLOTS, SCALED), thread, WIDTH, WARPS)
    ring = open_ring(shared, thread, ROWS, X_SLOTS, WARPS, SCALED)
    place = _band_place(tile_ring, warp // 2, WIDTH, WARPS)
    role = tl.where(lane == 0, tl.where(warp % 2 == 1, 2, (warp == 0).to(tl.int32)), 0)
    first_tile_at = tiles_ptr.to(tl.int64) + tile.to(tl.int64) * TILE
    _fill_tiles(place, role, last_tile, first_tile_at, WIDTH, WARPS)
    # Everything above was there before; x comes from the kernel before this one.
    zero = wait_for_previous_kernel(thread)
    first_chunk_at = x_ptr.to(tl.int64) + first_chunk.to(tl.int64) * CHUNK
    for block in tl.static_range(X_SLOTS):
        chunk_at = first_chunk_at + tl.minimum(block, last_chunk) * CHUNK
        fill_slot(ring, zero + block, 0, (role == 1).to(tl.int32), chunk_at, ROWS, X_SLOTS, False, SCALED)
    return ring, place, role, first_chunk_at, first_tile_at


@triton.jit
def chunk_parity(group_parity, block: tl.constexpr, X_SLOTS: tl.constexpr):
    """How often, modulo 2, the slot of a chunk has been used before. group_parity: of its group of TILE_SLOTS blocks,
    where it is the one of this number, from -1 on."""
    if X_SLOTS == _TILE_SLOTS:
        return group_parity if block >= 0 else group_parity ^ 1
    else:
        return group_parity * 0 + block // X_SLOTS % 2


@triton.jit
def _open_tile_ring(ring, thread, WIDTH: tl.constexpr, WARPS: tl.constexpr):
    """The ring at an address of shared memory, for WARPS warps. All threads of the program together; thread: of those
    warps."""
    code: tl.constexpr = _open_code(WIDTH, WARPS)
    return tl.inline_asm_elementwise(code, "=&r,r,r", [ring, thread], tl.int32, False, 1)


@triton.jit
def _band_place(ring, band, WIDTH: tl.constexpr, WARPS: tl.constexpr):
    """The address of a band's tile in the first slot, and of its barrier. band: of a ring's, uniform in a warp."""
    return ring + band * _tile_bytes(WIDTH), ring + _barriers_at(WIDTH, WARPS) + band * 8


@triton.jit
def _fill_tiles(place, role, last_tile, source, WIDTH: tl.constexpr, WARPS: tl.constexpr):
    """Start copying the tiles of the first blocks. place: see `_band_place`; role: see `refill`; last_tile: the number
    of the last, which all after it repeat; source: the address of the first one."""
    code: tl.constexpr = _fill_code(WIDTH, WARPS)
    operands = [role, place[0], place[1], last_tile, source]
    tl.inline_asm_elementwise(code, "=r,r,r,r,r,l", operands, tl.int32, False, 1)


@triton.jit
def refill(
    ring,
    place,
    parity,
    role,
    step,
    steps,
    last_chunk,
    last_tile,
    chunk,
    tile,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    X_SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    WARPS: tl.constexpr,
    SCALED: tl.constexpr = True,
):
    """Once all warps have released the chunk of the block before `step`, start copying what its slots have next, if it
    is of a block before `steps`.

    parity: of that chunk; role: 1 in the thread that is to copy chunks, 2 in that of a band that is to copy tiles, once
    there was a block, else 0; last_chunk, last_tile: the numbers of the last, which all after it repeat; chunk, tile:
    the addresses of the first ones; BLOCK: which of its group `step` is.
    """
    code: tl.constexpr = _refill_code(ROWS, X_SLOTS, BLOCK, WIDTH, WARPS, SCALED)
    operands = [role, ring, place[0], place[1], parity, step, steps, last_chunk, last_tile, chunk, tile]
    tl.inline_asm_elementwise(code, "=r,r,r,r,r,r,r,r,r,r,l,l", operands, tl.int32, False, 1)


@triton.jit
def load_ring_tile(place, lanes, slot: tl.constexpr, parity, WIDTH: tl.constexpr, WARPS: tl.constexpr):
    """A lane's part of 16 rows of the tile in a slot, once it is there: two planes of magnitudes, two words of signs.

    lanes: see `lane_places`.
    """
    wait: tl.constexpr = wait_code(slot * (WARPS // 2))
    tl.inline_asm_elementwise(wait, "=r,r,r", [place[1], parity], tl.int32, False, 1)
    AT: tl.constexpr = slot * (WARPS // 2) * _tile_bytes(WIDTH)
    first = load_shared(lanes[0], AT)
    second = load_shared(lanes[0], AT + _PLANE_BYTES)
    signs = (first[0], first[1])
    if WIDTH == 5:
        signs = load_shared_two(lanes[1], AT)
    return first, second, signs


@triton.jit
def lane_places(place, half, lane):
    """Where a lane reads half of its band's tile in the first slot: magnitudes, and signs."""
    start = place[0] + lane * 16
    return start + half * (2 * _PLANE_BYTES), start + 4 * _PLANE_BYTES + half * 8
