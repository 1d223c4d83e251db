"""The product for 1 to 4 rows, exact but for less than a rounding to fp16 costs: `int8_matmul` in two planes of int8.

Levels are a sign and 14 bits, and x, in the rotated domain, 16 bits of one scale a block. Either is two planes of int8,
whose products are integers. A warp multiplies one tile (32 rows x one 128-block) by 4 rows of x: of the eight columns
that the tensor cores take, two are the planes of a row of x, side by side, so that one lane has all four products of
planes. It adds them up as floats.

Decoding costs half as much again as to int8, where to fp16 or bf16 (`exact_matmul`) it costs twice as much, since bytes
that are looked up apart have to be put together. But products of planes are four, and of int8 the tensor cores do no
more at a time: of more than 4 rows they would take longer than decoding does.
"""

import torch
import triton
import triton.language as tl

from polar_kernels.kernels.band_sums import store_band
from polar_kernels.kernels.decode_halves import load_levels
from polar_kernels.kernels.decode_planes import decode_step
from polar_kernels.kernels.exact_matmul import choose_warps
from polar_kernels.kernels.ptx import as_float, load_cached, mma_s8, wait_for_previous_kernel
from polar_kernels.kernels.quantize_planes import quantize_planes
from polar_kernels.kernels.tile_access import load_plane, load_tile, norm_of
from polar_kernels.tiles import PLANE_LEVELS, PLANE_WORDS, TILE_ROWS

MAX_ROWS = 4  # of x
_MAX_ROWS, _LEVELS = tl.constexpr(MAX_ROWS), tl.constexpr(PLANE_LEVELS)


@triton.jit
def _multiply_half_tile(w0, w1, signs0, signs1, levels, x, start, WIDTH: tl.constexpr):
    """16 rows by 128 columns times 4 rows of x, decoded as they are multiplied: four sums with the high plane, and four
    with the low one, as bits of 12582912 + sum. start: where the latter with x's high plane start."""
    begin = tl.full(signs0.shape, 0x4B400000, tl.int32)
    u = (begin, begin, begin, begin)
    v = (start, begin, start, begin)
    for s in tl.static_range(4):
        words = w0 if s < 2 else w1
        a, b = decode_step(s, words[s % 2 * 2], words[s % 2 * 2 + 1], signs0, signs1, levels, WIDTH)
        y = x[s // 2]
        u = mma_s8(a[0], a[1], a[2], a[3], y[s % 2 * 2], y[s % 2 * 2 + 1], u[0], u[1], u[2], u[3])
        v = mma_s8(b[0], b[1], b[2], b[3], y[s % 2 * 2], y[s % 2 * 2 + 1], v[0], v[1], v[2], v[3])
    return u, v


@triton.jit
def _add_planes(sums, high, low, meta, norm0, norm1):
    """sums of rows g and g + 8 times row q of x, plus what products of planes are worth."""
    scale = as_float(meta[0])
    middle = as_float(meta[1])
    added = ()
    for i in tl.static_range(2):
        # The largest first: with it go nearly all of the starts, so that what is rounded later is smaller.
        value = as_float(high[2 * i]) * scale + as_float(meta[2])
        value = as_float(low[2 * i]) * (2 * middle) + value
        value = as_float(high[2 * i + 1]) * middle + value
        value = as_float(low[2 * i + 1]) * (middle * 0.0078125) + value
        added = added + (sums[i] + value * (norm0 if i == 0 else norm1),)
    return added


@triton.jit(do_not_specialize=["M", "N", "blocks"])
def _exact_planes_kernel(
    tiles_ptr,
    norms_ptr,
    table_ptr,
    x_ptr,
    meta_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    blocks,
    WIDTH: tl.constexpr,
    WARPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    warp = thread // 32
    g = lane // 4
    first = tl.program_id(0) * blocks
    tile = load_tile(tiles_ptr, first + tl.minimum(warp, blocks - 1), lane, WIDTH)
    high, low = load_levels(table_ptr, lane, _LEVELS)
    levels = high + low
    # Everything above was there before; x and meta come from the kernel before this one.
    q = lane % 4 + wait_for_previous_kernel(thread)
    zero = tl.zeros(lane.shape, tl.float32)
    upper = (zero, zero)
    lower = (zero, zero)
    for step in range(tl.cdiv(blocks, WARPS)):
        block = step * WARPS + warp
        inside = block < blocks
        block = tl.minimum(block, blocks - 1)
        following = first + tl.minimum(block + WARPS, blocks - 1)
        words = x_ptr + (g.to(tl.int64) * blocks + block) * 32 + q * 8
        x = (load_cached(words), load_cached(words + 4))
        meta = load_cached(meta_ptr + (block * _MAX_ROWS + q) * 4)
        norms = tl.load(norms_ptr + (first + block).to(tl.int64) * 8 + g, mask=inside, other=0)
        # Few registers, for more programs on a multiprocessor: the next tile comes as this one's words are used up.
        next0 = load_plane(tiles_ptr, following, 0, lane, WIDTH)
        next1 = load_plane(tiles_ptr, following, 1, lane, WIDTH)
        u, v = _multiply_half_tile(tile[0], tile[1], tile[4][0], tile[4][1], levels, x, meta[3], WIDTH)
        upper = _add_planes(upper, u, v, meta, norm_of(norms, 0), norm_of(norms, 16))
        next2 = load_plane(tiles_ptr, following, 2, lane, WIDTH)
        next3 = load_plane(tiles_ptr, following, 3, lane, WIDTH)
        next4 = load_plane(tiles_ptr, following, 4, lane, WIDTH) if WIDTH == 5 else next0
        u, v = _multiply_half_tile(tile[2], tile[3], tile[4][2], tile[4][3], levels, x, meta[3], WIDTH)
        lower = _add_planes(lower, u, v, meta, norm_of(norms, 32), norm_of(norms, 48))
        tile = (next0, next1, next2, next3, next4)
    store_band(upper + lower, thread, bias_ptr, None, out_ptr, M, N, 1, WARPS, HAS_BIAS, False, True)


def exact_planes_linear(
    x: torch.Tensor,
    tiles: torch.Tensor,
    tile_norms: torch.Tensor,
    awq_scales: torch.Tensor | None,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    """x [M, K] contiguous, bf16 or fp16, 1 to MAX_ROWS rows, times the transposed weight, plus bias: [M, N]."""
    rows = x.shape[0]
    words, meta = quantize_planes(x, awq_scales, table, MAX_ROWS)
    bands = triton.cdiv(out_features, TILE_ROWS)
    out = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    warps = choose_warps(bands)
    _exact_planes_kernel[(bands,)](
        tiles_ptr=tiles,
        norms_ptr=tile_norms.view(torch.int64),
        table_ptr=table,
        x_ptr=words,
        meta_ptr=meta,
        bias_ptr=bias,
        out_ptr=out,
        M=rows,
        N=out_features,
        blocks=tiles.shape[0] // bands,
        WIDTH=tiles.shape[1] // PLANE_WORDS,
        WARPS=warps,
        HAS_BIAS=bias is not None,
        num_warps=warps,
        enable_fp_fusion=True,
        num_stages=1,
        launch_pdl=True,
        maxnreg=128 if warps == 16 else 80 if warps == 8 else None,
    )
    return out
