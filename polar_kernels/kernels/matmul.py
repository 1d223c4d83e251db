"""The fused product: rotated activations times codes, norms applied once per block on the partial sums.

The weight tile is the first operand (Y^T = W X^T), so that on Hopper it feeds the tensor cores from registers.
Levels are rounded to the activation's dtype; sums are fp32.

The 1 / sqrt(128) of the levels is put on the rotated activation instead, which then is no larger than the activation
itself: an fp16 block of equal large values would overflow when rotated.
"""

import torch
import triton
import triton.language as tl

from polar_kernels.codebook import bits_of
from polar_kernels.hadamard import BLOCK_SIZE
from polar_kernels.kernels.blocks import BLOCK, load_levels, storable
from polar_kernels.kernels.rotate import rotate


@triton.jit(do_not_specialize=["M"])
def _matmul_kernel(
    x_ptr,
    packed_ptr,
    norms_ptr,
    centroids_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    row_bytes,
    ROW_BLOCKS: tl.constexpr,
    BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N * BLOCK) // BLOCK
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # A constexpr bound: Triton 3.6's interpreter cannot loop to a run-time one.
    for block in range(ROW_BLOCKS):
        levels = load_levels(packed_ptr, centroids_ptr, row, row < N, block, row_bytes, BITS, BLOCK_N)
        x = tl.load(
            x_ptr + m[None, :] * (ROW_BLOCKS * BLOCK) + block * BLOCK + k[:, None], mask=(m < M)[None, :], other=0.0
        )
        partial = tl.dot(levels.to(x_ptr.dtype.element_ty), x, input_precision="ieee")
        norms = tl.load(norms_ptr + n * ROW_BLOCKS + block, mask=n < N, other=0.0).to(tl.float32)
        acc += partial * norms[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + m[None, :] * N + n[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    norms: torch.Tensor,
    awq_scales: torch.Tensor | None,
    centroids: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x [M, K] contiguous, fp16, bf16 or fp32, times the transposed weight, plus bias [N]: [M, N] in x's dtype."""
    return matmul(rotate(x, awq_scales, gain=BLOCK_SIZE**-0.5), packed, norms, centroids, bias, x.dtype)


def matmul(
    rotated: torch.Tensor,
    packed: torch.Tensor,
    norms: torch.Tensor,
    centroids: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """rotated [M, Kp] contiguous, already divided by sqrt(128), times norms * centroids[codes]: [M, N] in `dtype`."""
    rows, out_features = rotated.shape[0], packed.shape[0]
    out = torch.empty(rows, out_features, dtype=storable(dtype), device=rotated.device)
    if out.numel():
        block_m = 16 if rows <= 16 else 64 if rotated.dtype != torch.float32 else 32
        block_n = 32 if rows <= 16 else 64
        _matmul_kernel[(triton.cdiv(out_features, block_n), triton.cdiv(rows, block_m))](
            x_ptr=rotated,
            packed_ptr=packed,
            norms_ptr=norms,
            centroids_ptr=centroids,
            bias_ptr=bias,
            out_ptr=out,
            M=rows,
            N=out_features,
            row_bytes=packed.shape[1],
            ROW_BLOCKS=norms.shape[1],
            BITS=bits_of(centroids),
            HAS_BIAS=bias is not None,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=4,
            enable_fp_fusion=True,
            num_stages=1,  # more would send each table look-up through an asynchronous copy of four bytes
        )
    return out.to(dtype)
