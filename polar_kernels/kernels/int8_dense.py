"""The product for many rows on Hopper: the weight requantised to int8 part by part, both operands in shared memory.

A program multiplies 128 rows of the weight by 256 of x, a warpgroup 64 of the weight's. Four blocks of K share scales,
on both sides, so that the tensor cores add up 512 columns before a sum becomes a float. A warpgroup has registers for
the integers of 128 rows of x only: it takes the four blocks with the first 128 and then again with the others, for
which the weight's chunks stay in their slots.
"""

import torch
import triton
import triton.language as tl

from polar_kernels.kernels.ptx import wait_for_previous_kernel
from polar_kernels.kernels.requantize_tiles import CHUNK_ROWS, CHUNK_WORDS, quantize_both, requantize_tiles
from polar_kernels.kernels.ring import (
    chunk_words,
    fill_slot,
    load_scales,
    next_slot,
    open_ring,
    release_slot,
    ring_bytes,
    scales_of,
    wait_for_slot,
)
from polar_kernels.kernels.shared_memory import shared_memory, shared_piece
from polar_kernels.kernels.wgmma_blocks import add_scaled
from polar_kernels.kernels.wgmma_forms import SCALE_BLOCKS
from polar_kernels.kernels.wgmma_output import store_sums
from polar_kernels.tiles import TILE_ROWS

IN_FEATURES = 128 * SCALE_BLOCKS  # of which K must be a multiple
_SCRATCH_BYTES = 64 << 20  # of requantised weight at a time, at most
_SHARED_BYTES = 1 << 17
_ROWS, _PRODUCTS, _WARPS = CHUNK_ROWS, 2, 8  # rows of x an instruction; so many times that a program
_SLOTS = 3  # for chunks of x
_W_START = -(-ring_bytes(_ROWS, _SLOTS) // 1024) * 1024  # where the weight's slots start, one for each block
_NX, _NW, _NP, _SHARE = (tl.constexpr(n) for n in (_SLOTS, SCALE_BLOCKS, _PRODUCTS, SCALE_BLOCKS))
_R, _W, _SHARED, _FIRST_W = (tl.constexpr(n) for n in (_ROWS, _WARPS, _SHARED_BYTES, _W_START))
_X_CHUNK, _W_CHUNK = tl.constexpr(4 * chunk_words(_ROWS)), tl.constexpr(4 * CHUNK_WORDS)  # bytes
_SUMS = tl.constexpr(_ROWS // 2)  # of a product, in a thread


def _start_code(first: bool) -> str:
    """PTX: start 64 rows of the weight by one 128-block times 128 rows of x, added to $0..$63 unless it is the first.

    Then come the addresses of both in shared memory.
    """
    sums = ", ".join(f"${i}" for i in range(64))
    w, x = (64, 65) if first else (128, 129)
    code = [
        f"{{ .reg .b32 w, x; .reg .b64 dw, dx; .reg .pred p; setp.{'ne' if first else 'eq'}.b32 p, 0, 0;"
        f"wgmma.fence.sync.aligned; shr.u32 w, ${w}, 4; or.b32 w, w, 0x10000; shr.u32 x, ${x}, 4; or.b32 x, x, 0x10000;"
    ]
    for _ in range(4):
        # The descriptors' upper half: bytes from 8 rows to the next, over 16, and the swizzle of 128 bytes.
        code.append("mov.b64 dw, {w, 0x40000040}; mov.b64 dx, {x, 0x40000040};")
        code.append(f"wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {{{sums}}}, dw, dx, p;")
        code.append("setp.eq.b32 p, 0, 0; add.u32 w, w, 2; add.u32 x, x, 2;")
    code.append("wgmma.commit_group.sync.aligned; }")
    return " ".join(code)


_START, _GO_ON = tl.constexpr(_start_code(True)), tl.constexpr(_start_code(False))
_START_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 64 + ["r"] * 2))
_GO_ON_CONSTRAINTS = tl.constexpr(",".join(["=r"] * 64 + [str(i) for i in range(64)] + ["r"] * 2))
_FINISH_CONSTRAINTS = tl.constexpr(",".join(["=r"] * 64 + [str(i) for i in range(64)]))
_TYPES = tl.constexpr((tl.int32,) * 64)
_FINISH = tl.constexpr("wgmma.wait_group.sync.aligned 0;")
_FINISH_OTHERS = tl.constexpr("wgmma.wait_group.sync.aligned 1;")  # but the one that was started last


@triton.jit
def _fill_x(ring, slot, parity, later: tl.constexpr, group, groups, source, thread, WAIT: tl.constexpr):
    """Start copying chunk `later` of a group, which may be in the next one, into a slot."""
    own = group + later // (_NP * _SHARE)
    product: tl.constexpr = later // _SHARE % _NP
    chunk = ((own * _SHARE + later % _SHARE) * _NP + product).to(tl.int64)
    copies = ((thread == 0) & (own < groups)).to(tl.int32)
    fill_slot(ring, slot, parity, copies, source + chunk * _X_CHUNK, _R, _NX, WAIT)


@triton.jit
def _fill_w(ring, block: tl.constexpr, group, groups, source, thread, WAIT: tl.constexpr):
    """Start copying a group's chunk of a block into its slot."""
    copies = ((thread == 0) & (group < groups)).to(tl.int32)
    chunk = source + (group * _SHARE + block).to(tl.int64) * _W_CHUNK
    fill_slot(ring, group * 0 + block, (group + 1) % 2, copies, chunk, _R, _NW, WAIT, False)


@triton.jit
def _leave(x_ring, w_ring, slot, parity, done: tl.constexpr, group, groups, x_source, w_source, thread):
    """Release the group's chunk `done` of x, and that of the weight if no other needs it; start to fill their slots."""
    lane = thread % 32
    release_slot(x_ring, slot, lane, _R, _NX)
    _fill_x(x_ring, slot, parity, done + _NX, group, groups, x_source, thread, True)
    if done >= (_NP - 1) * _SHARE:
        release_slot(w_ring, thread * 0 + done % _SHARE, lane, _R, _NW, False)
        _fill_w(w_ring, done % _SHARE, group + 1, groups, w_source, thread, True)


@triton.jit
def multiply_groups(w_ptr, w_scales_ptr, x_ptr, row, N, groups, scales_line, thread):
    """128 rows of the weight times 256 of x: a thread's sums, as `wgmma_output` has them; and the address of
    shared memory. row: g of the thread's rows of the weight. Waits for the kernel before, which writes both.
    """
    lane = thread % 32
    shared = shared_piece(shared_memory(x_ptr, groups < 0, thread, 1, _SHARED), thread * 0, 1, _SHARED)
    x_ring = open_ring(shared, thread, _R, _NX, _W)
    w_ring = open_ring(shared + _FIRST_W, thread, _R, _NW, _W, False)
    ready = wait_for_previous_kernel(thread)
    x_source = x_ptr.to(tl.int64) + tl.program_id(0).to(tl.int64) * groups * (_SHARE * _NP * _X_CHUNK) + ready
    w_source = w_ptr.to(tl.int64) + tl.program_id(1).to(tl.int64) * groups * (_SHARE * _W_CHUNK) + ready
    start = tl.program_id(0) * 0
    for block in tl.static_range(_NW):
        _fill_w(w_ring, block, start, groups, w_source, thread, False)
        if block < _NX:
            _fill_x(x_ring, start + block, 0, block, start, groups, x_source, thread, False)
    sums = ()
    for _ in tl.static_range(_SUMS * _NP):
        sums = sums + (tl.zeros(lane.shape, tl.float32),)
    scales = scales_of(x_ring, lane % 4, _R, _NX)
    no_half = tl.zeros(lane.shape, tl.float32)
    own_rows = thread // 128 * (64 * 128)  # where the warpgroup's rows start in a chunk of the weight
    slot = 0
    parity = 0
    for group in range(0, groups):
        norms = w_scales_ptr + (start + group).to(tl.int64) * scales_line + row + ready
        n0 = tl.load(norms, mask=row < N, other=0.0)
        n1 = tl.load(norms + 8, mask=row + 8 < N, other=0.0)
        added = ()
        for product in tl.static_range(_NP):
            x = wait_for_slot(x_ring, slot, parity, _R, _NX)
            w = wait_for_slot(w_ring, start, group % 2, _R, _NW, False) + own_rows
            products = tl.inline_asm_elementwise(_START, _START_CONSTRAINTS, (w, x), _TYPES, False, 1)
            for block in tl.static_range(1, _SHARE):
                before = slot
                before_parity = parity
                slot, parity = next_slot(slot, parity, _NX)
                x = wait_for_slot(x_ring, slot, parity, _R, _NX)
                w = wait_for_slot(w_ring, start + block, group % 2, _R, _NW, False) + own_rows
                products = tl.inline_asm_elementwise(_GO_ON, _GO_ON_CONSTRAINTS, products + (w, x), _TYPES, False, 1)
                products = tl.inline_asm_elementwise(_FINISH_OTHERS, _FINISH_CONSTRAINTS, products, _TYPES, False, 1)
                done = product * _SHARE + block - 1
                _leave(x_ring, w_ring, before, before_parity, done, group, groups, x_source, w_source, thread)
            products = tl.inline_asm_elementwise(_FINISH, _FINISH_CONSTRAINTS, products, _TYPES, False, 1)
            own = sums[_SUMS * product : _SUMS * product + _SUMS]
            for i in tl.static_range(_R // 8):
                own_scales = load_scales(scales, slot, i, _R)
                own_scales = (own_scales[0], own_scales[1], no_half, no_half)
                added = added + add_scaled(own, products, 4 * i, n0, n1, own_scales)
            done = product * _SHARE + _SHARE - 1
            _leave(x_ring, w_ring, slot, parity, done, group, groups, x_source, w_source, thread)
            slot, parity = next_slot(slot, parity, _NX)
        sums = added
    return sums, shared


@triton.jit(do_not_specialize=["M", "N", "groups", "line", "scales_line"])
def _int8_dense_kernel(
    w_ptr,
    w_scales_ptr,
    x_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    groups,
    line,
    scales_line,
    HAS_BIAS: tl.constexpr,
    LINES: tl.constexpr,
):
    GROUPS: tl.constexpr = _R // 8 * _NP  # of 8 rows of x
    thread = tl.arange(0, 32 * _W)
    first_row = tl.program_id(0) * (_R * _NP)
    first_column = tl.program_id(1) * (16 * _W)
    row = first_column + thread // 32 * 16 + thread % 32 // 4
    sums, shared = multiply_groups(w_ptr, w_scales_ptr, x_ptr, row, N, groups, scales_line, thread)
    store_sums(
        sums, bias_ptr, out_ptr, shared, thread, first_row, first_column, M, N, line, GROUPS, _W, HAS_BIAS, LINES
    )


def int8_dense_linear(
    x: torch.Tensor,
    tiles: torch.Tensor,
    tile_norms: torch.Tensor,
    awq_scales: torch.Tensor | None,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    """x [M, K] contiguous, bf16 or fp16, K a multiple of IN_FEATURES, times the transposed weight, plus bias: [M, N] in
    x's dtype."""
    blocks = len(tiles) // triton.cdiv(out_features, TILE_ROWS)
    chunks = max(1, min(_SCRATCH_BYTES // (4 * CHUNK_WORDS * blocks), triton.cdiv(out_features, CHUNK_ROWS)))
    scratch = torch.empty(chunks, blocks, CHUNK_WORDS, dtype=torch.int32, device=x.device)
    out = torch.empty(len(x), out_features, dtype=x.dtype, device=x.device)
    words = None
    for first in range(0, out_features, chunks * CHUNK_ROWS):
        span = slice(first, min(first + chunks * CHUNK_ROWS, out_features))
        part = slice(first // TILE_ROWS * blocks, triton.cdiv(span.stop, TILE_ROWS) * blocks)
        if words is None:
            words, scales = quantize_both(x, awq_scales, tiles[part], tile_norms[part], table, scratch, _PRODUCTS)
        else:
            scales = requantize_tiles(tiles[part], tile_norms[part], table, blocks, scratch)
        _multiply(words, scratch, scales, None if bias is None else bias[span], out[:, span])
    return out


def _multiply(
    words: torch.Tensor, chunks: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Chunks of x times those of the weight, plus bias, into out [M, N], whose lines may be parts of longer ones."""
    rows, out_features = out.shape
    _int8_dense_kernel[(len(words), triton.cdiv(out_features, CHUNK_ROWS))](
        w_ptr=chunks,
        w_scales_ptr=scales,
        x_ptr=words,
        bias_ptr=bias,
        out_ptr=out,
        M=rows,
        N=out_features,
        groups=len(scales),
        line=out.stride(0),
        scales_line=scales.shape[1],
        HAS_BIAS=bias is not None,
        LINES=out_features % 8 == 0 and out.stride(0) % 8 == 0,
        num_warps=_WARPS,
        enable_fp_fusion=True,
        num_stages=1,
        launch_pdl=True,
        maxnreg=255,
    )
