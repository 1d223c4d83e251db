"""The weight back in floats, in one pass: unpack, look up, transform, norm, AWQ. Whole, or the rows of a lookup."""

import torch
import triton
import triton.language as tl

from polar_kernels.codebook import bits_of
from polar_kernels.kernels.blocks import BLOCK, butterflies, load_levels, storable

_ROWS_PER_PROGRAM = 16


@triton.jit
def _dequantize_kernel(
    ids_ptr,
    packed_ptr,
    norms_ptr,
    scales_ptr,
    centroids_ptr,
    out_ptr,
    count,
    N,
    K,
    row_bytes,
    row_blocks,
    BITS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    ROWS: tl.constexpr,
):
    block = tl.program_id(1)
    position = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    element = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS * BLOCK) // BLOCK
    row = position
    element_row = element
    if HAS_IDS:
        row = tl.load(ids_ptr + position, mask=position < count, other=0).to(tl.int64)
        element_row = tl.load(ids_ptr + element, mask=element < count, other=0).to(tl.int64)
    known = (row >= 0) & (row < N) & (position < count)
    element_known = (element_row >= 0) & (element_row < N) & (element < count)
    levels = load_levels(packed_ptr, centroids_ptr, element_row, element_known, block, row_bytes, BITS, ROWS)
    # An id outside the table cannot raise from here: its row becomes NaN and no memory outside the table is read.
    norms = tl.load(norms_ptr + row * row_blocks + block, mask=known, other=float("nan")).to(tl.float32)
    weight = butterflies(levels, ROWS) / BLOCK * norms[:, None]  # one sqrt(128) is the levels', one the transform's
    column = block * BLOCK + tl.arange(0, BLOCK)
    if HAS_SCALES:
        weight = weight / tl.load(scales_ptr + column, mask=column < K, other=1.0).to(tl.float32)[None, :]
    out = out_ptr + position[:, None] * K + column[None, :]
    mask = (position < count)[:, None] & (column < K)[None, :]
    tl.store(out, weight.to(out_ptr.dtype.element_ty), mask=mask)


def dequantize_rows(
    ids: torch.Tensor | None,
    packed: torch.Tensor,
    norms: torch.Tensor,
    awq_scales: torch.Tensor | None,
    centroids: torch.Tensor,
    in_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows `ids` [R] int of W_hat (all of them when None): [R, in_features] in `dtype`; NaN for an id not in 0..N-1."""
    count = packed.shape[0] if ids is None else ids.numel()
    out = torch.empty(count, in_features, dtype=storable(dtype), device=packed.device)
    write_rows(ids, packed, norms, awq_scales, centroids, out)
    return out.to(dtype)


def write_rows(
    ids: torch.Tensor | None,
    packed: torch.Tensor,
    norms: torch.Tensor,
    awq_scales: torch.Tensor | None,
    centroids: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """The same into `out` [R, in_features], contiguous."""
    count, in_features = out.shape
    if out.numel():
        _dequantize_kernel[(triton.cdiv(count, _ROWS_PER_PROGRAM), norms.shape[1])](
            ids_ptr=ids,
            packed_ptr=packed,
            norms_ptr=norms,
            scales_ptr=awq_scales,
            centroids_ptr=centroids,
            out_ptr=out,
            count=count,
            N=packed.shape[0],
            K=in_features,
            row_bytes=packed.shape[1],
            row_blocks=norms.shape[1],
            BITS=bits_of(centroids),
            HAS_IDS=ids is not None,
            HAS_SCALES=awq_scales is not None,
            ROWS=_ROWS_PER_PROGRAM,
            num_warps=4,
            enable_fp_fusion=True,
        )
