"""The product for more rows on Hopper with activations and levels in 16 bits: `int8_wgmma` without its rounding.

A program takes 16 rows of the weight a warp by 32, 64 or 128 of x. `exact_blocks` multiplies; how a product is cut into
programs, launched and stored is the same for both.
"""

import torch
import triton
import triton.language as tl

from polar_kernels.kernels.decode_pairs import open_pairs
from polar_kernels.kernels.exact_blocks import exact_piece_bytes, multiply_bands_exactly
from polar_kernels.kernels.gpu import multiprocessors
from polar_kernels.kernels.rotate_chunks import rotate_chunks
from polar_kernels.kernels.shared_memory import all_launched, shared_piece
from polar_kernels.kernels.wgmma_forms import SCALE_BLOCKS, Form, choose_cut
from polar_kernels.kernels.wgmma_launch import launch_cut, share_of_program
from polar_kernels.kernels.wgmma_output import store_program
from polar_kernels.tiles import TILE_ROWS

_STEPS = tl.constexpr(SCALE_BLOCKS)


@triton.jit(do_not_specialize=["M", "N", "blocks", "split_blocks"])
def _exact_wgmma_kernel(
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
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    SIZE: tl.constexpr = exact_piece_bytes(ROWS, X_SLOTS, WIDTH, WARPS)
    THREADS: tl.constexpr = 32 * WARPS * SHARES
    all_threads = tl.arange(0, THREADS)
    memory = all_launched(x_ptr, blocks < 0, all_threads, SHARES, SIZE)
    pairs = open_pairs(table_ptr, all_threads, DTYPE, THREADS)
    thread, share = share_of_program(all_threads, WARPS, SHARES)
    first_band = tl.program_id(1) * (WARPS // 2)
    program_block = tl.program_id(2) * (SHARES * split_blocks)
    first_block = program_block + share * split_blocks
    sums = multiply_bands_exactly(
        tiles_ptr,
        norms_ptr,
        x_ptr,
        tl.program_id(0).to(tl.int64) * blocks + first_block,
        first_band * blocks + first_block,
        blocks,
        tl.cdiv(N, 32) - first_band,
        tl.minimum(blocks - first_block, split_blocks),
        tl.minimum(tl.cdiv(blocks - program_block, _STEPS) * _STEPS, split_blocks),
        shared_piece(memory, share, SHARES, SIZE),
        pairs,
        thread,
        WIDTH,
        ROWS,
        WARPS,
        X_SLOTS,
        DTYPE,
    )
    store_program(
        sums,
        memory,
        share,
        thread,
        all_threads,
        bias_ptr,
        out_ptr,
        parts_ptr,
        M,
        N,
        ROWS,
        WARPS,
        SHARES,
        SIZE,
        HAS_BIAS,
        LINES,
        IN_PARTS,
    )


def exact_wgmma_linear(
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

    cut: as `int8_wgmma_linear`'s.
    """
    rows, blocks = x.shape[0], tiles.shape[0] // triton.cdiv(out_features, TILE_ROWS)
    cut = cut or choose_cut(rows, out_features, blocks, multiprocessors(x.device), exact=True)
    words = rotate_chunks(x, awq_scales, cut[0].rows)
    return launch_cut(_exact_wgmma_kernel, words, x, tiles, tile_norms, table, bias, out_features, cut)
