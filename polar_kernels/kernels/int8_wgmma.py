"""The product for more rows on Hopper: codes decoded to int8 in registers, multiplied by `wgmma`, x in shared memory.

A program takes 16 rows of the weight a warp by 64 or 128 of x. `wgmma_blocks` multiplies, `wgmma_forms` has the
ways to cut a product into programs, `wgmma_launch` launches it, `wgmma_output` has what happens to the sums in the end.
Where the weight has too few rows to fill the GPU, the warps of a program share the blocks of K, and programs do, whose
sums a second kernel adds up.
"""

import torch
import triton
import triton.language as tl

from polar_kernels.kernels.gpu import multiprocessors
from polar_kernels.kernels.quantize_chunks import quantize_chunks
from polar_kernels.kernels.shared_memory import shared_memory, shared_piece
from polar_kernels.kernels.wgmma_blocks import multiply_bands, piece_bytes
from polar_kernels.kernels.wgmma_forms import SCALE_BLOCKS, Form, choose_cut
from polar_kernels.kernels.wgmma_launch import launch_cut, share_of_program
from polar_kernels.kernels.wgmma_output import store_program
from polar_kernels.tiles import TILE_ROWS

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
    SIZE: tl.constexpr = piece_bytes(ROWS, X_SLOTS, WIDTH, WARPS)
    all_threads = tl.arange(0, 32 * WARPS * SHARES)
    memory = shared_memory(x_ptr, blocks < 0, all_threads, SHARES, SIZE)
    thread, share = share_of_program(all_threads, WARPS, SHARES)
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
    rows, blocks = x.shape[0], tiles.shape[0] // triton.cdiv(out_features, TILE_ROWS)
    cut = cut or choose_cut(rows, out_features, blocks, multiprocessors(x.device))
    words = quantize_chunks(x, awq_scales, table, cut[0].rows)
    return launch_cut(_int8_wgmma_kernel, words, x, tiles, tile_norms, table, bias, out_features, cut)
