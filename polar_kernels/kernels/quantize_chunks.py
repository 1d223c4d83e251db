"""Activations into the rotated domain and into int8, in the chunks that `int8_wgmma` multiplies by.

A quarter of a warp takes one block of one row, a lane 16 columns: most of the transform and of the search for the peak
is then done in registers. The four blocks of a warp share a scale, so that a product's integers become floats once
every four blocks only. What that costs is in docs/kernels.md.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from polar_kernels.hadamard import BLOCK_SIZE
from polar_kernels.kernels.ptx import load_cached, max_lanes, store_two, sum_lanes, swap_lanes, unpack_halves
from polar_kernels.kernels.quantize_activation import rounded_bits, scales_of_peak
from polar_kernels.kernels.ring import chunk_words
from polar_kernels.kernels.wgmma_forms import SCALE_BLOCKS
from polar_kernels.tiles import LEVEL_STEP

_STEP = tl.constexpr(LEVEL_STEP)
_SHARE = tl.constexpr(SCALE_BLOCKS)
_PACK_BYTES = tl.constexpr(
    "{ .reg .b32 a, b; prmt.b32 a, $1, $2, 0x0040; prmt.b32 b, $3, $4, 0x0040; prmt.b32 $0, a, b, 0x5410; }"
)
_ADD_BYTES = tl.constexpr("dp4a.s32.s32 $0, $1, 0x01010101, $2;")


@triton.jit
def _load(x_ptr, scales_ptr, row, column, K, HAS_SCALES: tl.constexpr, WHOLE: tl.constexpr):
    """16 columns of a row, divided by their AWQ scales. WHOLE: all there, and 16 bytes at a time."""
    v = ()
    if WHOLE:
        for part in tl.static_range(2):
            words = load_cached(x_ptr + row * K + column + 8 * part)
            for i in tl.static_range(4):
                v = v + unpack_halves(words[i], x_ptr.dtype.element_ty)
    else:
        for i in tl.static_range(16):
            v = v + (tl.load(x_ptr + row * K + column + i, mask=column + i < K, other=0.0).to(tl.float32),)
    if HAS_SCALES:
        scaled = ()
        for i in tl.static_range(16):
            scale = tl.load(scales_ptr + column + i, mask=column + i < K, other=1.0).to(tl.float32)
            scaled = scaled + (v[i] / scale,)
        v = scaled
    return v


@triton.jit
def _turn_own(v, BIT: tl.constexpr):
    """One step of the transform among a lane's own values."""
    out = ()
    for i in tl.static_range(16):
        if i // BIT % 2 == 0:  # noqa: SIM108
            out = out + (v[i] + v[i + BIT],)
        else:
            out = out + (v[i - BIT] - v[i],)
    return out


@triton.jit
def _turn_lanes(v, lane, bit: tl.constexpr):
    """One step between lanes."""
    distance = tl.full(lane.shape, 1 << bit, tl.int32)
    sign = tl.where((lane >> bit) & 1 == 1, -1.0, 1.0)
    out = ()
    for i in tl.static_range(16):
        out = out + (swap_lanes(v[i], distance) + sign * v[i],)
    return out


@triton.jit
def _peak(v):
    """The largest magnitude of the warp's four blocks, NaN where they hold one."""
    peak = tl.abs(v[0])
    for i in tl.static_range(15):
        peak = tl.maximum(peak, tl.abs(v[i + 1]), propagate_nan=tl.PropagateNan.ALL)
    return max_lanes(peak, 5)


@triton.jit
def quantize_row(
    x_ptr,
    scales_ptr,
    out_ptr,
    table_ptr,
    row,
    first_block,
    thread,
    K,
    blocks,
    products,
    ROWS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """What a program does: blocks of a row, int64, from the first on, four a warp."""
    lane = thread % 32
    part = lane % 8
    block = first_block + thread // 8
    delta = tl.load(table_ptr + _STEP).to(tl.float32, bitcast=True)
    column = tl.minimum(block, blocks - 1) * 128 + 16 * part
    gdc_wait()
    v = _load(x_ptr, scales_ptr, row, column, K, HAS_SCALES, WHOLE)
    v = _turn_own(v, 1)
    v = _turn_own(v, 2)
    v = _turn_own(v, 4)
    v = _turn_own(v, 8)
    v = _turn_lanes(v, lane, 0)
    v = _turn_lanes(v, lane, 1)
    v = _turn_lanes(v, lane, 2)
    peak = _peak(v)
    # Not earlier: programs that come while these wait for x are put two on a multiprocessor, and none on the next.
    gdc_launch_dependents()
    inverse, scale = scales_of_peak(peak, delta)
    words = ()
    total = thread * 0
    for i in tl.static_range(4):
        values = [
            rounded_bits(v[4 * i] * inverse),
            rounded_bits(v[4 * i + 1] * inverse),
            rounded_bits(v[4 * i + 2] * inverse),
            rounded_bits(v[4 * i + 3] * inverse),
        ]
        word = tl.inline_asm_elementwise(_PACK_BYTES, "=r,r,r,r,r", values, tl.int32, True, 1)
        word = tl.where(block < blocks, word, 0)
        total = tl.inline_asm_elementwise(_ADD_BYTES, "=r,r,r", [word, total], tl.int32, True, 1)
        words = words + (word,)
    padded = tl.cdiv(blocks, _SHARE) * _SHARE
    inside = block < padded
    product = row // ROWS
    own = row % ROWS
    chunk = (product // products * padded + block) * products + product % products
    out = out_ptr + chunk * chunk_words(ROWS)
    # Column 32 s + 8 q + 4 r + i is in word q of the 16 bytes (s, r) of its row; the swizzle of shared memory moves
    # those about by the row. A lane has s = part // 2, and the even or the odd pair of q.
    pair = out + own * 32 + part % 2 * 2
    store_two(pair + (part // 2 * 2 ^ own % 8) * 4, words[0], words[2], inside.to(tl.int32))
    store_two(pair + (part // 2 * 2 + 1 ^ own % 8) * 4, words[1], words[3], inside.to(tl.int32))
    half = 0.5 * sum_lanes(total.to(tl.float32), 5) * scale
    store_scale(out, own, scale, half, inside & (lane == 31), ROWS)


@triton.jit
def store_scale(chunk, own, scale, half, keep, ROWS: tl.constexpr):
    """To a chunk's row `own`, where `keep`: what its blocks' integers are to be multiplied by, and half their sum times
    that."""
    scales = chunk + ROWS * 32 + own // 2 * 4 + own % 2
    tl.store(scales, scale.to(tl.int32, bitcast=True), mask=keep)
    tl.store(scales + 2, half.to(tl.int32, bitcast=True), mask=keep)


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
    WHOLE: tl.constexpr,
    WARPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first_block = tl.program_id(1) * (_SHARE * WARPS)
    thread = tl.arange(0, 32 * WARPS)
    quantize_row(
        x_ptr, scales_ptr, out_ptr, table_ptr, row, first_block, thread, K, blocks, products, ROWS, HAS_SCALES, WHOLE
    )


def empty_chunks(rows: int, in_features: int, product_rows: int, products: int, device: torch.device) -> torch.Tensor:
    """Chunks to be filled: int32 [programs, blocks, products, words], products being those of a program."""
    blocks = shared_blocks(in_features)
    programs = triton.cdiv(rows, product_rows * products)
    return torch.empty(programs, blocks, products, chunk_words(product_rows), dtype=torch.int32, device=device)


def shared_blocks(in_features: int) -> int:
    """Blocks of K, rounded up to whole groups of those that share a scale."""
    return triton.cdiv(in_features, BLOCK_SIZE * SCALE_BLOCKS) * SCALE_BLOCKS


def is_whole(x: torch.Tensor) -> bool:
    """Whether x [M, K] has whole blocks that can be read 16 bytes at a time."""
    return x.shape[1] % BLOCK_SIZE == 0 and x.data_ptr() % 16 == 0


def quantize_chunks(
    x: torch.Tensor, awq_scales: torch.Tensor | None, table: torch.Tensor, product_rows: int
) -> torch.Tensor:
    """x [M, K] contiguous -> chunks of `ring`, int32 [programs, blocks, 1, words], blocks by `shared_blocks`, those
    beyond K zeros.

    A level is (v + 1/2) * delta: halves are what half the sum of a row's integers is worth.
    product_rows: rows of x that one instruction multiplies by, and a program takes, 64 or 128. table:
    `tiles.level_table`. Rows beyond M are left unwritten.
    """
    rows, in_features = x.shape
    words = empty_chunks(rows, in_features, product_rows, 1, x.device)
    groups = words.shape[1] // SCALE_BLOCKS
    warps = 4 if groups > 2 else 2
    _quantize_chunks_kernel[(rows, triton.cdiv(groups, warps))](
        x_ptr=x,
        scales_ptr=awq_scales,
        out_ptr=words,
        table_ptr=table,
        K=in_features,
        blocks=triton.cdiv(in_features, BLOCK_SIZE),
        products=1,
        ROWS=product_rows,
        HAS_SCALES=awq_scales is not None,
        WHOLE=is_whole(x),
        WARPS=warps,
        num_warps=warps,
        enable_fp_fusion=True,
        launch_pdl=True,
    )
    return words
