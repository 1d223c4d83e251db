"""What products by `wgmma` do with a thread's sums in the end: they are added up, the bias is added, and all stored.

A thread holds, for each group i of 8 rows of x, four sums: rows g and g + 8 of its warp's 16 of the weight
(g = lane // 4), times rows 8 i + 2 q and the next of x (q = lane % 4).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from polar_kernels.kernels.ptx import as_float, load_cached, load_shared, pack_halves, store_four
from polar_kernels.kernels.shared_memory import shared_piece

_STORE_TRANSPOSED = tl.constexpr(
    "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0;"
)
_MEET = tl.constexpr("bar.sync 0; mov.b32 $0, 0; // $1")
_STORE_PART = tl.constexpr("st.global.v4.f32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0;")
_STORE_SUMS = tl.constexpr("st.shared.v4.f32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0;")


@triton.jit
def _add_bias(sums, bias_ptr, row, N, GROUPS: tl.constexpr):
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
def store_program(
    sums,
    memory,
    share,
    thread,
    all_threads,
    bias_ptr,
    out_ptr,
    parts_ptr,
    M,
    N,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    SHARES: tl.constexpr,
    SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LINES: tl.constexpr,
    IN_PARTS: tl.constexpr,
):
    """Of a program that takes ROWS rows of x and 16 WARPS of the weight: add up its shares of K, and store what they
    make, or its place among the parts.

    memory: SHARES pieces of SIZE bytes, which are overwritten; thread: of a share's WARPS warps; LINES: see
    `store_sums`.
    """
    GROUPS: tl.constexpr = ROWS // 8 // SHARES
    first_row = tl.program_id(0) * ROWS
    if SHARES > 1:
        sums = _add_shares(sums, memory, share, thread, ROWS // 8, SHARES, SIZE, WARPS)
        first_row += share * (ROWS // SHARES)
    if IN_PARTS:
        tile = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        place = tile * tl.num_programs(2) + tl.program_id(2)
        _store_part(sums, parts_ptr, place, all_threads, GROUPS, WARPS * SHARES)
        gdc_launch_dependents()  # what adds up: each program of this kernel is done
    else:
        shared = shared_piece(memory, share, SHARES, SIZE)
        column = tl.program_id(1) * (16 * WARPS)
        store_sums(sums, bias_ptr, out_ptr, shared, thread, first_row, column, M, N, N, GROUPS, WARPS, HAS_BIAS, LINES)


@triton.jit
def _add_shares(
    sums, memory, share, thread, GROUPS: tl.constexpr, SHARES: tl.constexpr, SIZE: tl.constexpr, WARPS: tl.constexpr
):
    """The sums of all shares for every SHARES-th of the groups: share 0 has the first ones.

    By way of `memory`, of which each share overwrites its piece. thread: of a share's WARPS warps.
    """
    own = shared_piece(memory, share, SHARES, SIZE) + thread * 16
    _meet(thread)
    for i in tl.static_range(GROUPS):
        values = [own + i * (512 * WARPS), sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]]
        tl.inline_asm_elementwise(_STORE_SUMS, "=r,r,f,f,f,f", values, tl.int32, False, 1)
    _meet(thread)
    added = ()
    for i in tl.static_range(GROUPS // SHARES):
        place = thread * 16 + (share * (GROUPS // SHARES) + i) * (512 * WARPS)
        four = _floats(load_shared(shared_piece(memory, share * 0, SHARES, SIZE) + place))
        for other in tl.static_range(1, SHARES):
            four = _add_four(four, load_shared(shared_piece(memory, share * 0 + other, SHARES, SIZE) + place))
        added = added + four
    return added


@triton.jit
def _floats(words):
    return as_float(words[0]), as_float(words[1]), as_float(words[2]), as_float(words[3])


@triton.jit
def _add_four(sums, words):
    """Four sums, and four more that are in words."""
    return (
        sums[0] + as_float(words[0]),
        sums[1] + as_float(words[1]),
        sums[2] + as_float(words[2]),
        sums[3] + as_float(words[3]),
    )


@triton.jit
def _store_part(sums, parts_ptr, place, thread, GROUPS: tl.constexpr, WARPS: tl.constexpr):
    """A program's sums to its place among the parts, each thread's four sums side by side. WARPS: of the program."""
    part = parts_ptr + place * (GROUPS * 128 * WARPS) + thread * 4
    for i in tl.static_range(GROUPS):
        own = (part + i * (128 * WARPS)).to(tl.int64)
        values = [own, sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]]
        tl.inline_asm_elementwise(_STORE_PART, "=r,l,f,f,f,f", values, tl.int32, False, 1)


@triton.jit
def add_parts(
    parts_ptr, place, pair, thread, GROUPS: tl.constexpr, WARPS: tl.constexpr, SHARES: tl.constexpr, PARTS: tl.constexpr
):
    """The sums of 16 rows of x, two groups, over so many neighbouring parts. thread: of a share's WARPS warps."""
    SIZE: tl.constexpr = GROUPS * SHARES * 128 * WARPS  # of a part
    parts = parts_ptr + place * SIZE + thread * 4
    added = ()
    for i in tl.static_range(2):
        group = pair * 2 + i  # of all shares', each GROUPS
        own = parts + (group % GROUPS * SHARES + group // GROUPS) * (128 * WARPS)
        four = _floats(load_cached(own))
        for part in tl.static_range(1, PARTS):
            four = _add_four(four, load_cached(own + part * SIZE))
        added = added + four
    return added


@triton.jit
def store_sums(
    sums,
    bias_ptr,
    out_ptr,
    shared,
    thread,
    first_row,
    first_column,
    M,
    N,
    line,
    GROUPS: tl.constexpr,
    WARPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LINES: tl.constexpr,
):
    """Add the bias and store to out [M, N], rows from first_row and columns from first_column on. line: from a row to
    the next; LINES: it and N are multiples of 8; shared: see `_store_lines`."""
    row = first_column + thread // 32 * 16 + thread % 32 // 4
    if HAS_BIAS:
        sums = _add_bias(sums, bias_ptr, row, N, GROUPS)
    if LINES:
        _store_lines(sums, out_ptr, shared, thread, first_row, first_column, M, N, line, GROUPS, WARPS)
    else:
        _store_each(sums, out_ptr, first_row, row, thread % 4, M, N, line, GROUPS)


@triton.jit
def _store_lines(
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
        w0, w1, w2, w3 = load_shared(address)
        row = first_row + own
        keep = ((row < M) & (column < N)).to(tl.int32)
        store_four(out_ptr + row.to(tl.int64) * line + column, w0, w1, w2, w3, keep)


@triton.jit
def _store_each(sums, out_ptr, first_row, row, q, M, N, line, GROUPS: tl.constexpr):
    """Store to out [M, N] of any dtype and width, rows of x from first_row on; row: of the weight; line: as above."""
    for i in tl.static_range(GROUPS):
        for e in tl.static_range(2):
            x_row = first_row + i * 8 + 2 * q + e
            out = out_ptr + x_row.to(tl.int64) * line + row
            keep = x_row < M
            tl.store(out, sums[4 * i + e].to(out_ptr.dtype.element_ty), mask=keep & (row < N))
            tl.store(out + 8, sums[4 * i + 2 + e].to(out_ptr.dtype.element_ty), mask=keep & (row + 8 < N))
