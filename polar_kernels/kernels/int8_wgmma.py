"""The product for more rows on Hopper: codes decoded to int8 in registers, multiplied by `wgmma`, x in shared memory.

Two warpgroups of a program take 64 rows of the weight each, and both the same rows of x, which travel through a ring in
shared memory a chunk (64 rows by one 128-block) at a time. The warpgroups run apart: while one waits for its
product, the other decodes or scales. The integer sums of a block become floats, times the norm of the weight's row and
the scale of x's row, before the next block.

Where the weight has too few rows to fill the GPU, programs split the blocks of K, and a second kernel adds up.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from polar_kernels.kernels.decode_int8 import decode_half_tile
from polar_kernels.kernels.ptx import load_cached, wait_for_previous_kernel
from polar_kernels.kernels.quantize_activation import quantize_chunks
from polar_kernels.kernels.ring import (
    CHUNK_BYTES,
    CHUNK_ROWS,
    add_scaled,
    fill_slot,
    open_ring,
    release_slot,
    wait_for_slot,
)
from polar_kernels.kernels.tile_access import load_half_tile, norm_of
from polar_kernels.tiles import PLANE_WORDS, TILE_ROWS

_WARPS = 8
_PROGRAM_ROWS = 16 * _WARPS  # of the weight
_SLOTS = tl.constexpr(5)
_LATE = tl.constexpr(2)  # chunks after which a slot is filled again, so that one warpgroup may lead the other
_ROWS, _CHUNK = tl.constexpr(CHUNK_ROWS), tl.constexpr(CHUNK_BYTES)
_SUMS = CHUNK_ROWS // 2  # of a thread
_SUM_SIZE = 1024


def _start_code() -> str:
    """PTX: start 64 rows of the weight by one 128-block, 16 registers a thread, times a chunk's rows of x.

    $0..: the sums of a thread, as bits of 12582912 + sum; then the 16 registers and the address of the chunk.
    """
    sums = ", ".join(f"${i}" for i in range(_SUMS))
    code = [
        "{ .reg .b32 at; .reg .b64 x; .reg .pred p; setp.eq.b32 p, 0, 0;",
        *(f"mov.b32 ${i}, 0x4B400000;" for i in range(_SUMS)),
        # The descriptor: address / 16, 1024 bytes from 8 rows to the next, 128-byte swizzle.
        f"shr.u32 at, ${_SUMS + 16}, 4; or.b32 at, at, 0x10000;",
        "wgmma.fence.sync.aligned;",
    ]
    for step in range(4):
        a = ", ".join(f"${_SUMS + 4 * step + i}" for i in range(4))
        code.append("mov.b64 x, {at, 0x40000040};")
        code.append(f"wgmma.mma_async.sync.aligned.m64n{CHUNK_ROWS}k32.s32.s8.s8 {{{sums}}}, {{{a}}}, x, p;")
        code.append("add.u32 at, at, 2;")
    code.append("wgmma.commit_group.sync.aligned; }")
    return " ".join(code)


_START = tl.constexpr(_start_code())
_START_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * _SUMS + ["r"] * 17))
_FINISH_CONSTRAINTS = tl.constexpr(",".join(["=r"] * _SUMS + [str(i) for i in range(_SUMS)]))
_TYPES = tl.constexpr((tl.int32,) * _SUMS)


@triton.jit
def _start(a, chunk):
    return tl.inline_asm_elementwise(_START, _START_CONSTRAINTS, a + (chunk,), _TYPES, False, 1)


@triton.jit
def _finish(products):
    """The products, once the tensor cores have written them."""
    return tl.inline_asm_elementwise(
        "wgmma.wait_group.sync.aligned 0;", _FINISH_CONSTRAINTS, products, _TYPES, False, 1
    )


@triton.jit
def _multiply_block(sums, tile, table, ring, slot, parity, done, count, source, thread, WIDTH: tl.constexpr):
    """The sums of a thread with one block of K added. done, count: chunks before this block, and in all."""
    lane = thread % 32
    a = decode_half_tile(tile[0], tile[1], tile[2][0], tile[2][1], table, WIDTH)
    n0 = norm_of(tile[3], 0)
    n1 = norm_of(tile[3], 16)
    chunk = wait_for_slot(ring, slot, parity, _SLOTS)
    products = _start(a, chunk)
    # While the tensor cores work: a later chunk into a slot that both warpgroups have left some time ago.
    late = slot - _LATE
    late_parity = tl.where(late < 0, parity ^ 1, parity)
    late = tl.where(late < 0, late + _SLOTS, late)
    later = done - _LATE + _SLOTS
    copies = ((thread == 0) & (done >= _LATE) & (later < count)).to(tl.int32)
    fill_slot(ring, late, late_parity, copies, source + later.to(tl.int64) * _CHUNK, _SLOTS, True)
    products = _finish(products)
    added = ()
    for group in tl.static_range(_ROWS // 8):
        added = added + add_scaled(sums, 4 * group, products, group, n0, n1, chunk, lane % 4 * 16)
    release_slot(ring, slot, lane, _SLOTS)
    parity = tl.where(slot == _SLOTS - 1, parity ^ 1, parity)
    slot = tl.where(slot == _SLOTS - 1, 0, slot + 1)
    return added, slot, parity, done + 1


@triton.jit(do_not_specialize=["M", "N", "blocks", "split_blocks"])
def _int8_wgmma_kernel(
    tiles_ptr,
    norms_ptr,
    table_ptr,
    x_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    blocks,
    split_blocks,
    WIDTH: tl.constexpr,
    WARPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    g = lane // 4
    half = thread // 32 % 2
    band = tl.program_id(1) * (WARPS // 2) + thread // 64
    first_block = tl.program_id(2) * split_blocks
    count = tl.minimum(blocks - first_block, split_blocks)
    first = tl.minimum(band, tl.cdiv(N, 32) - 1) * blocks + first_block
    last = first + count - 1
    even = load_half_tile(tiles_ptr, norms_ptr, first, half, lane, WIDTH)
    odd = load_half_tile(tiles_ptr, norms_ptr, tl.minimum(first + 1, last), half, lane, WIDTH)
    table = load_cached(table_ptr + thread * 0)
    ring = open_ring(thread, _SLOTS, WARPS)
    # Everything above was there before; x comes from the kernel before this one.
    q = lane % 4 + wait_for_previous_kernel(thread)
    source = x_ptr.to(tl.int64) + (tl.program_id(0).to(tl.int64) * blocks + first_block) * _CHUNK
    for chunk in tl.static_range(_SLOTS):
        copies = ((thread == 0) & (chunk < count)).to(tl.int32)
        fill_slot(ring, chunk, 0, copies, source + chunk * _CHUNK, _SLOTS, False)
    sums = ()
    for _ in tl.static_range(_ROWS // 2):
        sums = sums + (tl.zeros(lane.shape, tl.float32),)
    slot = 0
    parity = 0
    done = 0
    # Two blocks at a time, each with registers of its own: copying from one set to the other would wait for its loads.
    for step in range(0, count, 2):
        sums, slot, parity, done = _multiply_block(
            sums, even, table, ring, slot, parity, done, count, source, thread, WIDTH
        )
        even = load_half_tile(tiles_ptr, norms_ptr, tl.minimum(first + step + 2, last), half, lane, WIDTH)
        if step + 1 < count:
            sums, slot, parity, done = _multiply_block(
                sums, odd, table, ring, slot, parity, done, count, source, thread, WIDTH
            )
        odd = load_half_tile(tiles_ptr, norms_ptr, tl.minimum(first + step + 3, last), half, lane, WIDTH)
    row = band * 32 + half * 16 + g
    bias0 = tl.zeros(lane.shape, tl.float32)
    bias1 = tl.zeros(lane.shape, tl.float32)
    if HAS_BIAS:
        bias0 = tl.load(bias_ptr + row, mask=row < N, other=0.0).to(tl.float32)
        bias1 = tl.load(bias_ptr + row + 8, mask=row + 8 < N, other=0.0).to(tl.float32)
    out_ptr += tl.program_id(2).to(tl.int64) * M * N
    for i in tl.static_range(_ROWS // 8):
        for e in tl.static_range(2):
            column = tl.program_id(0) * _ROWS + i * 8 + 2 * q + e
            out = out_ptr + column.to(tl.int64) * N + row
            y0 = sums[4 * i + e] + bias0
            y1 = sums[4 * i + 2 + e] + bias1
            tl.store(out, y0.to(out_ptr.dtype.element_ty), mask=(column < M) & (row < N))
            tl.store(out + 8, y1.to(out_ptr.dtype.element_ty), mask=(column < M) & (row + 8 < N))


@triton.jit(do_not_specialize=["splits", "size", "N"])
def _add_splits_kernel(parts_ptr, bias_ptr, out_ptr, splits, size, N, HAS_BIAS: tl.constexpr, SIZE: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    keep = index < size
    y = tl.zeros((SIZE,), tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + index % N, mask=keep, other=0.0).to(tl.float32)
    gdc_wait()
    for _ in range(splits):
        y += tl.load(parts_ptr + index, mask=keep, other=0.0)
        parts_ptr += size
    tl.store(out_ptr + index, y.to(out_ptr.dtype.element_ty), mask=keep)


def int8_wgmma_linear(
    x: torch.Tensor,
    tiles: torch.Tensor,
    tile_norms: torch.Tensor,
    awq_scales: torch.Tensor | None,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    splits: int | None = None,
) -> torch.Tensor:
    """x [M, K] contiguous, bf16 or fp16, times the transposed weight, plus bias: [M, N] in x's dtype.

    splits: programs that share the blocks of K, at most; chosen by shape when None.
    """
    rows = x.shape[0]
    words = quantize_chunks(x, awq_scales, table)
    bands = triton.cdiv(out_features, TILE_ROWS)
    blocks = tiles.shape[0] // bands
    programs = words.shape[0] * triton.cdiv(out_features, _PROGRAM_ROWS)
    split_blocks = triton.cdiv(blocks, splits or _choose_splits(programs, blocks))
    splits = triton.cdiv(blocks, split_blocks)
    out = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    parts = out if splits == 1 else torch.empty(splits, rows, out_features, dtype=torch.float32, device=x.device)
    _int8_wgmma_kernel[(words.shape[0], triton.cdiv(out_features, _PROGRAM_ROWS), splits)](
        tiles_ptr=tiles,
        norms_ptr=tile_norms.view(torch.int32),
        table_ptr=table,
        x_ptr=words,
        bias_ptr=bias if splits == 1 else None,
        out_ptr=parts,
        M=rows,
        N=out_features,
        blocks=blocks,
        split_blocks=split_blocks,
        WIDTH=tiles.shape[1] // PLANE_WORDS,
        WARPS=_WARPS,
        HAS_BIAS=bias is not None and splits == 1,
        num_warps=_WARPS,
        enable_fp_fusion=True,
        num_stages=1,
        launch_pdl=True,
        maxnreg=128,
    )
    if splits > 1:
        _add_splits_kernel[(triton.cdiv(out.numel(), _SUM_SIZE),)](
            parts_ptr=parts,
            bias_ptr=bias,
            out_ptr=out,
            splits=splits,
            size=out.numel(),
            N=out_features,
            HAS_BIAS=bias is not None,
            SIZE=_SUM_SIZE,
            num_warps=4,
            enable_fp_fusion=True,
            launch_pdl=True,
        )
    return out


def _choose_splits(programs: int, blocks: int) -> int:
    """A power of two: about three programs a multiprocessor, each with two blocks at least.

    From times on an H200, of an earlier form of the kernel.
    """
    splits = 1
    while programs * splits * 2 <= 400 and splits * 4 <= blocks:
        splits *= 2
    return splits
