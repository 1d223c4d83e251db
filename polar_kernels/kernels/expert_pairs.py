"""The product of experts for few tokens: a program takes 32 rows of one expert's weight, or of several experts' in
turn, and one row of x for each, straight from the router's choice.

A warp multiplies a tile at a time, as `int8_matmul` does, all eight rows of x that the tensor cores take being the same
one. Warps of a program split the blocks of K, and the experts; their sums meet in shared memory. Weights are asked for
while the kernel before still runs: it has to be one whose start says that the router's choice is there.
"""

import torch
import triton
import triton.language as tl

from polar_kernels.kernels.expert_tiles import (
    decode_tile,
    load_levels,
    load_scale,
    load_x,
    multiply_tile,
    multiply_tile_exactly,
)
from polar_kernels.kernels.ptx import prefetch, wait_for_previous_kernel
from polar_kernels.kernels.tile_access import load_tile, norm_of
from polar_kernels.tiles import PLANE_WORDS, TILE_ROWS

_NAN_NORMS = tl.constexpr(0x7E007E007E007E00)  # four of fp16


def _sum_code(warps: int) -> str:
    """PTX: $0 = the sum over the program's warps of row `lane`; $1: a row's sum, $2: that row, $3: the thread."""
    add = " ".join(f"ld.shared.f32 v, [at+{128 * w}]; add.f32 $0, $0, v;" for w in range(1, warps))
    return (
        f"{{ .shared .align 16 .b8 rows[{128 * warps}]; .reg .u32 at, base; .reg .f32 v; mov.u32 base, rows;"
        "shr.u32 at, $3, 5; mad.lo.u32 at, at, 128, base; mad.lo.u32 at, $2, 4, at; st.shared.f32 [at], $1;"
        "bar.sync 0; and.b32 at, $3, 31; mad.lo.u32 at, at, 4, base; ld.shared.f32 $0, [at];"
        f"{add} }}"
    )


_SUM_4, _SUM_8, _SUM_16 = (tl.constexpr(_sum_code(warps)) for warps in (4, 8, 16))


@triton.jit
def _sum_warps(value, row, thread, WARPS: tl.constexpr):
    CODE: tl.constexpr = _SUM_4 if WARPS == 4 else _SUM_8 if WARPS == 8 else _SUM_16
    return tl.inline_asm_elementwise(CODE, "=&f,f,r,r", [value, row, thread], tl.float32, False, 1)


@triton.jit
def _load_unit(
    tiles_ptr,
    norms_ptr,
    index_ptr,
    first_pair,
    unit,
    units,
    blocks,
    experts,
    lane,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Tile and norms of a unit of work: a block of K of one of the program's experts. Norms beyond the last unit are 0,
    those of an expert that does not exist NaN."""
    held = tl.minimum(unit, units - 1)
    slot = held // blocks if SLOTS > 1 else 0
    expert = tl.load(index_ptr + first_pair + slot + lane * 0, volatile=True).to(tl.int64)
    known = (expert >= 0) & (expert < experts)
    number = (tl.where(known, expert, 0) * tl.num_programs(0) + tl.program_id(0)) * blocks + held - slot * blocks
    tile = load_tile(tiles_ptr, number, lane, WIDTH)
    norms = tl.load(norms_ptr + number * 8 + lane // 4, mask=known & (unit < units), other=0)
    return tile, tl.where(known, norms, _NAN_NORMS)


@triton.jit(do_not_specialize=["experts", "blocks", "rows", "divisor", "next_share"])
def _expert_pairs_kernel(
    tiles_ptr,
    norms_ptr,
    table_ptr,
    x_ptr,
    meta_ptr,
    index_ptr,
    weights_ptr,
    out_ptr,
    next_ptr,
    experts,
    blocks,
    rows,
    divisor,
    next_share,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    WARPS: tl.constexpr,
    EXACT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    warp = thread // 32
    first_pair = tl.program_id(1) * SLOTS
    units = SLOTS * blocks
    tile, norms = _load_unit(
        tiles_ptr, norms_ptr, index_ptr, first_pair, warp, units, blocks, experts, lane, SLOTS, WIDTH
    )
    if PREFETCH:
        expert = tl.load(index_ptr + first_pair + thread * 0, volatile=True).to(tl.int64)
        wanted = (thread == 0) & (expert >= 0) & (expert < experts)
        share = next_ptr.to(tl.int64) + (expert * tl.num_programs(0) + tl.program_id(0)) * next_share
        prefetch(share, tl.where(wanted, next_share, 0))
    levels = load_levels(table_ptr, thread, EXACT, DTYPE)
    # Everything above was there before; x and meta come from the kernel before this one.
    zero = wait_for_previous_kernel(thread)
    q = lane % 4 + zero
    sum0 = tl.zeros(lane.shape, tl.float32)
    sum1 = tl.zeros(lane.shape, tl.float32)
    sum2 = tl.zeros(lane.shape, tl.float32)
    sum3 = tl.zeros(lane.shape, tl.float32)
    for step in range(tl.cdiv(units, WARPS)):
        unit = step * WARPS + warp
        held = tl.minimum(unit, units - 1)
        slot = held // blocks if SLOTS > 1 else 0
        block = held - slot * blocks
        pair = first_pair + slot + zero
        x = load_x(x_ptr, pair // divisor, blocks, block, q, EXACT)
        weight = tl.full(lane.shape, 1.0, tl.float32)
        if WEIGHTED:
            weight = tl.load(weights_ptr + pair).to(tl.float32)
        n0 = norm_of(norms, 0) * weight
        n1 = norm_of(norms, 16) * weight
        n2 = norm_of(norms, 32) * weight
        n3 = norm_of(norms, 48) * weight
        if EXACT:
            u, v = multiply_tile_exactly(tile, levels, x, WIDTH, 1, DTYPE)
            tile, norms = _load_unit(
                tiles_ptr, norms_ptr, index_ptr, first_pair, unit + WARPS, units, blocks, experts, lane, SLOTS, WIDTH
            )
            sum0 += u[0] * n0
            sum1 += u[2] * n1
            sum2 += v[0] * n2
            sum3 += v[2] * n3
        else:
            upper, lower = decode_tile(tile, levels, WIDTH)
            tile, norms = _load_unit(
                tiles_ptr, norms_ptr, index_ptr, first_pair, unit + WARPS, units, blocks, experts, lane, SLOTS, WIDTH
            )
            base, scale = load_scale(meta_ptr, rows, pair // divisor, block)
            y = multiply_tile(upper, lower, x)
            sum0 += (y[0] * scale + base) * n0
            sum1 += (y[2] * scale + base) * n1
            sum2 += (y[4] * scale + base) * n2
            sum3 += (y[6] * scale + base) * n3
    # The four lanes that share rows hold the same sums: each hands on one of them.
    part = lane % 4
    value = tl.where(part < 2, tl.where(part == 0, sum0, sum1), tl.where(part == 2, sum2, sum3))
    total = _sum_warps(value, part * 8 + lane // 4, thread, WARPS)
    out = out_ptr + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 32 + lane
    tl.store(out, total.to(DTYPE), mask=warp == 0)


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
    *,
    warps: int,
    following: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write `out` [R, N], row r the sum over the slots s of weights[r, s] * (weight of expert index[r, s]) @ x, whose
    row is the (r * S + s) // (R * S / M)-th; weights None: ones. Returns it.

    words [M, *], meta: x as `quantize_activation` gives it, or `rotate_activation`, with meta None; index: int [R, S];
    N a multiple of 32. An expert outside 0..experts-1 makes its row NaN. following: tiles of the same experts that are
    wanted next, to be brought into L2.
    """
    bands = out.shape[1] // TILE_ROWS
    share = _share(following, experts * bands)
    _expert_pairs_kernel[(bands, out.shape[0])](
        tiles_ptr=tiles,
        norms_ptr=tile_norms.view(torch.int64),
        table_ptr=table,
        x_ptr=words,
        meta_ptr=None if meta is None else meta.view(torch.int64),
        index_ptr=index,
        weights_ptr=weights,
        out_ptr=out,
        next_ptr=following,
        experts=experts,
        blocks=tiles.shape[0] // (bands * experts),
        rows=words.shape[0],
        divisor=index.numel() // words.shape[0],
        next_share=share,
        WIDTH=tiles.shape[1] // PLANE_WORDS,
        SLOTS=index.shape[1],
        WARPS=warps,
        EXACT=meta is None,
        WEIGHTED=weights is not None,
        PREFETCH=share > 0,
        num_warps=warps,
        enable_fp_fusion=True,
        num_stages=1,
        launch_pdl=True,
        maxnreg={16: 64, 8: 80}.get(warps) if meta is not None else None,
    )
    return out


def _share(following: torch.Tensor | None, programs: int) -> int:
    """Bytes of `following` that each of so many programs brings into L2; 0 where they do not divide."""
    if following is None or following.nbytes % (16 * programs):
        return 0
    return following.nbytes // programs
