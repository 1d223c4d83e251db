"""The one-shot dequantisation from tile layout: unpack, look up, transform, norm and AWQ scale, one pass to 16 bits.

A warp takes a tile (32 rows x one 128-block). Levels are looked up in fp16 by byte permutes, low and high bytes apart.
Of the seven index bits the transform turns, the tensor cores turn four (two within a lane's words, two across lanes)
and additions in registers the other three; a lane ends with runs of eight columns of four rows.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from polar_kernels.kernels.decode_halves import decode_eight_halves, load_levels
from polar_kernels.kernels.ptx import load_cached, mma_halves, pack_halves, store_four, unpack_halves
from polar_kernels.kernels.tile_access import load_tile, norm_of
from polar_kernels.tiles import PLANE_WORDS, TILE_ROWS

_WARPS = 4
_BOTH_SIGNS = tl.constexpr(0x80008000 - (1 << 32))  # of two fp16 in a word


@triton.jit
def _turn_four_bits(upper_row, lower_row, ones, zero):
    """Two groups of four columns of rows g and g + 8, their four bits transformed: for each group eight values."""
    negated = ones ^ _BOTH_SIGNS
    a0, a1, a2, a3 = mma_halves(
        upper_row[0], lower_row[0], upper_row[1], lower_row[1], ones, ones, zero, zero, zero, zero, tl.float16
    )
    b0, b1, b2, b3 = mma_halves(
        upper_row[0], lower_row[0], upper_row[1], lower_row[1], ones, negated, zero, zero, zero, zero, tl.float16
    )
    c0, c1, c2, c3 = mma_halves(
        upper_row[2], lower_row[2], upper_row[3], lower_row[3], ones, ones, zero, zero, zero, zero, tl.float16
    )
    d0, d1, d2, d3 = mma_halves(
        upper_row[2], lower_row[2], upper_row[3], lower_row[3], ones, negated, zero, zero, zero, zero, tl.float16
    )
    return (a0, a1, b0, b1, a2, a3, b2, b3), (c0, c1, d0, d1, c2, c3, d2, d3)


@triton.jit
def _turn_three_bits(v0, v1, v2, v3, v4, v5, v6, v7):
    v0, v1, v2, v3, v4, v5, v6, v7 = v0 + v1, v0 - v1, v2 + v3, v2 - v3, v4 + v5, v4 - v5, v6 + v7, v6 - v7
    v0, v1, v2, v3, v4, v5, v6, v7 = v0 + v2, v1 + v3, v0 - v2, v1 - v3, v4 + v6, v5 + v7, v4 - v6, v5 - v7
    return v0 + v4, v1 + v5, v2 + v6, v3 + v7, v0 - v4, v1 - v5, v2 - v6, v3 - v7


@triton.jit
def _store_row(out_ptr, row, column, v, norm, N, K, inverse, HAS_SCALES: tl.constexpr):
    """Eight columns of one row; inverse: 1 / awq_scales of the eight."""
    y = ()
    for i in tl.static_range(8):
        value = v[i] * norm
        if HAS_SCALES:
            value = value * inverse[i]
        y = y + (value,)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    w0 = pack_halves(y[0], y[1], DTYPE)
    w1 = pack_halves(y[2], y[3], DTYPE)
    w2 = pack_halves(y[4], y[5], DTYPE)
    w3 = pack_halves(y[6], y[7], DTYPE)
    keep = ((row < N) & (column < K)).to(tl.int32)
    store_four(out_ptr + row.to(tl.int64) * K + column, w0, w1, w2, w3, keep)


@triton.jit(do_not_specialize=["N", "K", "blocks"])
def _tile_dequantize_kernel(
    tiles_ptr,
    norms_ptr,
    table_ptr,
    scales_ptr,
    out_ptr,
    N,
    K,
    blocks,
    WIDTH: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    WARPS: tl.constexpr,
):
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    g = lane // 4
    q = lane % 4
    band = tl.program_id(1)
    block = tl.program_id(0) * WARPS + thread // 32
    number = band * blocks + tl.minimum(block, blocks - 1)
    tile = load_tile(tiles_ptr, number, lane, WIDTH)
    low, high = load_levels(table_ptr, lane)
    norms = tl.load(norms_ptr + number.to(tl.int64) * 8 + g)
    # The sign of entry (k, n) of H is the parity of k & n: this lane's k is 2 q or 2 q + 1 (and 8 more), its n is g.
    shared = q & (g // 2)
    ones = 0x3C003C00 ^ ((shared ^ (shared // 2)) & 1) * _BOTH_SIGNS ^ ((g & 1) << 31)
    zero = tl.zeros(lane.shape, tl.float32)
    columns = block * 128 + 8 * q
    # The next kernel's tiles may be asked for meanwhile; what this one writes to may still be used by the one before.
    gdc_launch_dependents()
    gdc_wait()
    for half in tl.static_range(2):
        first_row = band * 32 + half * 16 + g
        w0 = tile[2 * half]
        w1 = tile[2 * half + 1]
        s0 = tile[4][2 * half]
        s1 = tile[4][2 * half + 1]
        upper = decode_eight_halves(0, w0[0], s0, low, high, WIDTH)
        lower = decode_eight_halves(0, w0[1], s1, low, high, WIDTH)
        r0a, r0b = _turn_four_bits(upper, lower, ones, zero)
        upper = decode_eight_halves(1, w0[2], s0, low, high, WIDTH)
        lower = decode_eight_halves(1, w0[3], s1, low, high, WIDTH)
        r1a, r1b = _turn_four_bits(upper, lower, ones, zero)
        upper = decode_eight_halves(2, w1[0], s0, low, high, WIDTH)
        lower = decode_eight_halves(2, w1[1], s1, low, high, WIDTH)
        r2a, r2b = _turn_four_bits(upper, lower, ones, zero)
        upper = decode_eight_halves(3, w1[2], s0, low, high, WIDTH)
        lower = decode_eight_halves(3, w1[3], s1, low, high, WIDTH)
        r3a, r3b = _turn_four_bits(upper, lower, ones, zero)
        done = ()
        for i in tl.static_range(8):
            done = done + (_turn_three_bits(r0a[i], r0b[i], r1a[i], r1b[i], r2a[i], r2b[i], r3a[i], r3b[i]),)
        for s in tl.static_range(4):
            column = columns + 32 * s
            inverse = ()
            if HAS_SCALES:
                scales = load_cached(scales_ptr + tl.minimum(column, K - 8))  # columns beyond K are not stored
                for i in tl.static_range(4):
                    first, second = unpack_halves(scales[i], tl.float16)
                    inverse = inverse + (1.0 / first, 1.0 / second)
            for r in tl.static_range(2):
                v = (
                    done[4 * r][2 * s],
                    done[4 * r + 1][2 * s],
                    done[4 * r + 2][2 * s],
                    done[4 * r + 3][2 * s],
                    done[4 * r][2 * s + 1],
                    done[4 * r + 1][2 * s + 1],
                    done[4 * r + 2][2 * s + 1],
                    done[4 * r + 3][2 * s + 1],
                )
                norm = norm_of(norms, 32 * half + 16 * r) * 0.0078125
                _store_row(out_ptr, first_row + 8 * r, column, v, norm, N, K, inverse, HAS_SCALES)


def dequantize_tiles(
    tiles: torch.Tensor,
    tile_norms: torch.Tensor,
    awq_scales: torch.Tensor | None,
    table: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Write W_hat into out [N, K], bf16 or fp16, contiguous, K a multiple of 8."""
    rows, in_features = out.shape
    bands = triton.cdiv(rows, TILE_ROWS)
    blocks = tiles.shape[0] // bands
    if awq_scales is not None and awq_scales.data_ptr() % 16:
        awq_scales = awq_scales.clone()  # a slice of something; the kernel loads 16 bytes at a time
    _tile_dequantize_kernel[(triton.cdiv(blocks, _WARPS), bands)](
        tiles_ptr=tiles,
        norms_ptr=tile_norms.view(torch.int64),
        table_ptr=table,
        scales_ptr=awq_scales,
        out_ptr=out,
        N=rows,
        K=in_features,
        blocks=blocks,
        WIDTH=tiles.shape[1] // PLANE_WORDS,
        HAS_SCALES=awq_scales is not None,
        WARPS=_WARPS,
        num_warps=_WARPS,
        enable_fp_fusion=True,
        launch_pdl=True,
    )
