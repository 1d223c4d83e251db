"""The product for more rows on Hopper: codes decoded to int8 in registers, multiplied by `wgmma`, x in shared memory.

A program takes 16 rows of the weight a warp by 64 or 128 of x. `wgmma_blocks` multiplies, `wgmma_forms` has the
ways to cut a product into programs, `wgmma_output` what happens to the sums in the end. Where the weight has too few
rows to fill the GPU, the warps of a program share the blocks of K, and programs do, whose sums a second kernel adds up.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from polar_kernels.kernels.ptx import first_lane
from polar_kernels.kernels.quantize_chunks import quantize_chunks
from polar_kernels.kernels.shared_memory import shared_memory, shared_piece
from polar_kernels.kernels.wgmma_blocks import multiply_bands, piece_bytes
from polar_kernels.kernels.wgmma_forms import SCALE_BLOCKS, Form, choose_cut
from polar_kernels.kernels.wgmma_output import add_parts, add_shares, store_part, store_sums
from polar_kernels.tiles import PLANE_WORDS, TILE_ROWS

_SHARE = tl.constexpr(SCALE_BLOCKS)


@triton.jit(do_not_specialize=["M", "N", "blocks", "split_blocks"])
def _int8_wgmma_kernel(
    tiles_ptr,
    norms_ptr,
    table_ptr,
    x_ptr,
    bias_ptr,
    out_ptr,
    parts_ptr,
    M,
    N,
    blocks,
    split_blocks,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    SHARES: tl.constexpr,
    X_SLOTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LINES: tl.constexpr,
    IN_PARTS: tl.constexpr,
):
    GROUPS: tl.constexpr = ROWS // 8 // SHARES
    SIZE: tl.constexpr = piece_bytes(ROWS, X_SLOTS, WIDTH, WARPS)
    all_threads = tl.arange(0, 32 * WARPS * SHARES)
    memory = shared_memory(x_ptr, blocks < 0, all_threads, SHARES, SIZE)
    thread = all_threads % (32 * WARPS)
    share = tl.program_id(2) * 0
    if SHARES > 1:
        share = first_lane(all_threads // (32 * WARPS))
    shared = shared_piece(memory, share, SHARES, SIZE)
    first_band = tl.program_id(1) * (WARPS // 2)
    program_block = tl.program_id(2) * (SHARES * split_blocks)
    first_block = program_block + share * split_blocks
    padded = tl.cdiv(blocks, _SHARE) * _SHARE
    sums = multiply_bands(
        tiles_ptr,
        norms_ptr,
        table_ptr,
        x_ptr,
        tl.program_id(0).to(tl.int64) * padded + first_block,
        first_band * blocks + first_block,
        blocks,
        tl.cdiv(N, 32) - first_band,
        tl.minimum(blocks - first_block, split_blocks),
        tl.minimum(padded - first_block, split_blocks),
        tl.minimum(padded - program_block, split_blocks),
        shared,
        thread,
        WIDTH,
        ROWS,
        WARPS,
        X_SLOTS,
    )
    first_row = tl.program_id(0) * ROWS
    if SHARES > 1:
        sums = add_shares(sums, memory, share, thread, ROWS // 8, SHARES, SIZE, WARPS)
        first_row += share * (ROWS // SHARES)
    if IN_PARTS:
        tile = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        place = tile * tl.num_programs(2) + tl.program_id(2)
        store_part(sums, parts_ptr, place, all_threads, GROUPS, WARPS * SHARES)
        gdc_launch_dependents()  # what adds up: each program of this kernel is done
    else:
        first_column = first_band * 32
        store_sums(
            sums, bias_ptr, out_ptr, shared, thread, first_row, first_column, M, N, N, GROUPS, WARPS, HAS_BIAS, LINES
        )


@triton.jit(do_not_specialize=["M", "N"])
def _add_parts_kernel(
    parts_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    SHARES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LINES: tl.constexpr,
):
    """A program adds up the parts of 16 rows of x and stores them."""
    GROUPS: tl.constexpr = ROWS // 8 // SHARES
    SIZE: tl.constexpr = 16 * (32 * WARPS + 16)
    thread = tl.arange(0, 32 * WARPS)
    pair = tl.program_id(2)
    shared = shared_piece(shared_memory(parts_ptr, M < 0, thread, 1, SIZE), 0, 1, SIZE)
    gdc_wait()
    place = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * SPLITS
    sums = add_parts(parts_ptr, place, pair, thread, GROUPS, WARPS, SHARES, SPLITS)
    first_row = tl.program_id(0) * ROWS + pair * 16
    first_column = tl.program_id(1) * (16 * WARPS)
    store_sums(sums, bias_ptr, out_ptr, shared, thread, first_row, first_column, M, N, N, 2, WARPS, HAS_BIAS, LINES)


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

    cut: the form, and how many blocks of K a share of a program takes at most, a multiple of SCALE_BLOCKS; by shape
    when None.
    """
    rows = x.shape[0]
    blocks = tiles.shape[0] // triton.cdiv(out_features, TILE_ROWS)
    form, split_blocks = cut or choose_cut(rows, out_features, blocks, _multiprocessors(x.device))
    words = quantize_chunks(x, awq_scales, table, form.rows)
    out = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    row_programs, columns = words.shape[0], triton.cdiv(out_features, 16 * form.warps)
    splits = triton.cdiv(blocks, split_blocks * form.shares)
    sums = row_programs * form.rows * columns * 16 * form.warps
    parts = out if splits == 1 else torch.empty(splits, sums, dtype=torch.float32, device=x.device)
    common: dict[str, Any] = {
        "parts_ptr": parts,
        "bias_ptr": bias,
        "out_ptr": out,
        "M": rows,
        "N": out_features,
        "ROWS": form.rows,
        "WARPS": form.warps,
        "SHARES": form.shares,
        "HAS_BIAS": bias is not None,
        "LINES": out_features % 8 == 0,
        "enable_fp_fusion": True,
        "launch_pdl": True,
    }
    _int8_wgmma_kernel[(row_programs, columns, splits)](
        tiles_ptr=tiles,
        norms_ptr=tile_norms.view(torch.int32),
        table_ptr=table,
        x_ptr=words,
        blocks=blocks,
        split_blocks=split_blocks,
        WIDTH=tiles.shape[1] // PLANE_WORDS,
        X_SLOTS=form.x_slots,
        IN_PARTS=splits > 1,
        num_warps=form.warps * form.shares,
        num_stages=1,
        maxnreg=form.registers,
        **common,
    )
    if splits > 1:
        _add_parts_kernel[(row_programs, columns, form.rows // 16)](SPLITS=splits, num_warps=form.warps, **common)
    return out


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
