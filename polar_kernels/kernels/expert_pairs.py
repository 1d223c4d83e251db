"""The product of experts for few tokens: a program takes 32 rows of one expert's weight, or of several experts' in
turn, and one row of x for each, straight from the router's choice.

A warp multiplies a tile at a time, as `int8_matmul` does, all eight rows of x that the tensor cores take being the same
one. Warps of a program split the blocks of K, and the experts; their sums meet in shared memory. Weights are asked for
while the kernel before still runs: it has to be one whose start says that the router's choice is there.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from polar_kernels.kernels.band_sums import sum_band
from polar_kernels.kernels.decode_int8 import decode_half_tile
from polar_kernels.kernels.exact_matmul import multiply_half_tile_exactly
from polar_kernels.kernels.expert_tiles import (
    decode_tile,
    load_scale,
    load_table,
    multiply_tile_exactly,
)
from polar_kernels.kernels.fragments import load_gathered
from polar_kernels.kernels.int8_matmul import multiply_half_tile
from polar_kernels.kernels.ptx import wait_for_previous_kernel
from polar_kernels.kernels.tile_access import load_part, norm_of, norms_of_part
from polar_kernels.tiles import PLANE_WORDS, TILE_ROWS

_NAN_NORMS = tl.constexpr(0x7E007E007E007E00)  # four of fp16


class Shape(NamedTuple):
    """warps: of a program, 4 or 8; halves: programs that share a band, 1 or 2."""

    warps: int
    halves: int


@triton.jit
def _choose(index_ptr, first_pair, unit, units, blocks, SLOTS: tl.constexpr):
    """The expert of a unit of work, which is a block of K of one of the program's experts."""
    slot = tl.minimum(unit, units - 1) // blocks if SLOTS > 1 else unit * 0
    return tl.load(index_ptr + first_pair + slot, volatile=True).to(tl.int64)


@triton.jit
def _load_unit(
    tiles_ptr, norms_ptr, expert, unit, units, blocks, experts, lane, HALVES: tl.constexpr, WIDTH: tl.constexpr
):
    """Tile, or half a tile, and norms of a unit. Norms beyond the last unit are 0, those of an expert that does not
    exist NaN."""
    known = (expert >= 0) & (expert < experts)
    bands = tl.num_programs(0) // HALVES
    number = (tl.where(known, expert, 0) * bands + tl.program_id(0) // HALVES) * blocks
    number += tl.minimum(unit, units - 1) % blocks
    half = tl.program_id(0) % HALVES
    tile = load_part(tiles_ptr, number, half, lane, HALVES, WIDTH)
    norms = tl.load(norms_of_part(norms_ptr, number, half, lane, HALVES))
    NAN: tl.constexpr = _NAN_NORMS >> (32 * (HALVES - 1))
    return tile, tl.where(unit < units, tl.where(known, norms, NAN), 0)


@triton.jit
def _decode(tile, levels, HALVES: tl.constexpr, WIDTH: tl.constexpr):
    """Its 16 or twice 16 rows in int8."""
    if HALVES == 2:
        return (decode_half_tile(tile[0], tile[1], tile[2][0], tile[2][1], levels, levels, WIDTH),)
    else:
        return decode_tile(tile, levels, WIDTH)


@triton.jit
def _multiply(halves, x, base, scale, HALVES: tl.constexpr):
    """Products of the rows g, g + 8, ... with the row of x."""
    u = multiply_half_tile(halves[0], x[0], x[1])
    if HALVES == 2:
        return u[0] * scale + base, u[2] * scale + base
    else:
        v = multiply_half_tile(halves[1], x[0], x[1])
        return u[0] * scale + base, u[2] * scale + base, v[0] * scale + base, v[2] * scale + base


@triton.jit
def _multiply_exactly(tile, levels, x, HALVES: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    if HALVES == 2:
        u = multiply_half_tile_exactly(tile[0], tile[1], tile[2][0], tile[2][1], levels, x, WIDTH, 1, DTYPE)
        return u[0], u[2]
    else:
        u, v = multiply_tile_exactly(tile, levels, x, WIDTH, 1, DTYPE)
        return u[0], u[2], v[0], v[2]


@triton.jit(do_not_specialize=["experts", "blocks", "rows", "divisor"])
def _expert_pairs_kernel(
    tiles_ptr,
    norms_ptr,
    table_ptr,
    x_ptr,
    meta_ptr,
    index_ptr,
    weights_ptr,
    out_ptr,
    experts,
    blocks,
    rows,
    divisor,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    WARPS: tl.constexpr,
    HALVES: tl.constexpr,
    EXACT: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    first_pair = tl.program_id(1) * SLOTS
    units = SLOTS * blocks
    steps = tl.cdiv(units, WARPS)
    # Blocks of one expert in turn, since neighbouring tiles are best read together; of several experts in runs, so that
    # a warp has few of them.
    unit = thread // 32
    stride = WARPS
    last = units
    if SLOTS > 1:
        unit *= steps
        stride = 1
        last = tl.minimum(unit + steps, units)
    expert = _choose(index_ptr, first_pair, unit, units, blocks, SLOTS)
    tile, norms = _load_unit(tiles_ptr, norms_ptr, expert, unit, last, blocks, experts, lane, HALVES, WIDTH)
    levels = load_table(table_ptr, thread, EXACT, DTYPE, 32 * WARPS)
    # Everything above was there before; x and meta come from the kernel before this one.
    zero = wait_for_previous_kernel(thread)
    q = lane % 4 + zero
    sums = ()
    for _ in tl.static_range(4 // HALVES):
        sums = sums + (tl.zeros(lane.shape, tl.float32),)
    for _ in range(steps):
        expert = _choose(index_ptr, first_pair, unit + stride, units, blocks, SLOTS)
        held = tl.minimum(unit, units - 1)
        slot = held // blocks if SLOTS > 1 else 0
        block = held - slot * blocks
        pair = first_pair + slot + zero
        row = pair // divisor
        x = load_gathered(x_ptr, row, blocks, block, q, 2 if EXACT else 1)
        weight = tl.full(lane.shape, 1.0, tl.float32)
        if WEIGHTED:
            weight = tl.load(weights_ptr + pair).to(tl.float32)
        own = norms
        if EXACT:
            products = _multiply_exactly(tile, levels, x, HALVES, WIDTH, DTYPE)
        else:
            decoded = _decode(tile, levels, HALVES, WIDTH)
            base, scale = load_scale(meta_ptr, rows, row, block)
        unit += stride
        tile, norms = _load_unit(tiles_ptr, norms_ptr, expert, unit, last, blocks, experts, lane, HALVES, WIDTH)
        if not EXACT:
            products = _multiply(decoded, x, base, scale, HALVES)
        added = ()
        for i in tl.static_range(4 // HALVES):
            added = added + (sums[i] + products[i] * (norm_of(own, 16 * i) * weight),)
        sums = added
    # The four lanes that share rows hold the same sums: each hands on one of them.
    part = lane % 4
    if HALVES == 2:
        value = tl.where(part % 2 == 0, sums[0], sums[1])
    else:
        value = tl.where(part < 2, tl.where(part == 0, sums[0], sums[1]), tl.where(part == 2, sums[2], sums[3]))
    total = sum_band(value, part * 8 + lane // 4, thread, WARPS)
    OWN: tl.constexpr = 32 // HALVES
    out = out_ptr + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * OWN + lane
    tl.store(out, total.to(DTYPE), mask=thread < OWN)


def expert_pairs(
    words: torch.Tensor,
    meta: torch.Tensor | None,
    index: torch.Tensor,
    weights: torch.Tensor | None,
    out: torch.Tensor,
    tiles: torch.Tensor,
    tile_norms: torch.Tensor,
    table: torch.Tensor,
    experts: int,
    shape: Shape | None = None,
) -> torch.Tensor:
    """Write `out` [R, N], row r the sum over the slots s of weights[r, s] * (weight of expert index[r, s]) @ x, whose
    row is the (r * S + s) // (R * S / M)-th; weights None: ones. Returns it.

    words [M, *], meta: x as `quantize_activation` gives it, or `rotate_activation`, with meta None; index: int [R, S];
    N a multiple of 32. An expert outside 0..experts-1 makes its row NaN. shape: of a program; chosen when None.
    """
    bands = out.shape[1] // TILE_ROWS
    blocks = tiles.shape[0] // (bands * experts)
    shape = shape or _choose_shape(bands * len(out))
    _expert_pairs_kernel[(bands * shape.halves, len(out))](
        tiles_ptr=tiles,
        norms_ptr=tile_norms.view(torch.int64 if shape.halves == 1 else torch.int32),
        table_ptr=table,
        x_ptr=words,
        meta_ptr=None if meta is None else meta.view(torch.int64),
        index_ptr=index,
        weights_ptr=weights,
        out_ptr=out,
        experts=experts,
        blocks=blocks,
        rows=len(words),
        divisor=index.numel() // len(words),
        WIDTH=tiles.shape[1] // PLANE_WORDS,
        SLOTS=index.shape[1],
        WARPS=shape.warps,
        HALVES=shape.halves,
        EXACT=meta is None,
        WEIGHTED=weights is not None,
        num_warps=shape.warps,
        enable_fp_fusion=True,
        num_stages=1,
        launch_pdl=True,
        maxnreg=80,  # three programs on a multiprocessor
    )
    return out


def _choose_shape(bands: int) -> Shape:
    """bands: of the output's rows. Measured on an H100: half of one each where there are not enough to go round."""
    return Shape(8, 2 if bands <= 128 else 1)
