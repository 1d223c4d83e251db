"""What `int8_wgmma` does with a thread's sums in the end: the halves of the levels are added, and the sums stored.

A thread holds, for each group i of 8 rows of x, four sums: rows g and g + 8 of its warp's 16 of the weight
(g = lane // 4), times rows 8 i + 2 q and the next of x (q = lane % 4).
"""

import triton
import triton.language as tl

from polar_kernels.kernels.ptx import load_cached_two, mma_halves, pack_halves, store_four
from polar_kernels.kernels.tile_access import norm_of

_STORE_TRANSPOSED = tl.constexpr(
    "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0;"
)
_MEET = tl.constexpr("bar.sync 0; mov.b32 $0, 0; // $1")
_LOAD_SHARED = tl.constexpr("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];")


@triton.jit
def _two_norms(norms_ptr, tile, block, count, g, half):
    word = tl.load(norms_ptr + (tile + block).to(tl.int64) * 16 + g * 2 + half, mask=block < count, other=0)
    return norm_of(word, 0), norm_of(word, 16)


@triton.jit
def add_halves(sums, norms_ptr, halves_ptr, first, count, stride, g, half, q, GROUPS: tl.constexpr):
    """The sums plus norms times halves: products of the tensor cores with 16 blocks of K at a time.

    first: the first of a warp's `count` tiles; halves_ptr: int32, two a word, from the first row and the first block;
    stride: words of a row. Which block of K is which column of the instruction is free, so that a lane reads 8 bytes.
    """
    for step in range(0, tl.cdiv(count, 16)):
        block = step * 16 + 4 * q
        low0, high0 = _two_norms(norms_ptr, first, block, count, g, half)
        low1, high1 = _two_norms(norms_ptr, first, block + 1, count, g, half)
        low2, high2 = _two_norms(norms_ptr, first, block + 2, count, g, half)
        low3, high3 = _two_norms(norms_ptr, first, block + 3, count, g, half)
        a0 = pack_halves(low0, low1, tl.bfloat16)
        a1 = pack_halves(high0, high1, tl.bfloat16)
        a2 = pack_halves(low2, low3, tl.bfloat16)
        a3 = pack_halves(high2, high3, tl.bfloat16)
        # Norms of blocks beyond the last are zero, and what they are multiplied by must be finite where its row is.
        piece = halves_ptr + tl.where(block < count, block // 2, 0)
        added = ()
        for i in tl.static_range(GROUPS):
            b0, b1 = load_cached_two(piece + (8 * i + g).to(tl.int64) * stride)
            c = (sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3])
            added = added + mma_halves(a0, a1, a2, a3, b0, b1, c[0], c[1], c[2], c[3], tl.bfloat16)
        sums = added
    return sums


@triton.jit
def add_bias(sums, bias_ptr, row, N, GROUPS: tl.constexpr):
    """row: g of the thread's rows of the weight."""
    bias0 = tl.load(bias_ptr + row, mask=row < N, other=0.0).to(tl.float32)
    bias1 = tl.load(bias_ptr + row + 8, mask=row + 8 < N, other=0.0).to(tl.float32)
    added = ()
    for i in tl.static_range(GROUPS):
        added = added + (sums[4 * i] + bias0, sums[4 * i + 1] + bias0, sums[4 * i + 2] + bias1, sums[4 * i + 3] + bias1)
    return added


@triton.jit
def _meet(thread):
    """All threads of the program are here, and what they wrote to shared memory is there for all."""
    tl.inline_asm_elementwise(_MEET, "=r,r", [thread], tl.int32, False, 1)


@triton.jit
def store_lines(
    sums, out_ptr, shared, thread, first_row, first_column, M, N, line, GROUPS: tl.constexpr, WARPS: tl.constexpr
):
    """Store to out [M, N], bf16 or fp16, rows from first_row and columns from first_column on. line: from a row to the
    next, like N a multiple of 8.

    By way of shared memory, of which GROUPS * 8 * (32 * WARPS + 16) bytes are overwritten, so that what a warp stores
    is in few runs.
    """
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    LINE: tl.constexpr = 32 * WARPS + 16  # bytes of a row of x; 16 more keep rows on different banks
    lane = thread % 32
    to = shared + (lane // 16 * 8 + lane % 8) * LINE + thread // 32 * 32 + lane // 8 % 2 * 16
    _meet(thread)
    for i in tl.static_range(GROUPS // 2):
        words = [
            to + i * (16 * LINE),
            pack_halves(sums[8 * i], sums[8 * i + 1], DTYPE),
            pack_halves(sums[8 * i + 2], sums[8 * i + 3], DTYPE),
            pack_halves(sums[8 * i + 4], sums[8 * i + 5], DTYPE),
            pack_halves(sums[8 * i + 6], sums[8 * i + 7], DTYPE),
        ]
        tl.inline_asm_elementwise(_STORE_TRANSPOSED, "=r,r,r,r,r,r", words, tl.int32, False, 1)
    _meet(thread)
    PIECES: tl.constexpr = 2 * WARPS  # of 16 bytes in a line
    ROUND_ROWS: tl.constexpr = 32 * WARPS // PIECES
    column = first_column + thread % PIECES * 8
    for i in tl.static_range(GROUPS * 8 // ROUND_ROWS):
        own = thread // PIECES + i * ROUND_ROWS
        address = shared + own * LINE + thread % PIECES * 16
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            _LOAD_SHARED, "=r,=r,=r,=r,r", [address], (tl.int32, tl.int32, tl.int32, tl.int32), False, 1
        )
        row = first_row + own
        keep = ((row < M) & (column < N)).to(tl.int32)
        store_four(out_ptr + row.to(tl.int64) * line + column, w0, w1, w2, w3, keep)


@triton.jit
def store_each(sums, out_ptr, first_row, row, q, M, N, line, GROUPS: tl.constexpr):
    """Store to out [M, N] of any dtype and width, rows of x from first_row on; row: of the weight; line: as above."""
    for i in tl.static_range(GROUPS):
        for e in tl.static_range(2):
            x_row = first_row + i * 8 + 2 * q + e
            out = out_ptr + x_row.to(tl.int64) * line + row
            keep = x_row < M
            tl.store(out, sums[4 * i + e].to(out_ptr.dtype.element_ty), mask=keep & (row < N))
            tl.store(out + 8, sums[4 * i + 2 + e].to(out_ptr.dtype.element_ty), mask=keep & (row + 8 < N))
