"""The product for few rows with activations and levels in 16 bits: `int8_matmul` without its rounding.

A warp multiplies one tile (32 rows x one 128-block) by 8 rows of x at a time, 16 columns a step. Levels are looked up
in shared memory (`decode_pairs`). Norms are applied once a block, to the sums.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from polar_kernels.kernels.band_programs import choose_program
from polar_kernels.kernels.band_sums import ROW_GROUP, store_band
from polar_kernels.kernels.decode_pairs import decode_eight_pairs, open_pairs, spread_signs
from polar_kernels.kernels.fragments import load_fragment
from polar_kernels.kernels.gpu import multiprocessors
from polar_kernels.kernels.ptx import mma_halves, wait_for_previous_kernel
from polar_kernels.kernels.rotate_activation import rotate_activation
from polar_kernels.kernels.tile_access import half_of, load_part, norm_of, norms_of_part
from polar_kernels.tiles import PLANE_WORDS, TILE_ROWS

MAX_ROWS = 16  # of x in one launch


@triton.jit
def multiply_half_tile_exactly(
    w0, w1, signs0, signs1, pairs, x, WIDTH: tl.constexpr, GROUPS: tl.constexpr, DTYPE: tl.constexpr
):
    """16 rows by 128 columns times GROUPS groups of 8 rows of x: four sums a thread and group."""
    signs0 = spread_signs(signs0)
    signs1 = spread_signs(signs1)
    sums = ()
    for _ in tl.static_range(4 * GROUPS):
        sums = sums + (tl.zeros(signs0.shape, tl.float32),)
    for s in tl.static_range(4):
        words = w0 if s < 2 else w1
        u0, u1, u2, u3 = decode_eight_pairs(s, words[s % 2 * 2], signs0, pairs, WIDTH)
        v0, v1, v2, v3 = decode_eight_pairs(s, words[s % 2 * 2 + 1], signs1, pairs, WIDTH)
        added = ()
        for group in tl.static_range(GROUPS):
            b = x[4 * group + s]
            c = (sums[4 * group], sums[4 * group + 1], sums[4 * group + 2], sums[4 * group + 3])
            c = mma_halves(u0, v0, u1, v1, b[0], b[1], c[0], c[1], c[2], c[3], DTYPE)
            c = mma_halves(u2, v2, u3, v3, b[2], b[3], c[0], c[1], c[2], c[3], DTYPE)
            added = added + (c[0], c[1], c[2], c[3])
        sums = added
    return sums


@triton.jit
def _add_scaled(sums, at: tl.constexpr, products, first: tl.constexpr, norms, shift: tl.constexpr):
    """Sums `at` .. at + 3 plus the products from `first` on, of two rows of the weight, whose norms are in a word from
    bit `shift` on."""
    n0 = norm_of(norms, shift)
    n1 = norm_of(norms, shift + 16)
    return (
        sums[at] + products[first] * n0,
        sums[at + 1] + products[first + 1] * n0,
        sums[at + 2] + products[first + 2] * n1,
        sums[at + 3] + products[first + 3] * n1,
    )


@triton.jit(do_not_specialize=["M", "N", "blocks"])
def _exact_matmul_kernel(
    tiles_ptr,
    norms_ptr,
    table_ptr,
    x_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    blocks,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    WARPS: tl.constexpr,
    HALVES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    warp = thread // 32
    first = tl.program_id(0) // HALVES * blocks
    half = tl.program_id(0) % HALVES
    tile = load_part(tiles_ptr, first + tl.minimum(warp, blocks - 1), half, lane, HALVES, WIDTH)
    pairs = open_pairs(table_ptr, thread, DTYPE, 32 * WARPS)
    # Everything above was there before; x comes from the kernel before this one.
    own = lane + wait_for_previous_kernel(thread)
    if GROUPS == 1:
        gdc_launch_dependents()  # the next kernel's start costs nothing then; with more rows it is in the way
    sums = ()
    for _ in tl.static_range(8 // HALVES * GROUPS):
        sums = sums + (tl.zeros(lane.shape, tl.float32),)
    for step in range(tl.cdiv(blocks, WARPS)):
        block = step * WARPS + warp
        inside = block < blocks
        block = tl.minimum(block, blocks - 1)
        x = ()
        for group in tl.static_range(GROUPS):
            x = x + load_fragment(x_ptr, group, blocks, block, own, 2)
        following = load_part(tiles_ptr, first + tl.minimum(block + WARPS, blocks - 1), half, lane, HALVES, WIDTH)
        products = ()
        for number in tl.static_range(2 // HALVES):
            words = half_of(tile, number, HALVES)
            products = products + (
                multiply_half_tile_exactly(words[0], words[1], words[2], words[3], pairs, x, WIDTH, GROUPS, DTYPE),
            )
        tile = following
        norms = tl.load(norms_of_part(norms_ptr, first + block, half, lane, HALVES), mask=inside, other=0)
        added = ()
        for group in tl.static_range(GROUPS):
            for number in tl.static_range(2 // HALVES):
                added = added + _add_scaled(
                    sums, 8 // HALVES * group + 4 * number, products[number], 4 * group, norms, 32 * number
                )
        sums = added
    store_band(sums, thread, bias_ptr, None, out_ptr, M, N, GROUPS, WARPS, HALVES, HAS_BIAS, False)


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
    groups = triton.next_power_of_2(triton.cdiv(rows, ROW_GROUP))
    words = rotate_activation(x, awq_scales, groups * ROW_GROUP)
    bands = triton.cdiv(out_features, TILE_ROWS)
    blocks = tiles.shape[0] // bands
    out = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    program = choose_program(bands, blocks, groups, multiprocessors(out.device), exact=True)
    _exact_matmul_kernel[(bands * program.halves,)](
        tiles_ptr=tiles,
        norms_ptr=tile_norms.view(torch.int64 if program.halves == 1 else torch.int32),
        table_ptr=table,
        x_ptr=words,
        bias_ptr=bias,
        out_ptr=out,
        M=rows,
        N=out_features,
        blocks=blocks,
        WIDTH=tiles.shape[1] // PLANE_WORDS,
        GROUPS=groups,
        WARPS=program.warps,
        HALVES=program.halves,
        HAS_BIAS=bias is not None,
        num_warps=program.warps,
        enable_fp_fusion=True,
        num_stages=1,
        launch_pdl=True,
        maxnreg=program.registers,
    )
    return out
