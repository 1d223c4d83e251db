"""`quantize_activation` for wgmma: into the chunks that travel through `ring`, in the order of shared memory."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from polar_kernels.hadamard import BLOCK_SIZE, padded_size
from polar_kernels.kernels.quantize_activation import load_step, quantize_block
from polar_kernels.kernels.ring import CHUNK_BYTES, CHUNK_PAIRS, CHUNK_X_BYTES

_WARPS = 4
_CHUNK, _CHUNK_X, _PAIRS = tl.constexpr(CHUNK_BYTES // 4), tl.constexpr(CHUNK_X_BYTES // 4), tl.constexpr(CHUNK_PAIRS)


@triton.jit(do_not_specialize=["K", "blocks", "products"])
def _quantize_chunks_kernel(
    x_ptr,
    scales_ptr,
    out_ptr,
    table_ptr,
    K,
    blocks,
    products,
    ROWS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    WARPS: tl.constexpr,
):
    gdc_launch_dependents()
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * WARPS + thread // 32
    inside = block < blocks
    delta = load_step(table_ptr)
    gdc_wait()
    word, base, scale = quantize_block(x_ptr, scales_ptr, row, block, lane, K, delta, HAS_SCALES, False)
    product = row // ROWS
    chunks: tl.constexpr = ROWS // 64  # of a block and product
    out = out_ptr + ((product // products * blocks + block) * products + product % products) * (chunks * _CHUNK)
    _store_in_chunk(out, row % ROWS, lane, word, base, scale, inside, ROWS)


@triton.jit
def _store_in_chunk(out, own, lane, word, base, scale, inside, ROWS: tl.constexpr):
    """Store row `own` of the chunks at `out`, which have ROWS rows."""
    # Column 32 s + 8 q + 4 r + i, of lane 8 s + 2 q + r, is in word q of the 16 bytes (s, r) of its row; the swizzle of
    # shared memory moves those about by the row.
    if ROWS == 64:
        position = own * 32 + (lane // 8 * 2 + lane % 2 ^ own % 8) * 4
    else:
        position = lane // 16 * _CHUNK + own * 16 + (lane // 8 % 2 * 2 + lane % 2 ^ own // 2 % 4) * 4
    tl.store(out + position + lane // 2 % 4, word, mask=inside)
    pair = out + own // _PAIRS * _CHUNK + _CHUNK_X + own % _PAIRS * 2
    tl.store(pair, base.to(tl.int32, bitcast=True), mask=inside & (lane == 0))
    tl.store(pair + 1, scale.to(tl.int32, bitcast=True), mask=inside & (lane == 0))


@triton.jit(do_not_specialize=["K", "blocks", "copies"])
def _quantize_grouped_kernel(
    x_ptr,
    scales_ptr,
    places_ptr,
    out_ptr,
    table_ptr,
    K,
    blocks,
    copies,
    HAS_SCALES: tl.constexpr,
    GATED: tl.constexpr,
    WARPS: tl.constexpr,
):
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * WARPS + thread // 32
    delta = load_step(table_ptr)
    gdc_wait()
    gdc_launch_dependents()
    word, base, scale = quantize_block(x_ptr, scales_ptr, row, block, lane, K, delta, HAS_SCALES, GATED)
    for copy in range(copies):
        place = tl.load(places_ptr + row * copies + copy + lane * 0).to(tl.int64)
        out = out_ptr + (place // 64 * blocks + block) * _CHUNK
        _store_in_chunk(out, place % 64, lane, word, base, scale, (block < blocks) & (place >= 0), 64)


def quantize_chunks(
    x: torch.Tensor, awq_scales: torch.Tensor | None, table: torch.Tensor, product_rows: int, products: int
) -> torch.Tensor:
    """x [M, K] contiguous -> words int32 [programs, Kp / 128, products, product_rows / 64, 2176], chunks of `ring`.

    product_rows: rows of x that one instruction multiplies by, 64 or 128; products: of a program, which takes
    product_rows * products rows of x. table: `tiles.level_table`. Rows beyond M are left unwritten.
    """
    rows, in_features = x.shape
    blocks = padded_size(in_features) // BLOCK_SIZE
    shape = (triton.cdiv(rows, product_rows * products), blocks, products, product_rows // 64, CHUNK_BYTES // 4)
    words = torch.empty(shape, dtype=torch.int32, device=x.device)
    _quantize_chunks_kernel[(rows, triton.cdiv(blocks, _WARPS))](
        x_ptr=x,
        scales_ptr=awq_scales,
        out_ptr=words,
        table_ptr=table,
        K=in_features,
        blocks=blocks,
        products=products,
        ROWS=product_rows,
        HAS_SCALES=awq_scales is not None,
        WARPS=_WARPS,
        num_warps=_WARPS,
        enable_fp_fusion=True,
        launch_pdl=True,
    )
    return words


def quantize_grouped(
    x: torch.Tensor,
    awq_scales: torch.Tensor | None,
    table: torch.Tensor,
    places: torch.Tensor,
    groups: int,
    *,
    gated: bool = False,
) -> torch.Tensor:
    """x [M, K] contiguous -> words int32 [groups, Kp / 128, 2176], chunks of `ring` of 64 rows each.

    places: int32 [M * copies], where the copies of each row go, the 64 rows of one group after the other's; nowhere
    where negative. gated: as `quantize_activation`'s. Rows without an x are left unwritten. The kernel that follows may
    read what was written before this one without waiting.
    """
    rows, in_features = x.shape[0], x.shape[1] // 2 if gated else x.shape[1]
    blocks = padded_size(in_features) // BLOCK_SIZE
    words = torch.empty(groups, blocks, CHUNK_BYTES // 4, dtype=torch.int32, device=x.device)
    _quantize_grouped_kernel[(rows, triton.cdiv(blocks, _WARPS))](
        x_ptr=x,
        scales_ptr=awq_scales,
        places_ptr=places,
        out_ptr=words,
        table_ptr=table,
        K=in_features,
        blocks=blocks,
        copies=places.numel() // rows,
        HAS_SCALES=awq_scales is not None,
        GATED=gated,
        WARPS=_WARPS,
        num_warps=_WARPS,
        enable_fp_fusion=True,
        launch_pdl=True,
    )
    return words
