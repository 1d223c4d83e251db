"""How a product by `wgmma` is launched, and the kernel that adds up the sums of programs that share K."""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from polar_kernels.kernels.ptx import first_lane
from polar_kernels.kernels.shared_memory import shared_memory, shared_piece
from polar_kernels.kernels.wgmma_forms import Form
from polar_kernels.kernels.wgmma_output import add_parts, store_sums
from polar_kernels.tiles import PLANE_WORDS, TILE_ROWS


@triton.jit
def share_of_program(all_threads, WARPS: tl.constexpr, SHARES: tl.constexpr):
    """A thread's number among the WARPS warps of its share of K, and which share of the program that is."""
    thread = all_threads % (32 * WARPS)
    share = tl.program_id(2) * 0
    if SHARES > 1:
        share = first_lane(all_threads // (32 * WARPS))
    return thread, share


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


def launch_cut(
    kernel: Any,
    words: torch.Tensor,
    x: torch.Tensor,
    tiles: torch.Tensor,
    tile_norms: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    cut: tuple[Form, int],
) -> torch.Tensor:
    """x [M, K] times the transposed weight, plus bias: [M, N] in x's dtype, by a kernel of chunks.

    words: x's chunks, [ceil(M / rows), ...]; cut: the form, and how many blocks of K a share of a program takes at
    most, a multiple of SCALE_BLOCKS.
    """
    form, split_blocks = cut
    rows = x.shape[0]
    blocks = tiles.shape[0] // triton.cdiv(out_features, TILE_ROWS)
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
    kernel[(row_programs, columns, splits)](
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
