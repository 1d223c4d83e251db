"""The product for more rows on Hopper: codes decoded to int8 in registers, multiplied by `wgmma`, x in shared memory.

A program takes 16 rows of the weight a warp by 64, 128 or 256 of x. `wgmma_blocks` multiplies, `wgmma_forms` has the
ways to cut a product into programs, `wgmma_output` what happens to the sums in the end. Where the weight has too few
rows to fill the GPU, programs split the blocks of K, and a second kernel adds up.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from polar_kernels.kernels.quantize_chunks import quantize_chunks
from polar_kernels.kernels.wgmma_blocks import multiply_bands
from polar_kernels.kernels.wgmma_forms import SCALE_BLOCKS, Form, choose_cut
from polar_kernels.kernels.wgmma_output import add_bias, add_halves, store_each, store_lines
from polar_kernels.tiles import PLANE_WORDS, TILE_ROWS

_SUM_SIZE = 1024
_SHARE = tl.constexpr(SCALE_BLOCKS)


@triton.jit(do_not_specialize=["M", "N", "blocks", "split_blocks", "stride"])
def _int8_wgmma_kernel(
    tiles_ptr,
    norms_ptr,
    table_ptr,
    x_ptr,
    halves_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    blocks,
    split_blocks,
    stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    PRODUCTS: tl.constexpr,
    WARPS: tl.constexpr,
    SHARED: tl.constexpr,
    UNROLLED: tl.constexpr,
    LATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LINES: tl.constexpr,
    IN_PARTS: tl.constexpr,
):
    GROUPS: tl.constexpr = ROWS // 8 * PRODUCTS
    thread = tl.arange(0, 32 * WARPS)
    g = thread % 32 // 4
    half = thread // 32 % 2
    band = tl.program_id(1) * (WARPS // 2) + thread // 64
    first_block = tl.program_id(2) * split_blocks
    count = tl.minimum(blocks - first_block, split_blocks)
    first = tl.minimum(band, tl.cdiv(N, 32) - 1) * blocks + first_block
    first_chunk = (tl.program_id(0).to(tl.int64) * blocks + first_block) * PRODUCTS
    sums, q, shared = multiply_bands(
        tiles_ptr,
        norms_ptr,
        table_ptr,
        x_ptr,
        first_chunk,
        first,
        count,
        thread,
        WIDTH,
        ROWS,
        PRODUCTS,
        WARPS,
        SHARED,
        _SHARE,
        UNROLLED,
        LATE,
    )
    first_row = tl.program_id(0) * (ROWS * PRODUCTS)
    halves = halves_ptr + first_row.to(tl.int64) * stride + first_block // 2
    sums = add_halves(sums, norms_ptr, halves, first, count, stride, g, half, q, GROUPS)
    row = band * 32 + half * 16 + g
    if HAS_BIAS:
        sums = add_bias(sums, bias_ptr, row, N, GROUPS)
    if LINES:
        first_column = tl.program_id(1) * (16 * WARPS)
        store_lines(sums, out_ptr, shared, thread, first_row, first_column, M, N, N, GROUPS, WARPS)
    else:
        out = out_ptr + tl.program_id(2).to(tl.int64) * M * N
        store_each(sums, out, first_row, row, q, M, N, N, GROUPS)
    if IN_PARTS:
        gdc_launch_dependents()  # what adds up: each program of this kernel is done


@triton.jit(do_not_specialize=["N"])  # of a size that is a multiple of 16 four sums are loaded at a time
def _add_splits_kernel(
    parts_ptr, bias_ptr, out_ptr, size, N, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, SIZE: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    keep = index < size
    y = tl.zeros((SIZE,), tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + index % N, mask=keep, other=0.0).to(tl.float32)
    gdc_wait()
    for split in tl.static_range(SPLITS):  # unrolled, so that no load waits for another
        y += tl.load(parts_ptr + split * size.to(tl.int64) + index, mask=keep, other=0.0)
    tl.store(out_ptr + index, y.to(out_ptr.dtype.element_ty), mask=keep)


def int8_wgmma_linear(
    x: torch.Tensor,
    tiles: torch.Tensor,
    tile_norms: torch.Tensor,
    awq_scales: torch.Tensor | None,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    cut: tuple[Form, int] | None = None,
) -> torch.Tensor:
    """x [M, K] contiguous, bf16 or fp16, times the transposed weight, plus bias: [M, N] in x's dtype.

    cut: the form, and how many blocks of K a program takes at most, a multiple of SCALE_BLOCKS; by shape when None.
    """
    rows = x.shape[0]
    blocks = tiles.shape[0] // triton.cdiv(out_features, TILE_ROWS)
    form, split_blocks = cut or choose_cut(rows, out_features, blocks, _multiprocessors(x.device))
    words, halves = quantize_chunks(x, awq_scales, table, form.product_rows, form.products)
    splits = triton.cdiv(blocks, split_blocks)
    out = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    parts = out if splits == 1 else torch.empty(splits, rows, out_features, dtype=torch.float32, device=x.device)
    _int8_wgmma_kernel[(words.shape[0], triton.cdiv(out_features, 16 * form.warps), splits)](
        tiles_ptr=tiles,
        norms_ptr=tile_norms.view(torch.int32),
        table_ptr=table,
        x_ptr=words,
        halves_ptr=halves.view(torch.int32),
        bias_ptr=bias if splits == 1 else None,
        out_ptr=parts,
        M=rows,
        N=out_features,
        blocks=blocks,
        split_blocks=split_blocks,
        stride=halves.shape[1] // 2,
        WIDTH=tiles.shape[1] // PLANE_WORDS,
        ROWS=form.product_rows,
        PRODUCTS=form.products,
        WARPS=form.warps,
        SHARED=form.shared_bytes,
        UNROLLED=form.unrolled if blocks % SCALE_BLOCKS == 0 else 1,
        LATE=form.late,
        HAS_BIAS=bias is not None and splits == 1,
        LINES=splits == 1 and out_features % 8 == 0,
        IN_PARTS=splits > 1,
        num_warps=form.warps,
        enable_fp_fusion=True,
        num_stages=1,
        launch_pdl=True,
        maxnreg=form.registers,
    )
    if splits > 1:
        _add_splits_kernel[(triton.cdiv(out.numel(), _SUM_SIZE),)](
            parts_ptr=parts,
            bias_ptr=bias,
            out_ptr=out,
            size=out.numel(),
            N=out_features,
            SPLITS=splits,
            HAS_BIAS=bias is not None,
            SIZE=_SUM_SIZE,
            num_warps=4,
            enable_fp_fusion=True,
            launch_pdl=True,
        )
    return out


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
