"""The product for more rows on Hopper: codes decoded to int8 in registers, multiplied by `wgmma`, x in shared memory.

A warpgroup takes 64 rows of the weight and 64, 128 or 256 of x, which travel through a ring in shared memory (`ring`).
It decodes a block of K, multiplies, and turns the integer sums into floats, times the norm of the weight's row and the
scale of x's row. Each of these waits for the one before; several warpgroups of a multiprocessor take turns.
`wgmma_forms` has the ways to cut a product into programs.

Where the weight has too few rows to fill the GPU, programs split the blocks of K, and a second kernel adds up.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from polar_kernels.kernels.decode_int8 import decode_half_tile
from polar_kernels.kernels.ptx import load_cached, wait_for_previous_kernel
from polar_kernels.kernels.quantize_chunks import quantize_chunks
from polar_kernels.kernels.ring import (
    CHUNK_BYTES,
    add_scaled,
    fill_slot,
    load_pairs,
    open_ring,
    release_slot,
    wait_for_slot,
)
from polar_kernels.kernels.tile_access import load_half_tile, norm_of
from polar_kernels.kernels.wgmma_forms import Form, choose_cut
from polar_kernels.tiles import PLANE_WORDS, TILE_ROWS

_SLOTS = tl.constexpr(5)
_CHUNK = tl.constexpr(CHUNK_BYTES)
_SUM_SIZE = 1024


def _start_code(rows: int) -> str:
    """PTX: start 64 rows of the weight by one 128-block, 16 registers a thread, times 64 or 128 rows of x.

    $0..: the sums of a thread, as bits of 12582912 + sum; then the 16 registers and the addresses of the chunks.
    """
    count, chunks = rows // 2, rows // 64
    sums = ", ".join(f"${i}" for i in range(count))
    # The descriptor's upper half: bytes from 8 rows to the next, over 16, and the swizzle, of 128 or 64 bytes.
    upper = 0x40000040 if rows == 64 else 0x80000020
    code = [
        "{ .reg .b32 at; .reg .b64 x; .reg .pred p; setp.eq.b32 p, 0, 0;",
        *(f"mov.b32 ${i}, 0x4B400000;" for i in range(count)),
        "wgmma.fence.sync.aligned;",
    ]
    for step in range(4):
        chunk, inside = divmod(step, 4 // chunks)
        if inside == 0:
            code.append(f"shr.u32 at, ${count + 16 + chunk}, 4; or.b32 at, at, 0x10000;")
        a = ", ".join(f"${count + 4 * step + i}" for i in range(4))
        code.append(f"mov.b64 x, {{at, {upper}}};")
        code.append(f"wgmma.mma_async.sync.aligned.m64n{rows}k32.s32.s8.s8 {{{sums}}}, {{{a}}}, x, p;")
        code.append("add.u32 at, at, 2;")
    code.append("wgmma.commit_group.sync.aligned; }")
    return " ".join(code)


_START_64, _START_128 = tl.constexpr(_start_code(64)), tl.constexpr(_start_code(128))
_START_64_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 32 + ["r"] * 17))
_START_128_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 64 + ["r"] * 18))
_FINISH_64_CONSTRAINTS = tl.constexpr(",".join(["=r"] * 32 + [str(i) for i in range(32)]))
_FINISH_128_CONSTRAINTS = tl.constexpr(",".join(["=r"] * 64 + [str(i) for i in range(64)]))
_TYPES_64, _TYPES_128 = tl.constexpr((tl.int32,) * 32), tl.constexpr((tl.int32,) * 64)
_FINISH = tl.constexpr("wgmma.wait_group.sync.aligned 0;")


@triton.jit
def _start(a, chunks, ROWS: tl.constexpr):
    if ROWS == 64:
        return tl.inline_asm_elementwise(_START_64, _START_64_CONSTRAINTS, a + chunks, _TYPES_64, False, 1)
    else:
        return tl.inline_asm_elementwise(_START_128, _START_128_CONSTRAINTS, a + chunks, _TYPES_128, False, 1)


@triton.jit
def _finish(products, ROWS: tl.constexpr):
    """The products, once the tensor cores have written them."""
    if ROWS == 64:
        return tl.inline_asm_elementwise(_FINISH, _FINISH_64_CONSTRAINTS, products, _TYPES_64, False, 1)
    else:
        return tl.inline_asm_elementwise(_FINISH, _FINISH_128_CONSTRAINTS, products, _TYPES_128, False, 1)


@triton.jit
def _next_slot(slot, parity):
    last = slot == _SLOTS - 1
    return tl.where(last, 0, slot + 1), tl.where(last, parity ^ 1, parity)


@triton.jit
def _refill(ring, slot, parity, done, late: tl.constexpr, count, source, thread):
    """Start copying a later chunk into the slot of `late` chunks ago, once all warps have left it."""
    slot -= late
    parity = tl.where(slot < 0, parity ^ 1, parity)
    slot = tl.where(slot < 0, slot + _SLOTS, slot)
    later = done - late + _SLOTS
    copies = ((thread == 0) & (done >= late) & (later < count)).to(tl.int32)
    fill_slot(ring, slot, parity, copies, source + later.to(tl.int64) * _CHUNK, _SLOTS, True)


@triton.jit
def _multiply_block(sums, a, n0, n1, ring, slot, parity, done, count, source, thread, ROWS: tl.constexpr):
    """A thread's sums with one block of K times ROWS rows of x added. done, count: chunks before it, and in all."""
    lane = thread % 32
    first = wait_for_slot(ring, slot, parity, _SLOTS)
    chunks = (first,)
    second_slot = slot
    next_slot, next_parity = _next_slot(slot, parity)
    if ROWS == 128:
        chunks = (first, wait_for_slot(ring, next_slot, next_parity, _SLOTS))
        second_slot = next_slot
        next_slot, next_parity = _next_slot(next_slot, next_parity)
    products = _start(a, chunks, ROWS)
    # While the tensor cores work: the chunks of the block before, or of one more where a block is one chunk, have been
    # left by all warps but those of a warpgroup that lags.
    _refill(ring, slot, parity, done, 2, count, source, thread)
    if ROWS == 128:
        _refill(ring, slot, parity, done, 1, count, source, thread)
    products = _finish(products, ROWS)
    added = ()
    for i in tl.static_range(ROWS // 8):
        pairs = load_pairs(chunks[i // 8], i % 8, lane % 4)
        added = added + add_scaled(sums, products, 4 * i, pairs, n0, n1)
    release_slot(ring, slot, lane, _SLOTS)
    if ROWS == 128:
        release_slot(ring, second_slot, lane, _SLOTS)
    return added, next_slot, next_parity, done + ROWS // 64


@triton.jit
def multiply_bands(
    tiles_ptr,
    norms_ptr,
    table_ptr,
    source,
    first,
    count,
    thread,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    PRODUCTS: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Two warps a band times the program's rows of x: ROWS / 2 * PRODUCTS sums a thread, rows g and g + 8 of half a
    band times rows 8 i + 2 q and the next of x in every four; and q.

    first: a thread's first tile, after which come count - 1 more; source: address of the first chunk of x. Waits for
    the kernel before, which writes x, and starts to read weights before that.
    """
    lane = thread % 32
    half = thread // 32 % 2
    last = first + count - 1
    tile = load_half_tile(tiles_ptr, norms_ptr, first, half, lane, WIDTH)
    table = load_cached(table_ptr + thread * 0)
    ring = open_ring(thread, _SLOTS, WARPS)
    # Everything above was there before; x comes from the kernel before this one.
    q = lane % 4 + wait_for_previous_kernel(thread)
    chunks = count * (ROWS // 64 * PRODUCTS)
    for chunk in tl.static_range(_SLOTS):
        copies = ((thread == 0) & (chunk < chunks)).to(tl.int32)
        fill_slot(ring, chunk, 0, copies, source + chunk * _CHUNK, _SLOTS, False)
    sums0 = ()
    for _ in tl.static_range(ROWS // 2):
        sums0 = sums0 + (tl.zeros(lane.shape, tl.float32),)
    sums1 = sums0
    slot = 0
    parity = 0
    done = 0
    for step in range(0, count):
        a = decode_half_tile(tile[0], tile[1], tile[2][0], tile[2][1], table, WIDTH)
        n0 = norm_of(tile[3], 0)
        n1 = norm_of(tile[3], 16)
        tile = load_half_tile(tiles_ptr, norms_ptr, tl.minimum(first + step + 1, last), half, lane, WIDTH)
        sums0, slot, parity, done = _multiply_block(
            sums0, a, n0, n1, ring, slot, parity, done, chunks, source, thread, ROWS
        )
        if PRODUCTS == 2:
            sums1, slot, parity, done = _multiply_block(
                sums1, a, n0, n1, ring, slot, parity, done, chunks, source, thread, ROWS
            )
    sums = sums0
    if PRODUCTS == 2:
        sums = sums0 + sums1
    return sums, q


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
    ROWS: tl.constexpr,
    PRODUCTS: tl.constexpr,
    WARPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    thread = tl.arange(0, 32 * WARPS)
    band = tl.program_id(1) * (WARPS // 2) + thread // 64
    first_block = tl.program_id(2) * split_blocks
    count = tl.minimum(blocks - first_block, split_blocks)
    first = tl.minimum(band, tl.cdiv(N, 32) - 1) * blocks + first_block
    program_bytes: tl.constexpr = _CHUNK * (ROWS // 64 * PRODUCTS)  # of a block of K
    source = x_ptr.to(tl.int64) + (tl.program_id(0).to(tl.int64) * blocks + first_block) * program_bytes
    sums, q = multiply_bands(
        tiles_ptr, norms_ptr, table_ptr, source, first, count, thread, WIDTH, ROWS, PRODUCTS, WARPS
    )
    row = band * 32 + thread // 32 % 2 * 16 + thread % 32 // 4
    bias0 = tl.zeros(thread.shape, tl.float32)
    bias1 = tl.zeros(thread.shape, tl.float32)
    if HAS_BIAS:
        bias0 = tl.load(bias_ptr + row, mask=row < N, other=0.0).to(tl.float32)
        bias1 = tl.load(bias_ptr + row + 8, mask=row + 8 < N, other=0.0).to(tl.float32)
    out_ptr += tl.program_id(2).to(tl.int64) * M * N
    for i in tl.static_range(ROWS // 8 * PRODUCTS):
        for e in tl.static_range(2):
            column = tl.program_id(0) * (ROWS * PRODUCTS) + i * 8 + 2 * q + e
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
    cut: tuple[Form, int] | None = None,
) -> torch.Tensor:
    """x [M, K] contiguous, bf16 or fp16, times the transposed weight, plus bias: [M, N] in x's dtype.

    cut: the form, and how many programs share the blocks of K at most; chosen by shape when None.
    """
    rows = x.shape[0]
    blocks = tiles.shape[0] // triton.cdiv(out_features, TILE_ROWS)
    form, splits = cut or choose_cut(rows, out_features, blocks, _multiprocessors(x.device))
    product_rows = min(form.rows, 128)
    words = quantize_chunks(x, awq_scales, table, product_rows, form.rows // product_rows)
    split_blocks = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, split_blocks)
    out = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    parts = out if splits == 1 else torch.empty(splits, rows, out_features, dtype=torch.float32, device=x.device)
    _int8_wgmma_kernel[(words.shape[0], triton.cdiv(out_features, 16 * form.warps), splits)](
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
        ROWS=product_rows,
        PRODUCTS=form.rows // product_rows,
        WARPS=form.warps,
        HAS_BIAS=bias is not None and splits == 1,
        num_warps=form.warps,
        enable_fp_fusion=True,
        num_stages=1,
        launch_pdl=True,
        maxnreg=form.registers,
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


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
