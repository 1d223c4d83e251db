"""The product for more rows on Hopper: codes decoded to int8 in registers, multiplied by `wgmma`, x in shared memory.

Two warpgroups of a program take 64 rows of the weight each, and both the same rows of x, which travel through a ring in
shared memory a chunk (up to 64 rows by one 128-block) at a time. The warpgroups run apart: while one waits for its
product, the other decodes or scales. The integer sums of a block become floats, times the norm of the weight's row and
the scale of x's row, before the next block.

Where the weight has too few rows to fill the GPU, programs split the blocks of K, and a second kernel adds up.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from polar_kernels.kernels.decode_int8 import decode_half_tile
from polar_kernels.kernels.ptx import load_cached, wait_for_previous_kernel
from polar_kernels.kernels.quantize_activation import quantize_chunks
from polar_kernels.kernels.ring import (
    CHUNK_ROW_BYTES,
    add_scaled,
    fill_slot,
    open_ring,
    release_slot,
    wait_for_slot,
)
from polar_kernels.kernels.tile_access import load_half_tile, norm_of
from polar_kernels.tiles import TILE_ROWS

_WARPS = 8
_PROGRAM_ROWS = 16 * _WARPS  # of the weight
_SLOTS = tl.constexpr(5)
_LATE = tl.constexpr(2)  # chunks after which a slot is filled again, so that one warpgroup may lead the other
_CHUNK_ROW_BYTES = tl.constexpr(CHUNK_ROW_BYTES)
_SUM_SIZE = 1024


@triton.constexpr_function
def _start_code(rows: int) -> str:
    """PTX: start 64 rows of the weight by one 128-block, 16 registers a thread, times `rows` rows of x.

    $0..: rows / 2 sums a thread, as bits of 12582912 + sum; then the 16 registers and the address of x.
    """
    outs = rows // 2
    sums = ", ".join(f"${i}" for i in range(outs))
    code = [
        "{ .reg .b32 at; .reg .b64 x; .reg .pred p; setp.eq.b32 p, 0, 0;",
        *(f"mov.b32 ${i}, 0x4B400000;" for i in range(outs)),
        # The descriptor: address / 16, 1024 bytes from 8 rows to the next, 128-byte swizzle.
        f"shr.u32 at, ${outs + 16}, 4; or.b32 at, at, 0x10000;",
        "wgmma.fence.sync.aligned;",
    ]
    for step in range(4):
        a = ", ".join(f"${outs + 4 * step + i}" for i in range(4))
        code.append("mov.b64 x, {at, 0x40000040};")
        code.append(f"wgmma.mma_async.sync.aligned.m64n{rows}k32.s32.s8.s8 {{{sums}}}, {{{a}}}, x, p;")
        code.append("add.u32 at, at, 2;")
    code.append("wgmma.commit_group.sync.aligned; }")
    return " ".join(code)


@triton.constexpr_function
def _start_constraints(rows: int) -> str:
    return ",".join(["=&r"] * (rows // 2) + ["r"] * 17)


@triton.constexpr_function
def _finish_constraints(rows: int) -> str:
    return ",".join(["=r"] * (rows // 2) + [str(i) for i in range(rows // 2)])


@triton.constexpr_function
def _types(rows: int) -> tuple:
    return (tl.int32,) * (rows // 2)


@triton.jit
def _start(a, x, ROWS: tl.constexpr):
    return tl.inline_asm_elementwise(_start_code(ROWS), _start_constraints(ROWS), a + (x,), _types(ROWS), False, 1)


@triton.jit
def _finish(products, ROWS: tl.constexpr):
    """The products, once the tensor cores have written them."""
    return tl.inline_asm_elementwise(
        "wgmma.wait_group.sync.aligned 0;", _finish_constraints(ROWS), products, _types(ROWS), False, 1
    )


@triton.jit
def _multiply_block(
    sums, tile, table, ring, slot, parity, done, total, source, thread,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """The sums of a thread with one block of K added. done, total: chunks before this block, and in all."""
    lane = thread % 32
    a = decode_half_tile(tile[0], tile[1], tile[2][0], tile[2][1], table)
    n0 = norm_of(tile[3], 0)
    n1 = norm_of(tile[3], 16)
    added = ()
    for chunk in tl.static_range(CHUNKS):
        x = wait_for_slot(ring, slot, parity, ROWS, _SLOTS)
        products = _start(a, x, ROWS)
        late = slot - _LATE
        late_parity = tl.where(late < 0, parity ^ 1, parity)
        late = tl.where(late < 0, late + _SLOTS, late)
        refill = done - _LATE + _SLOTS
        fills = ((done >= _LATE) & (refill < total)).to(tl.int32)
        chunk_source = source + refill.to(tl.int64) * (ROWS * _CHUNK_ROW_BYTES)
        fill_slot(ring, late, late_parity, fills, chunk_source, thread, ROWS, _SLOTS, WARPS, True)
        products = _finish(products, ROWS)
        for j in tl.static_range(ROWS // 8):
            added = added + add_scaled(
                sums, chunk * (ROWS // 2) + 4 * j, products, j, n0, n1, ring, slot, lane % 4 * 16, ROWS, _SLOTS
            )
        release_slot(ring, slot, lane, ROWS, _SLOTS)
        done += 1
        parity = tl.where(slot == _SLOTS - 1, parity ^ 1, parity)
        slot = tl.where(slot == _SLOTS - 1, 0, slot + 1)
    return added, slot, parity, done


@triton.jit(do_not_specialize=["M"])
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
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
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
    even = load_half_tile(tiles_ptr, norms_ptr, first, half, lane)
    odd = load_half_tile(tiles_ptr, norms_ptr, tl.minimum(first + 1, last), half, lane)
    table = load_cached(table_ptr + thread * 0)
    ring = open_ring(thread, ROWS, _SLOTS, WARPS)
    gdc_launch_dependents()
    # Everything above was there before; x comes from the kernel before this one.
    q = lane % 4 + wait_for_previous_kernel(thread)
    total = count * CHUNKS
    chunk = (tl.program_id(0).to(tl.int64) * blocks + first_block) * CHUNKS
    source = x_ptr.to(tl.int64) + chunk * (ROWS * _CHUNK_ROW_BYTES)
    for chunk in tl.static_range(_SLOTS):
        fills = (chunk < total).to(tl.int32)
        fill_slot(ring, chunk, 0, fills, source + chunk * (ROWS * _CHUNK_ROW_BYTES), thread, ROWS, _SLOTS, WARPS, False)
    sums = ()
    for _ in tl.static_range(CHUNKS * ROWS // 2):
        sums = sums + (tl.zeros(lane.shape, tl.float32),)
    slot = 0
    parity = 0
    done = 0
    # Two blocks at a time, each with registers of its own: copying from one set to the other would wait for its loads.
    for step in range(0, count, 2):
        sums, slot, parity, done = _multiply_block(
            sums, even, table, ring, slot, parity, done, total, source, thread, ROWS, CHUNKS, WARPS
        )
        even = load_half_tile(tiles_ptr, norms_ptr, tl.minimum(first + step + 2, last), half, lane)
        if step + 1 < count:
            sums, slot, parity, done = _multiply_block(
                sums, odd, table, ring, slot, parity, done, total, source, thread, ROWS, CHUNKS, WARPS
            )
        odd = load_half_tile(tiles_ptr, norms_ptr, tl.minimum(first + step + 3, last), half, lane)
    row = band * 32 + half * 16 + g
    bias0 = 0.0
    bias1 = 0.0
    if HAS_BIAS:
        bias0 = tl.load(bias_ptr + row, mask=row < N, other=0.0).to(tl.float32)
        bias1 = tl.load(bias_ptr + row + 8, mask=row + 8 < N, other=0.0).to(tl.float32)
    out_ptr += tl.program_id(2).to(tl.int64) * M * N
    for i in tl.static_range(CHUNKS * ROWS // 8):
        for e in tl.static_range(2):
            column = tl.program_id(0) * (CHUNKS * ROWS) + i * 8 + 2 * q + e
            out = out_ptr + column.to(tl.int64) * N + row
            y0 = sums[4 * i + e] + bias0
            y1 = sums[4 * i + 2 + e] + bias1
            tl.store(out, y0.to(out_ptr.dtype.element_ty), mask=(column < M) & (row < N))
            tl.store(out + 8, y1.to(out_ptr.dtype.element_ty), mask=(column < M) & (row + 8 < N))


@triton.jit
def _add_splits_kernel(
    parts_ptr, bias_ptr, out_ptr, size, N, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, SIZE: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    keep = index < size
    y = tl.zeros((SIZE,), tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + index % N, mask=keep, other=0.0).to(tl.float32)
    gdc_wait()
    for split in tl.static_range(SPLITS):
        y += tl.load(parts_ptr + split * size + index, mask=keep, other=0.0)
    tl.store(out_ptr + index, y.to(out_ptr.dtype.element_ty), mask=keep)


def int8_wgmma_linear(
    x: torch.Tensor,
    tiles: torch.Tensor,
    tile_norms: torch.Tensor,
    awq_scales: torch.Tensor | None,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    program_columns: int,
    splits: int,
) -> torch.Tensor:
    """x [M, K] contiguous, bf16 or fp16, times the transposed weight, plus bias: [M, N] in x's dtype.

    program_columns: rows of x a program takes, 16, 32, or a multiple of 64; splits: programs that share the blocks of
    K, at most.
    """
    rows = x.shape[0]
    chunk_rows = min(program_columns, 64)
    words = quantize_chunks(x, awq_scales, table, chunk_rows, program_columns // chunk_rows)
    bands = triton.cdiv(out_features, TILE_ROWS)
    blocks = tiles.shape[0] // bands
    split_blocks = triton.cdiv(blocks, splits)
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
        ROWS=chunk_rows,
        CHUNKS=program_columns // chunk_rows,
        WARPS=_WARPS,
        HAS_BIAS=bias is not None and splits == 1,
        num_warps=_WARPS,
        num_stages=1,
        launch_pdl=True,
        maxnreg=128 if program_columns == 64 else None,
    )
    if splits > 1:
        _add_splits_kernel[(triton.cdiv(out.numel(), _SUM_SIZE),)](
            parts_ptr=parts,
            bias_ptr=bias,
            out_ptr=out,
            size=out.numel(),
            N=out_features,
            SPLITS=splits,
            HAS_BIAS=bias is not None,
            SIZE=_SUM_SIZE,
            num_warps=4,
            launch_pdl=True,
        )
    return out
