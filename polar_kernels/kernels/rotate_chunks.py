"""Activations into the rotated domain in their own 16 bits, in the chunks that `exact_wgmma` multiplies by."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from polar_kernels.hadamard import BLOCK_SIZE, padded_size
from polar_kernels.kernels.exact_blocks import exact_chunk_words
from polar_kernels.kernels.ptx import pack_halves
from polar_kernels.kernels.rotate_activation import FACTOR
from polar_kernels.kernels.rotate_block import rotate_block

_WARPS = 4
_FACTOR = tl.constexpr(FACTOR)


@triton.jit(do_not_specialize=["K", "blocks"])
def _rotate_chunks_kernel(
    x_ptr, scales_ptr, out_ptr, K, blocks, ROWS: tl.constexpr, HAS_SCALES: tl.constexpr, WARPS: tl.constexpr
):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    CHUNK: tl.constexpr = exact_chunk_words(ROWS)
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * WARPS + thread // 32
    gdc_wait()
    x0, x1, x2, x3 = rotate_block(x_ptr, scales_ptr, row, block, lane, K, HAS_SCALES, False)
    gdc_launch_dependents()  # see docs/kernels.md, where programs go
    # Column 32 s + 8 q + 4 r + i, of lane 8 s + 2 q + r, is in the step 2 s + r of 16 columns, whose 32 bytes are two
    # units of 16: i of 0 and 1, and of 2 and 3; in each word q. Units lie in the swizzled order of 128 bytes.
    step = lane // 8 * 2 + lane % 2
    inside = row % ROWS
    half = out_ptr + (row // ROWS * blocks + block) * CHUNK + (step // 4 * ROWS + inside) * 32 + lane // 2 % 4
    unit = step % 4 * 2
    swizzle = inside % 8
    tl.store(half + (unit ^ swizzle) * 4, pack_halves(x0 * _FACTOR, x1 * _FACTOR, DTYPE), mask=block < blocks)
    tl.store(half + ((unit + 1) ^ swizzle) * 4, pack_halves(x2 * _FACTOR, x3 * _FACTOR, DTYPE), mask=block < blocks)


def rotate_chunks(x: torch.Tensor, awq_scales: torch.Tensor | None, rows: int) -> torch.Tensor:
    """x [M, K] contiguous, bf16 or fp16 -> chunks int32 [ceil(M / rows), Kp / 128, 64 * rows].

    Rows beyond M are left unwritten: each column of the product depends on its own row.
    """
    count, in_features = x.shape
    blocks = padded_size(in_features) // BLOCK_SIZE
    chunks = torch.empty(triton.cdiv(count, rows), blocks, exact_chunk_words(rows), dtype=torch.int32, device=x.device)
    _rotate_chunks_kernel[(triton.cdiv(blocks, _WARPS), count)](
        x_ptr=x,
        scales_ptr=awq_scales,
        out_ptr=chunks,
        K=in_features,
        blocks=blocks,
        ROWS=rows,
        HAS_SCALES=awq_scales is not None,
        WARPS=_WARPS,
        num_warps=_WARPS,
        enable_fp_fusion=True,
        launch_pdl=True,
    )
    return chunks
