"""Activations into the rotated domain and into int8, each row to the groups of the experts that its token chose."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from polar_kernels.hadamard import BLOCK_SIZE, padded_size
from polar_kernels.kernels.quantize_activation import quantize_block
from polar_kernels.kernels.quantize_chunks import halves_stride
from polar_kernels.kernels.ring import chunk_words
from polar_kernels.tiles import LEVEL_STEP

GROUP_ROWS = 64
_WARPS = 4
_STEP, _ROWS, _CHUNK = tl.constexpr(LEVEL_STEP), tl.constexpr(GROUP_ROWS), tl.constexpr(chunk_words(GROUP_ROWS))


@triton.jit(do_not_specialize=["K", "blocks", "copies", "stride"])
def _quantize_grouped_kernel(
    x_ptr,
    scales_ptr,
    places_ptr,
    out_ptr,
    halves_ptr,
    table_ptr,
    K,
    blocks,
    copies,
    stride,
    HAS_SCALES: tl.constexpr,
    GATED: tl.constexpr,
    WARPS: tl.constexpr,
):
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * WARPS + thread // 32
    inside = block < blocks
    delta = tl.load(table_ptr + _STEP).to(tl.float32, bitcast=True)
    gdc_wait()
    gdc_launch_dependents()
    word, half, scale = quantize_block(x_ptr, scales_ptr, row, block, lane, K, delta, HAS_SCALES, GATED)
    half = tl.where(inside, half, 0.0)
    for copy in range(copies):
        place = tl.load(places_ptr + row * copies + copy + lane * 0).to(tl.int64)
        keep = place >= 0
        out = out_ptr + (place // _ROWS * blocks + block) * _CHUNK
        own = place % _ROWS
        # As in `quantize_chunks`: column 32 s + 8 q + 4 r + i, of lane 8 s + 2 q + r.
        position = own * 32 + (lane // 8 * 2 + lane % 2 ^ own % 8) * 4 + lane // 2 % 4
        tl.store(out + position, word, mask=inside & keep)
        tl.store(out + _ROWS * 32 + own, scale.to(tl.int32, bitcast=True), mask=inside & keep & (lane == 0))
        kept = (block < stride) & (lane == 0) & keep
        tl.store(halves_ptr + place * stride + block, half.to(tl.bfloat16), mask=kept)


def quantize_grouped(
    x: torch.Tensor,
    awq_scales: torch.Tensor | None,
    table: torch.Tensor,
    places: torch.Tensor,
    groups: int,
    *,
    gated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] contiguous -> chunks of `ring` of GROUP_ROWS rows each, int32 [groups, Kp / 128, words], and the halves
    that belong to them, bf16 [groups * GROUP_ROWS, >= Kp / 128], as `quantize_chunks` has them.

    places: int32 [M * copies], where the copies of each row go, the GROUP_ROWS rows of one group after the other's;
    nowhere where negative. gated: as `quantize_activation`'s. Each block has its own scale, whose inverse is left
    unwritten, as are rows without an x. The kernel that follows may read what was written before this one without
    waiting.
    """
    rows, in_features = x.shape[0], x.shape[1] // 2 if gated else x.shape[1]
    blocks = padded_size(in_features) // BLOCK_SIZE
    stride = halves_stride(blocks)
    words = torch.empty(groups, blocks, chunk_words(GROUP_ROWS), dtype=torch.int32, device=x.device)
    halves = torch.empty(groups * GROUP_ROWS, stride, dtype=torch.bfloat16, device=x.device)
    _quantize_grouped_kernel[(rows, triton.cdiv(stride, _WARPS))](
        x_ptr=x,
        scales_ptr=awq_scales,
        places_ptr=places,
        out_ptr=words,
        halves_ptr=halves,
        table_ptr=table,
        K=in_features,
        blocks=blocks,
        copies=places.numel() // rows,
        stride=stride,
        HAS_SCALES=awq_scales is not None,
        GATED=gated,
        WARPS=_WARPS,
        num_warps=_WARPS,
        enable_fp_fusion=True,
        launch_pdl=True,
    )
    return words, halves
