"""RMSNorm and the quantisation of what it gives, in one launch, for products of few rows.

Each program takes four blocks of a row, and finds the norm of the whole row for itself: reading it again from the L2
costs less than another launch. Blocks are then what they are in `quantize_activation`.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from polar_kernels.kernels.quantize_activation import empty_words, quantize_lanes, store_block
from polar_kernels.kernels.rotate_block import rotate_lanes
from polar_kernels.tiles import LEVEL_STEP

_WARPS = 4
_STEP = tl.constexpr(LEVEL_STEP)


@triton.jit
def _normed(x_ptr, weight_ptr, out_ptr, at, column, keep, factor, CENTERED: tl.constexpr, HAS_OUT: tl.constexpr):
    """Elements of a row times its factor and the weight, rounded as torch would; written to `out_ptr` if wanted."""
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + at + column, mask=keep, other=0.0).to(tl.float32) * factor
    weight = tl.load(weight_ptr + column, mask=keep, other=0.0).to(tl.float32)
    y = x * (1.0 + weight) if CENTERED else x.to(dtype).to(tl.float32) * weight
    y = y.to(dtype)
    if HAS_OUT:
        tl.store(out_ptr + at + column, y, mask=keep)
    return y.to(tl.float32)


@triton.jit(do_not_specialize=["blocks", "padded_rows"])
def _norm_quantize_kernel(
    x_ptr,
    weight_ptr,
    scales_ptr,
    out_ptr,
    words_ptr,
    meta_ptr,
    table_ptr,
    epsilon,
    K,
    blocks,
    padded_rows,
    CENTERED: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_OUT: tl.constexpr,
    COLUMNS: tl.constexpr,
    WARPS: tl.constexpr,
):
    gdc_launch_dependents()
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * WARPS + thread // 32
    delta = tl.load(table_ptr + _STEP).to(tl.float32, bitcast=True)
    gdc_wait()
    columns = tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + row * K + columns, mask=columns < K, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, axis=0) / K + epsilon)
    first = block * 128 + 4 * lane
    parts = ()
    for i in tl.static_range(4):
        column = first + i
        keep = column < K
        y = _normed(x_ptr, weight_ptr, out_ptr, row * K, column, keep, factor, CENTERED, HAS_OUT)
        if HAS_SCALES:
            y = y / tl.load(scales_ptr + column, mask=keep, other=1.0).to(tl.float32)
        parts = parts + (y,)
    x0, x1, x2, x3 = rotate_lanes(parts[0], parts[1], parts[2], parts[3], lane)
    word, half, scale = quantize_lanes(x0, x1, x2, x3, delta)
    store_block(word, half, scale, words_ptr, meta_ptr, row, block, lane, blocks, padded_rows)


def norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    awq_scales: torch.Tensor | None,
    table: torch.Tensor,
    padded_rows: int,
    *,
    centered: bool,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_activation` of RMSNorm(x): x [M, K] contiguous, bf16 or fp16; weight [K], of the same dtype.

    centered: the norm multiplies by 1 + weight in fp32; otherwise by weight, after rounding to x's dtype. out [M, K]:
    where what the norm gives is to be written, if it is wanted.
    """
    rows, in_features = x.shape
    words, meta = empty_words(padded_rows, in_features, x.device)
    blocks = len(meta)
    _norm_quantize_kernel[(triton.cdiv(blocks, _WARPS), rows)](
        x_ptr=x,
        weight_ptr=weight,
        scales_ptr=awq_scales,
        out_ptr=out,
        words_ptr=words,
        meta_ptr=meta,
        table_ptr=table,
        epsilon=epsilon,
        K=in_features,
        blocks=blocks,
        padded_rows=padded_rows,
        CENTERED=centered,
        HAS_SCALES=awq_scales is not None,
        HAS_OUT=out is not None,
        COLUMNS=triton.next_power_of_2(in_features),
        WARPS=_WARPS,
        num_warps=_WARPS,
        enable_fp_fusion=True,
        launch_pdl=True,
    )
    return words, meta
