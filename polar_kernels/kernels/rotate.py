"""Activations into the rotated domain: (x / awq_scales) @ H per 128-block, in fp32, rounded once."""

import torch
import triton
import triton.language as tl

from polar_kernels.hadamard import BLOCK_SIZE, padded_size
from polar_kernels.kernels.blocks import BLOCK, butterflies, storable

_BLOCKS_PER_PROGRAM = 4


@triton.jit
def _rotate_kernel(
    x_ptr, scales_ptr, out_ptr, count, K, row_blocks, factor, HAS_SCALES: tl.constexpr, BLOCKS: tl.constexpr
):
    # Blocks of all rows are numbered through: block i is block i % row_blocks of row i // row_blocks.
    index = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    row, block = index // row_blocks, index % row_blocks
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (index < count)[:, None]
    x = tl.load(x_ptr + row[:, None] * K + column, mask=inside & (column < K), other=0.0).to(tl.float32)
    if HAS_SCALES:
        x = x / tl.load(scales_ptr + column, mask=column < K, other=1.0).to(tl.float32)
    rotated = butterflies(x, BLOCKS) * factor
    out = out_ptr + index[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out, rotated.to(out_ptr.dtype.element_ty), mask=inside)


def rotate(x: torch.Tensor, awq_scales: torch.Tensor | None, gain: float = 1.0) -> torch.Tensor:
    """x [M, K] contiguous, fp16, bf16 or fp32 -> gain * `reference.rotate`, [M, Kp] in `storable(x.dtype)`."""
    rows, in_features = x.shape
    out = torch.empty(rows, padded_size(in_features), dtype=storable(x.dtype), device=x.device)
    count = out.numel() // BLOCK_SIZE
    if count:
        _rotate_kernel[(triton.cdiv(count, _BLOCKS_PER_PROGRAM),)](
            x_ptr=x,
            scales_ptr=awq_scales,
            out_ptr=out,
            count=count,
            K=in_features,
            row_blocks=out.shape[1] // BLOCK_SIZE,
            factor=gain * BLOCK_SIZE**-0.5,
            HAS_SCALES=awq_scales is not None,
            BLOCKS=_BLOCKS_PER_PROGRAM,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out
