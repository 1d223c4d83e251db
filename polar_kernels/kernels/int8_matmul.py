"""The product for few rows: codes decoded to int8 in registers, multiplied on the tensor cores, norms once a block.

A warp multiplies one tile (32 rows x one 128-block) by 8 rows of x at a time. Decoding costs about two integer
instructions a weight, the tensor cores the same for 1 row of x as for 8:

- a byte permute looks up four magnitudes 0..7 and four 8..15 at once, a second one makes the mask that picks between;
- negation is a bitwise complement, since levels are half-integers; what a half is worth comes back once a block;
- the integer accumulator starts at 0x4B400000, which read as a float is 12582912 plus the sum.

Warps of a program that share rows split the blocks of K, and add up in shared memory at the end.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from polar_kernels.kernels.band_programs import choose_program
from polar_kernels.kernels.band_sums import ROW_GROUP, store_band
from polar_kernels.kernels.decode_int8 import decode_half_tile
from polar_kernels.kernels.fragments import load_fragment
from polar_kernels.kernels.gpu import multiprocessors
from polar_kernels.kernels.ptx import as_float, load_cached, mma_s8, wait_for_previous_kernel
from polar_kernels.kernels.quantize_activation import quantize_activation
from polar_kernels.kernels.tile_access import half_of, load_part, norm_of, norms_of_part
from polar_kernels.tiles import PLANE_WORDS, TILE_ROWS

MAX_ROWS = 64  # of x in one launch: more would not fit in registers


@triton.jit
def multiply_half_tile(a, x0, x1):
    """16 rows by 128 columns times 8 rows of x: four sums a thread, as bits of 12582912 + sum."""
    start = tl.full(x0[0].shape, 0x4B400000, tl.int32)
    c0, c1, c2, c3 = mma_s8(a[0], a[1], a[2], a[3], x0[0], x0[1], start, start, start, start)
    c0, c1, c2, c3 = mma_s8(a[4], a[5], a[6], a[7], x0[2], x0[3], c0, c1, c2, c3)
    c0, c1, c2, c3 = mma_s8(a[8], a[9], a[10], a[11], x1[0], x1[1], c0, c1, c2, c3)
    c0, c1, c2, c3 = mma_s8(a[12], a[13], a[14], a[15], x1[2], x1[3], c0, c1, c2, c3)
    return as_float(c0), as_float(c1), as_float(c2), as_float(c3)


@triton.jit
def _add_scaled(sums, at: tl.constexpr, products, meta, norms, shift: tl.constexpr):
    """Sums `at` .. at + 3 plus the products of two rows of the weight, whose norms are in a word from bit `shift` on,
    and two of x; meta: the bases and scales of those."""
    base0 = as_float(meta[0])
    scale0 = as_float(meta[1])
    base1 = as_float(meta[2])
    scale1 = as_float(meta[3])
    n0 = norm_of(norms, shift)
    n1 = norm_of(norms, shift + 16)
    return (
        sums[at] + (products[0] * scale0 + base0) * n0,
        sums[at + 1] + (products[1] * scale1 + base1) * n0,
        sums[at + 2] + (products[2] * scale0 + base0) * n1,
        sums[at + 3] + (products[3] * scale1 + base1) * n1,
    )


@triton.jit(do_not_specialize=["M", "N", "blocks", "padded_rows"])
def _int8_matmul_kernel(
    tiles_ptr,
    norms_ptr,
    table_ptr,
    x_ptr,
    meta_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    blocks,
    padded_rows,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    WARPS: tl.constexpr,
    HALVES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    SPREAD: tl.constexpr = GROUPS > 1 and WARPS == 4  # with more warps up to a tenth slower
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    warp = thread // 32
    first = tl.program_id(0) // HALVES * blocks
    half = tl.program_id(0) % HALVES
    tile = load_part(tiles_ptr, first + tl.minimum(warp, blocks - 1), half, lane, HALVES, WIDTH)
    table = load_cached(table_ptr + thread * 0)
    # Everything above was there before; x and meta come from the kernel before this one.
    own = lane + wait_for_previous_kernel(thread)
    if GROUPS == 1:
        gdc_launch_dependents()  # the next kernel's start costs nothing then; with more rows it is in the way
    q = own % 4
    sums = ()
    for _ in tl.static_range(8 // HALVES * GROUPS):
        sums = sums + (tl.zeros(lane.shape, tl.float32),)
    for step in range(tl.cdiv(blocks, WARPS)):
        block = step * WARPS + warp
        inside = block < blocks
        block = tl.minimum(block, blocks - 1)
        decoded = ()
        for number in tl.static_range(2 // HALVES):
            words = half_of(tile, number, HALVES)
            decoded = decoded + (decode_half_tile(words[0], words[1], words[2], words[3], table, table, WIDTH, SPREAD),)
        tile = load_part(tiles_ptr, first + tl.minimum(block + WARPS, blocks - 1), half, lane, HALVES, WIDTH)
        norms = tl.load(norms_of_part(norms_ptr, first + block, half, lane, HALVES), mask=inside, other=0)
        added = ()
        for group in tl.static_range(GROUPS):
            x = load_fragment(x_ptr, group, blocks, block, own, 1)
            meta = load_cached(meta_ptr + (block * padded_rows + group * 8 + 2 * q) * 2)
            for number in tl.static_range(2 // HALVES):
                products = multiply_half_tile(decoded[number], x[0], x[1])
                added = added + _add_scaled(sums, 8 // HALVES * group + 4 * number, products, meta, norms, 32 * number)
        sums = added
    store_band(sums, thread, bias_ptr, residual_ptr, out_ptr, M, N, GROUPS, WARPS, HALVES, HAS_BIAS, HAS_RESIDUAL)


def int8_linear(
    x: torch.Tensor,
    tiles: torch.Tensor,
    tile_norms: torch.Tensor,
    awq_scales: torch.Tensor | None,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    """x [M, K] contiguous, 1 <= M <= MAX_ROWS, times the transposed weight, plus bias: [M, N] in x's dtype."""
    words, meta = quantize_activation(x, awq_scales, table, padded_rows(x.shape[0]))
    out = torch.empty(x.shape[0], out_features, dtype=x.dtype, device=x.device)
    return multiply_quantized(words, meta, tiles, tile_norms, table, bias, None, out)


def padded_rows(rows: int) -> int:
    """Rows of x that the product reads in place of so many."""
    return triton.next_power_of_2(triton.cdiv(rows, ROW_GROUP)) * ROW_GROUP


def multiply_quantized(
    words: torch.Tensor,
    meta: torch.Tensor,
    tiles: torch.Tensor,
    tile_norms: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """`out` [M, N], with the product of what `quantize_activation` made, plus bias, plus residual [M, N] contiguous."""
    rows, out_features = out.shape
    groups = meta.shape[1] // ROW_GROUP
    bands = triton.cdiv(out_features, TILE_ROWS)
    blocks = tiles.shape[0] // bands
    program = choose_program(bands, blocks, groups, multiprocessors(out.device))
    _int8_matmul_kernel[(bands * program.halves,)](
        tiles_ptr=tiles,
        norms_ptr=tile_norms.view(torch.int64 if program.halves == 1 else torch.int32),
        table_ptr=table,
        x_ptr=words,
        meta_ptr=meta,
        bias_ptr=bias,
        residual_ptr=residual,
        out_ptr=out,
        M=rows,
        N=out_features,
        blocks=blocks,
        padded_rows=meta.shape[1],
        WIDTH=tiles.shape[1] // PLANE_WORDS,
        GROUPS=groups,
        WARPS=program.warps,
        HALVES=program.halves,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        num_warps=program.warps,
        enable_fp_fusion=True,
        num_stages=1,
        launch_pdl=True,
        maxnreg=program.registers,
    )
    return out
