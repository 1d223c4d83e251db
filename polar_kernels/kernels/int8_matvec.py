"""The product for one row of x: `int8_matmul` that quantises x by itself, so that one launch does all.

A warp multiplies a tile (32 rows x one 128-block) at a time, and warps of a program split the blocks of K, as there. A
warp needs x for its own blocks only: it quantises four of them at once, in registers, a quarter of a warp each, and
multiplies the tiles of those four by the same B operand, which has one block in each even column. The columns of other
blocks are numbers without a meaning; that of its tile's block is picked by a multiplication by one, for which the
floating-point pipe has room where that of permutes and logic has none. So lanes q of all groups end with the sums of
block q of the four, and what turns those into products is done once for all of them, each lane with its own block's
norms and scale.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from polar_kernels.kernels.band_sums import sum_parts
from polar_kernels.kernels.decode_int8 import decode_half_tile
from polar_kernels.kernels.int8_matmul import choose_warps, multiply_half_tile
from polar_kernels.kernels.ptx import (
    as_float,
    load_cached,
    read_lane,
    sum_lanes,
    swap_lanes,
    wait_for_previous_kernel,
)
from polar_kernels.kernels.quantize_activation import base_of, scales_of_peak
from polar_kernels.kernels.quantize_chunks import is_whole, load_eight, peak_of, round_words, turn_lanes, turn_own
from polar_kernels.kernels.tile_access import load_tile, norm_of
from polar_kernels.tiles import LEVEL_STEP, PLANE_WORDS, TILE_ROWS

_STEP = tl.constexpr(LEVEL_STEP)
_BLOCKS = tl.constexpr(4)  # of x that a warp quantises at once
_MULTIPROCESSORS = 132  # of a Hopper GPU


class Shape(NamedTuple):
    """warps: of a program, 4, 8 or 16; ahead: tiles that a warp asks for before it needs them, 1 or 2; registers: of a
    thread, at most."""

    warps: int
    ahead: int
    registers: int


@triton.jit
def _swap_words(word, distance):
    return swap_lanes(as_float(word), distance).to(tl.int32, bitcast=True)


@triton.jit
def _quantize_blocks(
    x_ptr,
    scales_ptr,
    block,
    lane,
    K,
    delta,
    HAS_SCALES: tl.constexpr,
    GATED: tl.constexpr,
    WHOLE: tl.constexpr,
    WHOLE_SCALES: tl.constexpr,
):
    """Four blocks of x, of lanes 8 j .. 8 j + 7 the one they name, as B operands with block j in column 2 j; base and
    scale of block lane % 4."""
    # A lane's 16 columns are 8 (lane % 8) + 0..7, and those 64 further on: lane 4 h + q of a block has the words of
    # step s = h and s = h + 2 that lane q of column 2 j multiplies by, so that it lacks those of lane 4 + q only.
    column = block * 128 + 8 * (lane % 8)
    v = load_eight(x_ptr, scales_ptr, column, K, HAS_SCALES, GATED, WHOLE, WHOLE_SCALES)
    v = v + load_eight(x_ptr, scales_ptr, column + 64, K, HAS_SCALES, GATED, WHOLE, WHOLE_SCALES)
    v = turn_own(v, 1)
    v = turn_own(v, 2)
    v = turn_own(v, 4)
    v = turn_lanes(v, lane, 0)
    v = turn_lanes(v, lane, 1)
    v = turn_lanes(v, lane, 2)
    v = turn_own(v, 8)
    inverse, scale = scales_of_peak(peak_of(v, 3), delta)
    words, total = round_words(v, inverse)
    base = base_of(0.5 * sum_lanes(total.to(tl.float32), 3) * scale, scale)
    distance = tl.full(lane.shape, 4, tl.int32)
    x0 = words[0], words[1], _swap_words(words[0], distance), _swap_words(words[1], distance)
    x1 = words[2], words[3], _swap_words(words[2], distance), _swap_words(words[3], distance)
    source = lane % 4 * 8
    return x0, x1, read_lane(base, source), read_lane(scale, source)


@triton.jit
def _multiply_tile(p, tile, x0, x1, picked, tiles_ptr, following, more, lane, table, WIDTH: tl.constexpr):
    """The picked sums with those of a tile, and the following tile, by its number, if there are more of them."""
    upper = decode_half_tile(tile[0], tile[1], tile[4][0], tile[4][1], table, WIDTH)
    u0, _, u2, _ = multiply_half_tile(upper, x0, x1)
    lower = decode_half_tile(tile[2], tile[3], tile[4][2], tile[4][3], table, WIDTH)
    if more:
        tile = load_tile(tiles_ptr, following, lane, WIDTH)
    l0, _, l2, _ = multiply_half_tile(lower, x0, x1)
    p = (p[0] + u0 * picked, p[1] + u2 * picked, p[2] + l0 * picked, p[3] + l2 * picked)
    return p, tile


@triton.jit(do_not_specialize=["K", "N", "blocks"])
def _int8_matvec_kernel(
    x_ptr,
    scales_ptr,
    tiles_ptr,
    norms_ptr,
    table_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    K,
    N,
    blocks,
    WIDTH: tl.constexpr,
    WARPS: tl.constexpr,
    AHEAD: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    GATED: tl.constexpr,
    WHOLE: tl.constexpr,
    WHOLE_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    warp = thread // 32
    first = tl.program_id(0) * blocks
    last = first + blocks - 1
    own = first + warp
    steps = tl.cdiv(blocks, WARPS)
    tile = load_tile(tiles_ptr, tl.minimum(own, last), lane, WIDTH)
    if AHEAD == 2:
        other = load_tile(tiles_ptr, tl.minimum(own + WARPS, last), lane, WIDTH)
    # Of an address that could differ between lanes: short of registers, ptxas would keep words that it knows to be the
    # same for all lanes in uniform ones, from which every permute has to copy them first.
    table = load_cached(table_ptr + lane * tl.minimum(blocks, 0))
    delta = tl.load(table_ptr + _STEP).to(tl.float32, bitcast=True)
    row = tl.program_id(0) * 32 + thread // WARPS
    keep = (row < N) & (thread % WARPS == 0)
    offset = tl.zeros(lane.shape, tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias_ptr + row, mask=keep, other=0.0).to(tl.float32)
    # Everything above was there before; x and the residual come from the kernels before this one.
    zero = wait_for_previous_kernel(thread)
    before = tl.zeros(lane.shape, tl.float32)
    if HAS_RESIDUAL:
        before = tl.load(residual_ptr + (row + zero), mask=keep, other=0.0).to(tl.float32)
    q = lane % 4
    none = tl.zeros(lane.shape, tl.float32)
    s0 = none
    s1 = none
    s2 = none
    s3 = none
    for start in range(0, steps, _BLOCKS):
        block = tl.minimum((start + lane // 8) * WARPS + warp, blocks - 1) + zero
        x0, x1, base, scale = _quantize_blocks(
            x_ptr, scales_ptr, block, lane, K, delta, HAS_SCALES, GATED, WHOLE, WHOLE_SCALES
        )
        number = own + (start + q) * WARPS
        norms = tl.load(norms_ptr + number.to(tl.int64) * 8 + lane // 4, mask=number <= last, other=0)
        p = (none, none, none, none)
        end = tl.minimum(start + _BLOCKS, steps)
        for step in range(start, end, AHEAD):
            picked = tl.where(q == step - start, 1.0, 0.0)
            following = tl.minimum(own + (step + AHEAD) * WARPS, last)
            more = AHEAD == 1 or step + AHEAD < steps  # one ahead: loads a tile twice, for want of a register
            p, tile = _multiply_tile(p, tile, x0, x1, picked, tiles_ptr, following, more, lane, table, WIDTH)
            if AHEAD == 2:  # noqa: SIM102
                if step + 1 < end:
                    picked = tl.where(q == step + 1 - start, 1.0, 0.0)
                    following = tl.minimum(own + (step + 1 + AHEAD) * WARPS, last)
                    more = step + 1 + AHEAD < steps
                    p, other = _multiply_tile(p, other, x0, x1, picked, tiles_ptr, following, more, lane, table, WIDTH)
        s0 += (p[0] * scale + base) * norm_of(norms, 0)
        s1 += (p[1] * scale + base) * norm_of(norms, 16)
        s2 += (p[2] * scale + base) * norm_of(norms, 32)
        s3 += (p[3] * scale + base) * norm_of(norms, 48)
    y = sum_parts((s0, s1, s2, s3), thread, WARPS) + offset
    if HAS_RESIDUAL:  # after the rounding that torch would do before the addition
        y = y.to(out_ptr.dtype.element_ty).to(tl.float32) + before
    tl.store(out_ptr + row, y.to(out_ptr.dtype.element_ty), mask=keep)


def int8_matvec(
    x: torch.Tensor,
    tiles: torch.Tensor,
    tile_norms: torch.Tensor,
    awq_scales: torch.Tensor | None,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    *,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    out: torch.Tensor | None = None,
    shape: Shape | None = None,
) -> torch.Tensor:
    """x [1, K] contiguous, bf16 or fp16, times the transposed weight, plus bias, plus residual [1, N]: [1, N] in x's
    dtype, or in `out`. gated: x is [1, 2 K], and silu(first half) * second half is taken. shape: chosen when None."""
    in_features = x.shape[1] // 2 if gated else x.shape[1]
    if out is None:
        out = torch.empty(1, out_features, dtype=x.dtype, device=x.device)
    bands = triton.cdiv(out_features, TILE_ROWS)
    blocks = tiles.shape[0] // bands
    shape = shape or _choose_shape(bands, blocks)
    _int8_matvec_kernel[(bands,)](
        x_ptr=x,
        scales_ptr=awq_scales,
        tiles_ptr=tiles,
        norms_ptr=tile_norms.view(torch.int64),
        table_ptr=table,
        bias_ptr=bias,
        residual_ptr=residual,
        out_ptr=out,
        K=in_features,
        N=out_features,
        blocks=blocks,
        WIDTH=tiles.shape[1] // PLANE_WORDS,
        WARPS=shape.warps,
        AHEAD=shape.ahead,
        HAS_SCALES=awq_scales is not None,
        GATED=gated,
        WHOLE=is_whole(x[:, :in_features]),
        WHOLE_SCALES=awq_scales is not None and awq_scales.dtype.itemsize == 2 and is_whole(awq_scales[None]),
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        num_warps=shape.warps,
        enable_fp_fusion=True,
        num_stages=1,
        launch_pdl=True,
        maxnreg=shape.registers,
    )
    return out


def _choose_shape(bands: int, blocks: int) -> Shape:
    """Two tiles ahead where registers are left, since few programs share a multiprocessor: a warp quantises x before it
    multiplies its first tile, and the memory would be idle meanwhile. Not measured yet."""
    warps = choose_warps(bands, 1)
    roomy = bands <= 2 * _MULTIPROCESSORS and blocks > warps
    return Shape(warps, 2, 128) if roomy else Shape(warps, 1, 128 if warps == 16 else 80)
