"""The product for few rows that is exact but for what rounding to fp16 costs many times over: `int8_matmul` in planes.

Levels are a sign and 14 bits, and x, in the rotated domain, 16 bits of one scale a block. Either is two planes of int8,
whose products are integers. A warp multiplies one tile (32 rows x one 128-block) by 4 rows of x at a time: of the eight
columns that the tensor cores take, two are the planes of a row of x, side by side, so that one lane has all four
products of planes. It adds them up as floats.

Decoding costs half as much again as to int8, and is what bounds the larger shapes. To fp16 or bf16 it would cost twice
as much, since bytes that are looked up apart have to be put together.
"""

import torch
import triton
import triton.language as tl

from polar_kernels.kernels.band_sums import store_band
from polar_kernels.kernels.decode_planes import decode_step
from polar_kernels.kernels.ptx import as_float, hidden_zero, load_cached, mma_s8, wait_for_previous_kernel
from polar_kernels.kernels.quantize_planes import quantize_planes
from polar_kernels.kernels.tile_access import load_plane, load_tile, norm_of
from polar_kernels.tiles import PLANE_LEVELS, PLANE_WORDS, TILE_ROWS

MAX_ROWS = 32  # of x in one launch: more would not fit in registers
_PLANE_ROWS = 4  # of x, two columns each
_LEVELS = tl.constexpr(PLANE_LEVELS)


@triton.jit
def _multiply_decoding(w0, w1, signs0, signs1, levels, x, start, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """16 rows by 128 columns times GROUPS groups of 4 rows of x, decoded as they are multiplied: four sums a group with
    the high plane, and four with the low one, as bits of 12582912 + sum. start: where the latter with x's high plane
    start."""
    begin = tl.full(signs0.shape, 0x4B400000, tl.int32)
    high = ()
    low = ()
    for group in tl.static_range(GROUPS):
        high = high + (begin, begin, begin, begin)
        low = low + (start[group], begin, start[group], begin)
    for s in tl.static_range(4):
        words = w0 if s < 2 else w1
        a, b = decode_step(s, words[s % 2 * 2], words[s % 2 * 2 + 1], signs0, signs1, levels, WIDTH)
        u = ()
        v = ()
        for group in tl.static_range(GROUPS):
            y = x[2 * group + s // 2]
            c = (high[4 * group], high[4 * group + 1], high[4 * group + 2], high[4 * group + 3])
            d = (low[4 * group], low[4 * group + 1], low[4 * group + 2], low[4 * group + 3])
            u = u + mma_s8(a[0], a[1], a[2], a[3], y[s % 2 * 2], y[s % 2 * 2 + 1], c[0], c[1], c[2], c[3])
            v = v + mma_s8(b[0], b[1], b[2], b[3], y[s % 2 * 2], y[s % 2 * 2 + 1], d[0], d[1], d[2], d[3])
        high = u
        low = v
    return high, low


@triton.jit
def _decode_half_tile(w0, w1, signs0, signs1, levels, WIDTH: tl.constexpr):
    """The A fragments of 16 rows by 128 columns, the high plane's and the low one's: for each of four steps."""
    high = ()
    low = ()
    for s in tl.static_range(4):
        words = w0 if s < 2 else w1
        a, b = decode_step(s, words[s % 2 * 2], words[s % 2 * 2 + 1], signs0, signs1, levels, WIDTH)
        high = high + (a,)
        low = low + (b,)
    return high, low


@triton.jit
def _multiply_plane(a, x0, x1, even, odd):
    """One plane of those times 4 rows of x: four sums, as above; even, odd: where those with x's two planes start."""
    c = (even, odd, even, odd)
    for s in tl.static_range(4):
        y = x0 if s < 2 else x1
        c = mma_s8(a[s][0], a[s][1], a[s][2], a[s][3], y[s % 2 * 2], y[s % 2 * 2 + 1], c[0], c[1], c[2], c[3])
    return c


@triton.jit
def _add_planes(sums, high, low, meta, norm0, norm1, GROUPS: tl.constexpr):
    """sums of rows g and g + 8 times row q of each group, plus what products of planes are worth."""
    added = ()
    for group in tl.static_range(GROUPS):
        scale = as_float(meta[group][0])
        middle = as_float(meta[group][1])
        for i in tl.static_range(2):
            # The largest first: with it go nearly all of the starts, so that what is rounded later is smaller.
            value = as_float(high[4 * group + 2 * i]) * scale + as_float(meta[group][2])
            value = as_float(low[4 * group + 2 * i]) * (2 * middle) + value
            value = as_float(high[4 * group + 2 * i + 1]) * middle + value
            value = as_float(low[4 * group + 2 * i + 1]) * (middle * 0.0078125) + value
            added = added + (sums[2 * group + i] + value * (norm0 if i == 0 else norm1),)
    return added


@triton.jit(do_not_specialize=["M", "N", "blocks", "padded_rows"])
def _exact_matmul_kernel(
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
    padded_rows,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    WARPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    warp = thread // 32
    g = lane // 4
    first = tl.program_id(0) * blocks
    tile = load_tile(tiles_ptr, first + tl.minimum(warp, blocks - 1), lane, WIDTH)
    levels_ptr = table_ptr + _LEVELS + hidden_zero(lane)
    levels = load_cached(levels_ptr) + load_cached(levels_ptr + 4)
    # Everything above was there before; x and meta come from the kernel before this one.
    q = lane % 4 + wait_for_previous_kernel(thread)
    begin = tl.full(lane.shape, 0x4B400000, tl.int32)
    upper = ()
    for _ in tl.static_range(2 * GROUPS):
        upper = upper + (tl.zeros(lane.shape, tl.float32),)
    lower = upper
    for step in range(tl.cdiv(blocks, WARPS)):
        block = step * WARPS + warp
        inside = block < blocks
        block = tl.minimum(block, blocks - 1)
        following = first + tl.minimum(block + WARPS, blocks - 1)
        x_at = x_ptr + (g.to(tl.int64) * blocks + block) * 32 + q * 8
        meta_at = meta_ptr + (block * padded_rows + q) * 4
        norms = tl.load(norms_ptr + (first + block).to(tl.int64) * 8 + g, mask=inside, other=0)
        n0 = norm_of(norms, 0)
        n1 = norm_of(norms, 16)
        n2 = norm_of(norms, 32)
        n3 = norm_of(norms, 48)
        if GROUPS <= 2:
            # Few registers, for more programs on a multiprocessor: as little as possible is decoded ahead.
            x = ()
            meta = ()
            start = ()
            for group in tl.static_range(GROUPS):
                words = x_at + group * blocks * 256
                x = x + (load_cached(words), load_cached(words + 4))
                own = load_cached(meta_at + group * 16)
                meta = meta + (own,)
                start = start + (own[3],)
            next0 = load_plane(tiles_ptr, following, 0, lane, WIDTH)
            next1 = load_plane(tiles_ptr, following, 1, lane, WIDTH)
            u, v = _multiply_decoding(tile[0], tile[1], tile[4][0], tile[4][1], levels, x, start, WIDTH, GROUPS)
            upper = _add_planes(upper, u, v, meta, n0, n1, GROUPS)
            next2 = load_plane(tiles_ptr, following, 2, lane, WIDTH)
            next3 = load_plane(tiles_ptr, following, 3, lane, WIDTH)
            next4 = load_plane(tiles_ptr, following, 4, lane, WIDTH) if WIDTH == 5 else next0
            u, v = _multiply_decoding(tile[2], tile[3], tile[4][2], tile[4][3], levels, x, start, WIDTH, GROUPS)
            lower = _add_planes(lower, u, v, meta, n2, n3, GROUPS)
            tile = (next0, next1, next2, next3, next4)
        else:
            h0, l0 = _decode_half_tile(tile[0], tile[1], tile[4][0], tile[4][1], levels, WIDTH)
            h1, l1 = _decode_half_tile(tile[2], tile[3], tile[4][2], tile[4][3], levels, WIDTH)
            tile = load_tile(tiles_ptr, following, lane, WIDTH)
            # Again from the L1, so that the table takes no registers beside x.
            levels = load_cached(levels_ptr) + load_cached(levels_ptr + 4)
            # Four groups at a time, by a loop: of eight at once ptxas would load x so early that it spills. The sums
            # that are yet to come move to the front.
            for _part in range(GROUPS // 4):
                added = ()
                below = ()
                for group in tl.static_range(GROUPS - 4):
                    added = added + (upper[2 * group + 8], upper[2 * group + 9])
                    below = below + (lower[2 * group + 8], lower[2 * group + 9])
                for group in tl.static_range(4):
                    words = x_at + group * blocks * 256
                    x0 = load_cached(words)
                    x1 = load_cached(words + 4)
                    meta = load_cached(meta_at + group * 16)
                    u = _multiply_plane(h0, x0, x1, begin, begin)
                    v = _multiply_plane(l0, x0, x1, meta[3], begin)
                    added = added + _add_planes((upper[2 * group], upper[2 * group + 1]), u, v, (meta,), n0, n1, 1)
                    u = _multiply_plane(h1, x0, x1, begin, begin)
                    v = _multiply_plane(l1, x0, x1, meta[3], begin)
                    below = below + _add_planes((lower[2 * group], lower[2 * group + 1]), u, v, (meta,), n2, n3, 1)
                upper = added
                lower = below
                x_at += blocks * 1024
                meta_at += 64
    sums = ()
    for group in tl.static_range(GROUPS):
        sums = sums + (upper[2 * group], upper[2 * group + 1], lower[2 * group], lower[2 * group + 1])
    store_band(sums, thread, bias_ptr, None, out_ptr, M, N, GROUPS, WARPS, HAS_BIAS, False, True)


def exact_linear(
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
    groups = triton.next_power_of_2(triton.cdiv(rows, _PLANE_ROWS))
    words, meta = quantize_planes(x, awq_scales, table, groups * _PLANE_ROWS)
    bands = triton.cdiv(out_features, TILE_ROWS)
    out = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    warps = _choose_warps(bands, groups)
    _exact_matmul_kernel[(bands,)](
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
        padded_rows=groups * _PLANE_ROWS,
        WIDTH=tiles.shape[1] // PLANE_WORDS,
        GROUPS=groups,
        WARPS=warps,
        HAS_BIAS=bias is not None,
        num_warps=warps,
        enable_fp_fusion=True,
        num_stages=1,
        launch_pdl=True,
        maxnreg=_choose_registers(warps, groups),
    )
    return out


def _choose_warps(bands: int, groups: int) -> int:
    """Warps that share a band: few bands want many each, to fill the GPU. Many groups leave registers for few."""
    if groups >= 4:
        return 8 if bands <= 128 else 4
    if bands <= 128:
        return 16
    return 8 if bands < 4096 else 4


def _choose_registers(warps: int, groups: int) -> int | None:
    """Registers of a thread at most: room for three programs of 8 warps, or one of 16; else as ptxas sees fit."""
    if warps == 16:
        return 128  # all that there are
    return 80 if groups == 1 and warps == 8 else None
