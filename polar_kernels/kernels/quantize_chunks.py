"""Activations into the rotated domain and into int8, in the chunks that `int8_wgmma` multiplies by.

A quarter of a warp takes one block of one row, a lane 16 columns: most of the transform and of the search for the peak
is then done in registers. The four blocks of a warp share a scale, so that a product's sums need one for every four
blocks only. What that costs is in docs/kernels.md.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from polar_kernels.hadamard import BLOCK_SIZE, padded_size
from polar_kernels.kernels.ptx import load_cached, max_lanes, store_two, sum_lanes, swap_lanes, unpack_halves
from polar_kernels.kernels.quantize_activation import rounded_bits, scales_of_peak
from polar_kernels.kernels.ring import chunk_words
from polar_kernels.kernels.wgmma_forms import SCALE_BLOCKS
from polar_kernels.tiles import LEVEL_STEP

_STEP = tl.constexpr(LEVEL_STEP)
_LEAST_SCALE = tl.constexpr(2.0**-80)
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
    halves_ptr,
    table_ptr,
    row,
    first_block,
    thread,
    K,
    blocks,
    products,
    stride,
    ROWS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """What a program does: blocks of a row, int64, from the first on, four a warp."""
    lane = thread % 32
    part = lane % 8
    block = first_block + thread // 8
    inside = block < blocks
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
    scale = tl.maximum(scale, _LEAST_SCALE, propagate_nan=tl.PropagateNan.ALL)  # its inverse is finite
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
        total = tl.inline_asm_elementwise(_ADD_BYTES, "=r,r,r", [word, total], tl.int32, True, 1)
        words = words + (word,)
    product = row // ROWS
    own = row % ROWS
    chunk = (product // products * blocks + block) * products + product % products
    out = out_ptr + chunk * chunk_words(ROWS)
    # Column 32 s + 8 q + 4 r + i is in word q of the 16 bytes (s, r) of its row; the swizzle of shared memory moves
    # those about by the row. A lane has s = part // 2, and the even or the odd pair of q.
    pair = out + own * 32 + part % 2 * 2
    store_two(pair + (part // 2 * 2 ^ own % 8) * 4, words[0], words[2], inside.to(tl.int32))
    store_two(pair + (part // 2 * 2 + 1 ^ own % 8) * 4, words[1], words[3], inside.to(tl.int32))
    kept = inside & (part == 0)
    tl.store(out + ROWS * 32 + own, scale.to(tl.int32, bitcast=True), mask=kept)
    tl.store(out + ROWS * 33 + own, (1.0 / scale).to(tl.int32, bitcast=True), mask=kept)
    half = tl.where(inside, 0.5 * sum_lanes(total.to(tl.float32), 3) * scale, 0.0)
    tl.store(halves_ptr + row * stride + block, half.to(tl.bfloat16), mask=(block < stride) & (part == 0))


@triton.jit(do_not_specialize=["K", "blocks", "products", "stride"])
def _quantize_chunks_kernel(
    x_ptr,
    scales_ptr,
    out_ptr,
    halves_ptr,
    table_ptr,
    K,
    blocks,
    products,
    stride,
    ROWS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    WHOLE: tl.constexpr,
    WARPS: tl.constexpr,
):
    quantize_row(
        x_ptr,
        scales_ptr,
        out_ptr,
        halves_ptr,
        table_ptr,
        tl.program_id(0).to(tl.int64),
        tl.program_id(1) * (4 * WARPS),
        tl.arange(0, 32 * WARPS),
        K,
        blocks,
        products,
        stride,
        ROWS,
        HAS_SCALES,
        WHOLE,
    )


def empty_chunks(
    rows: int, in_features: int, product_rows: int, products: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `quantize_chunks` returns, to be filled."""
    blocks = padded_size(in_features) // BLOCK_SIZE
    programs = triton.cdiv(rows, product_rows * products)
    words = torch.empty(programs, blocks, products, chunk_words(product_rows), dtype=torch.int32, device=device)
    count, stride = programs * products * product_rows, halves_stride(blocks)
    return words, torch.empty(count, stride, dtype=torch.bfloat16, device=device)


def halves_stride(blocks: int) -> int:
    """Columns of the halves: the blocks of K, rounded up to whole pieces that programs share K by."""
    return triton.cdiv(blocks, SCALE_BLOCKS) * SCALE_BLOCKS


def is_whole(x: torch.Tensor) -> bool:
    """Whether x [M, K] has whole blocks that can be read 16 bytes at a time."""
    return x.shape[1] % BLOCK_SIZE == 0 and x.data_ptr() % 16 == 0


def quantize_chunks(
    x: torch.Tensor, awq_scales: torch.Tensor | None, table: torch.Tensor, product_rows: int, products: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] contiguous -> chunks of `ring`, int32 [programs, Kp / 128, products, words], and halves, bf16 [Mp, at
    least Kp / 128].

    A level is (v + 1/2) * delta: halves are what half the sum of a block's integers is worth, times the block's scale,
    and are to be multiplied by the norms.
    product_rows: rows of x that one instruction multiplies by, 64 or 128; products: of a program, which takes
    product_rows * products rows of x; Mp: rounded up to whole programs. table: `tiles.level_table`. Rows beyond M are
    left unwritten, columns of the halves beyond Kp / 128 are zero.
    """
    rows, in_features = x.shape
    words, halves = empty_chunks(rows, in_features, product_rows, products, x.device)
    blocks, stride = words.shape[1], halves.shape[1]
    warps = 4 if stride > 8 else 2
    _quantize_chunks_kernel[(rows, triton.cdiv(stride, 4 * warps))](
        x_ptr=x,
        scales_ptr=awq_scales,
        out_ptr=words,
        halves_ptr=halves,
        table_ptr=table,
        K=in_features,
        blocks=blocks,
        products=products,
        stride=stride,
        ROWS=product_rows,
        HAS_SCALES=awq_scales is not None,
        WHOLE=is_whole(x),
        WARPS=warps,
        num_warps=warps,
        enable_fp_fusion=True,
        launch_pdl=True,
    )
    return words, halves
