"""Activations into the rotated domain in their own 16 bits."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from polar_kernels.hadamard import BLOCK_SIZE, padded_size
from polar_kernels.kernels.fragments import word_place
from polar_kernels.kernels.ptx import pack_halves
from polar_kernels.kernels.rotate_block import rotate_block

_WARPS = 4
# sqrt(128) of the rotation and sqrt(128) of the levels; together they also keep large fp16 values in range.
FACTOR = 1 / BLOCK_SIZE
_FACTOR = tl.constexpr(FACTOR)


@triton.jit(do_not_specialize=["K", "blocks"])
def _rotate_kernel(
    x_ptr,
    scales_ptr,
    out_ptr,
    K,
    blocks,
    HAS_SCALES: tl.constexpr,
    GATED: tl.constexpr,
    ROUTED: tl.constexpr,
    GATHERED: tl.constexpr,
    WARPS: tl.constexpr,
):
    if not ROUTED:
        gdc_launch_dependents()
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * WARPS + thread // 32
    gdc_wait()
    if ROUTED:
        gdc_launch_dependents()
    x0, x1, x2, x3 = rotate_block(x_ptr, scales_ptr, row, block, lane, K, HAS_SCALES, GATED)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    out = out_ptr + word_place(row, block, blocks, lane, 2, GATHERED)
    tl.store(out, pack_halves(x0 * _FACTOR, x1 * _FACTOR, DTYPE), mask=block < blocks)
    tl.store(out + 1, pack_halves(x2 * _FACTOR, x3 * _FACTOR, DTYPE), mask=block < blocks)


def rotate_activation(
    x: torch.Tensor,
    awq_scales: torch.Tensor | None,
    padded_rows: int,
    *,
    gated: bool = False,
    routed: bool = False,
    gathered: bool = False,
) -> torch.Tensor:
    """x [M, K] contiguous, bf16 or fp16 -> words int32 [Mp, Kp / 2]. All else as `quantize_activation`'s."""
    rows, in_features = x.shape[0], x.shape[1] // 2 if gated else x.shape[1]
    blocks = padded_size(in_features) // BLOCK_SIZE
    words = torch.empty(padded_rows, blocks * 64, dtype=torch.int32, device=x.device)
    _rotate_kernel[(triton.cdiv(blocks, _WARPS), rows)](
        x_ptr=x,
        scales_ptr=awq_scales,
        out_ptr=words,
        K=in_features,
        blocks=blocks,
        HAS_SCALES=awq_scales is not None,
        GATED=gated,
        ROUTED=routed,
        GATHERED=gathered,
        WARPS=_WARPS,
        num_warps=_WARPS,
        enable_fp_fusion=True,
        launch_pdl=True,
    )
    return words
