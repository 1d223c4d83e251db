"""The product for more rows on Hopper: codes decoded to int8 in registers, multiplied by `wgmma`, x in shared memory.

A warpgroup takes 64 rows of the weight and 64, 128 or 256 of x, which travel through a ring in shared memory (`ring`).
It decodes a block of K, multiplies, and turns the integer sums into floats, times the norm of the weight's row and the
scale of x's row. Each of these waits for the one before; several warpgroups of a multiprocessor take turns.
`wgmma_forms` has the ways to cut a product into programs, `wgmma_output` what happens to the sums in the end.

Where the weight has too few rows to fill the GPU, programs split the blocks of K, and a second kernel adds up.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from polar_kernels.kernels.decode_int8 import decode_half_tile
from polar_kernels.kernels.ptx import hidden_zero, load_cached, wait_for_previous_kernel
from polar_kernels.kernels.quantize_chunks import quantize_chunks
from polar_kernels.kernels.ring import (
    choose_slots,
    chunk_words,
    fill_slot,
    load_scales,
    next_slot,
    open_ring,
    release_slot,
    reserve_shared,
    scales_of,
    shared_memory,
    wait_for_slot,
)
from polar_kernels.kernels.tile_access import further_place, half_tile_place, load_half_tile_at, norm_of
from polar_kernels.kernels.wgmma_forms import SCALE_BLOCKS, Form, choose_cut
from polar_kernels.kernels.wgmma_output import add_bias, add_halves, store_each, store_lines
from polar_kernels.tiles import PLANE_WORDS, TILE_ROWS

_SUM_SIZE = 1024
_SHARE = tl.constexpr(SCALE_BLOCKS)


def _start_code(rows: int) -> str:
    """PTX: start 64 rows of the weight by one 128-block, 16 registers a thread, times 64 or 128 rows of x.

    $0..: the sums of a thread; then the 16 registers and the address of x in shared memory.
    """
    count = rows // 2
    sums = ", ".join(f"${i}" for i in range(count))
    code = [
        "{ .reg .b32 at; .reg .b64 x; .reg .pred p; setp.ne.b32 p, 0, 0; wgmma.fence.sync.aligned;",
        f"shr.u32 at, ${count + 16}, 4; or.b32 at, at, 0x10000;",
    ]
    for step in range(4):
        a = ", ".join(f"${count + 4 * step + i}" for i in range(4))
        # The descriptor's upper half: bytes from 8 rows to the next, over 16, and the swizzle of 128 bytes.
        code.append("mov.b64 x, {at, 0x40000040};")
        code.append(f"wgmma.mma_async.sync.aligned.m64n{rows}k32.s32.s8.s8 {{{sums}}}, {{{a}}}, x, p;")
        if step == 0:  # the first product is not added to what was there
            code.append("setp.eq.b32 p, 0, 0;")
        code.append("add.u32 at, at, 2;")
    code.append("wgmma.commit_group.sync.aligned; }")
    return " ".join(code)


_START_64, _START_128 = tl.constexpr(_start_code(64)), tl.constexpr(_start_code(128))
_START_64_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 32 + ["r"] * 17))
_START_128_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 64 + ["r"] * 17))
_FINISH_64_CONSTRAINTS = tl.constexpr(",".join(["=r"] * 32 + [str(i) for i in range(32)]))
_FINISH_128_CONSTRAINTS = tl.constexpr(",".join(["=r"] * 64 + [str(i) for i in range(64)]))
_TYPES_64, _TYPES_128 = tl.constexpr((tl.int32,) * 32), tl.constexpr((tl.int32,) * 64)
_FINISH = tl.constexpr("wgmma.wait_group.sync.aligned 0;")
# Four sums $0..$3 plus the integers $8..$11 times the norms of two rows of the weight and, of these, the scales of two
# rows of x.
_ADD_SCALED = tl.constexpr(
    "{ .reg .f32 product, factor;"
    + " ".join(
        f"cvt.rn.f32.s32 product, ${8 + i}; mul.f32 factor, ${12 + i // 2}, ${14 + i % 2};"
        f"fma.rn.f32 ${i}, product, factor, ${i};"
        for i in range(4)
    )
    + " }"
)
_ADD = tl.constexpr(
    "{ .reg .f32 product;"
    + " ".join(f"cvt.rn.f32.s32 product, ${8 + i}; fma.rn.f32 ${i}, product, ${12 + i // 2}, ${i};" for i in range(4))
    + " }"
)


@triton.jit
def _start(a, x, ROWS: tl.constexpr):
    if ROWS == 64:
        return tl.inline_asm_elementwise(_START_64, _START_64_CONSTRAINTS, a + (x,), _TYPES_64, False, 1)
    else:
        return tl.inline_asm_elementwise(_START_128, _START_128_CONSTRAINTS, a + (x,), _TYPES_128, False, 1)


@triton.jit
def _finish(products, ROWS: tl.constexpr):
    """The products, once the tensor cores have written them."""
    if ROWS == 64:
        return tl.inline_asm_elementwise(_FINISH, _FINISH_64_CONSTRAINTS, products, _TYPES_64, False, 1)
    else:
        return tl.inline_asm_elementwise(_FINISH, _FINISH_128_CONSTRAINTS, products, _TYPES_128, False, 1)


@triton.jit
def _add(sums, products, at: tl.constexpr, n0, n1):
    """Sums `at` .. at + 3 plus the products of two rows of x and two of the weight, times the norms of those.

    One block of assembly, so that a sum stays in its register.
    """
    return tl.inline_asm_elementwise(
        _ADD,
        "=f,=f,=f,=f,0,1,2,3,r,r,r,r,f,f",
        [
            sums[at], sums[at + 1], sums[at + 2], sums[at + 3],
            products[at], products[at + 1], products[at + 2], products[at + 3],
            n0, n1,
        ],
        (tl.float32, tl.float32, tl.float32, tl.float32),
        False,
        1,
    )  # fmt: skip


@triton.jit
def add_scaled(sums, products, at: tl.constexpr, n0, n1, scales):
    """Sums `at` .. at + 3 plus the products of two rows of x and two of the weight, times the scales of both."""
    return tl.inline_asm_elementwise(
        _ADD_SCALED,
        "=f,=f,=f,=f,0,1,2,3,r,r,r,r,f,f,f,f",
        [
            sums[at], sums[at + 1], sums[at + 2], sums[at + 3],
            products[at], products[at + 1], products[at + 2], products[at + 3],
            n0, n1, scales[0], scales[1],
        ],
        (tl.float32, tl.float32, tl.float32, tl.float32),
        False,
        1,
    )  # fmt: skip


@triton.jit
def _times_scales(sums, first_scales, slot, ROWS: tl.constexpr, INVERSE: tl.constexpr):
    """Sums of a product times the scales of its rows of x, or divided by them."""
    scaled = ()
    for group in tl.static_range(ROWS // 8):
        s0, s1 = load_scales(first_scales, slot, group, ROWS, INVERSE)
        scaled = scaled + (
            sums[4 * group] * s0,
            sums[4 * group + 1] * s1,
            sums[4 * group + 2] * s0,
            sums[4 * group + 3] * s1,
        )
    return scaled


@triton.jit
def _refill(ring, slot, parity, done, count, source, thread, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """Start copying a later chunk into the slot of some chunks ago, once all warps have left it.

    Of two chunks ago, so that a warpgroup that lags is not waited for; with few slots of the last.
    """
    LATE: tl.constexpr = 2 if SLOTS > 3 else 1
    slot -= LATE
    parity = tl.where(slot < 0, parity ^ 1, parity)
    slot = tl.where(slot < 0, slot + SLOTS, slot)
    later = done - LATE + SLOTS
    copies = ((thread == 0) & (done >= LATE) & (later < count)).to(tl.int32)
    fill_slot(ring, slot, parity, copies, source + later.to(tl.int64) * (4 * chunk_words(ROWS)), ROWS, SLOTS, True)


@triton.jit
def _load_following(place, block: tl.constexpr, more, UNROLLED: tl.constexpr, WIDTH: tl.constexpr):
    """The tile after the one of a block, and the place of the first of the next blocks once it is the last of UNROLLED.
    more: whether there are any; the last tile is followed by itself."""
    if block == UNROLLED - 1:
        place = further_place(place, tl.where(more, UNROLLED, UNROLLED - 1), WIDTH)
        return place, load_half_tile_at(place, WIDTH)
    else:
        return place, load_half_tile_at(further_place(place, block + 1, WIDTH), WIDTH)


@triton.jit
def multiply_bands(
    tiles_ptr,
    norms_ptr,
    table_ptr,
    x_ptr,
    first_chunk,
    first,
    count,
    thread,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    PRODUCTS: tl.constexpr,
    WARPS: tl.constexpr,
    SHARED: tl.constexpr,
    SHARE: tl.constexpr,
    UNROLLED: tl.constexpr,
    LATE: tl.constexpr,
):
    """Two warps a band times the program's rows of x: ROWS / 2 * PRODUCTS sums a thread, as `wgmma_output` has them,
    the halves of the levels left out; q; and the address of SHARED bytes of shared memory.

    first: a thread's first tile, after which come count - 1 more; first_chunk: the number of the program's first chunk.
    Waits for the kernel before, which writes x, and starts to read weights before that. SHARE: how many blocks of a row
    of x, from the first on, have one scale. UNROLLED: so many blocks, 1 or SCALE_BLOCKS, are done without a branch, of
    which count is a multiple. LATE: see `Form`.
    """
    SLOTS: tl.constexpr = choose_slots(ROWS, PRODUCTS, SHARED, UNROLLED)
    SUMS: tl.constexpr = ROWS // 2  # of a product
    reserve_shared(x_ptr, count < 0, thread, SHARED)
    lane = thread % 32
    half = thread // 32 % 2
    place = half_tile_place(tiles_ptr, norms_ptr, first, half, lane, WIDTH)
    tile = load_half_tile_at(place, WIDTH)
    # Of an address that could differ between lanes, so that ptxas keeps the words out of uniform registers.
    table = load_cached(table_ptr + hidden_zero(lane))
    ring = open_ring(shared_memory(thread), thread, ROWS, SLOTS, WARPS)
    # Everything above was there before; x comes from the kernel before this one.
    q = lane % 4 + wait_for_previous_kernel(thread)
    chunks = count * PRODUCTS
    source = x_ptr.to(tl.int64) + first_chunk.to(tl.int64) * (4 * chunk_words(ROWS))
    for filled in tl.static_range(SLOTS):
        copies = ((thread == 0) & (filled < chunks)).to(tl.int32)
        fill_slot(ring, filled, 0, copies, source + filled * (4 * chunk_words(ROWS)), ROWS, SLOTS, False)
    sums = ()
    for _ in tl.static_range(SUMS * PRODUCTS):
        sums = sums + (tl.zeros(lane.shape, tl.float32),)
    first_scales = scales_of(ring, q, ROWS, SLOTS)
    slot = 0
    parity = 0
    for start in range(0, count, UNROLLED):
        for block in tl.static_range(UNROLLED):
            step = start + block
            a = decode_half_tile(tile[0], tile[1], tile[2][0], tile[2][1], table, WIDTH)
            n0 = norm_of(tile[3], 0)
            n1 = norm_of(tile[3], 16)
            if not LATE:
                place, tile = _load_following(place, block, start + UNROLLED < count, UNROLLED, WIDTH)
            added = ()
            for product in tl.static_range(PRODUCTS):
                done = step * PRODUCTS + product
                if (UNROLLED * PRODUCTS) % SLOTS == 0:  # each has its slot, of which the compiler need not be told
                    slot = start * 0 + (block * PRODUCTS + product) % SLOTS
                    parity = done // SLOTS % 2
                products = _start(a, wait_for_slot(ring, slot, parity, ROWS, SLOTS), ROWS)
                _refill(ring, slot, parity, done, chunks, source, thread, ROWS, SLOTS)
                products = _finish(products, ROWS)
                if LATE and product == PRODUCTS - 1:
                    place, tile = _load_following(place, block, start + UNROLLED < count, UNROLLED, WIDTH)
                own = sums[SUMS * product : SUMS * product + SUMS]
                # Between the first and the last block that share scales, sums are what is to be multiplied by those.
                if SHARE > 1 and block % SHARE == 0 and start % SHARE == 0:
                    own = _times_scales(own, first_scales, slot, ROWS, True)
                new = ()
                for group in tl.static_range(ROWS // 8):
                    if SHARE > 1:
                        new = new + _add(own, products, 4 * group, n0, n1)
                    else:
                        scales = load_scales(first_scales, slot, group, ROWS, False)
                        new = new + add_scaled(own, products, 4 * group, n0, n1, scales)
                if SHARE > 1 and block == UNROLLED - 1 and (step % SHARE == SHARE - 1 or step == count - 1):
                    new = _times_scales(new, first_scales, slot, ROWS, False)
                added = added + new
                release_slot(ring, slot, lane, ROWS, SLOTS)
                if (UNROLLED * PRODUCTS) % SLOTS != 0:
                    slot, parity = next_slot(slot, parity, SLOTS)
            sums = added
    return sums, q, ring


@triton.jit(do_not_specialize=["M", "N", "blocks", "split_blocks", "stride"])
def _int8_wgmma_kernel(
    tiles_ptr,
    norms_ptr,
    table_ptr,
    x_ptr,
    halves_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    blocks,
    split_blocks,
    stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    PRODUCTS: tl.constexpr,
    WARPS: tl.constexpr,
    SHARED: tl.constexpr,
    UNROLLED: tl.constexpr,
    LATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LINES: tl.constexpr,
    IN_PARTS: tl.constexpr,
):
    GROUPS: tl.constexpr = ROWS // 8 * PRODUCTS
    thread = tl.arange(0, 32 * WARPS)
    g = thread % 32 // 4
    half = thread // 32 % 2
    band = tl.program_id(1) * (WARPS // 2) + thread // 64
    first_block = tl.program_id(2) * split_blocks
    count = tl.minimum(blocks - first_block, split_blocks)
    first = tl.minimum(band, tl.cdiv(N, 32) - 1) * blocks + first_block
    first_chunk = (tl.program_id(0).to(tl.int64) * blocks + first_block) * PRODUCTS
    sums, q, shared = multiply_bands(
        tiles_ptr,
        norms_ptr,
        table_ptr,
        x_ptr,
        first_chunk,
        first,
        count,
        thread,
        WIDTH,
        ROWS,
        PRODUCTS,
        WARPS,
        SHARED,
        _SHARE,
        UNROLLED,
        LATE,
    )
    first_row = tl.program_id(0) * (ROWS * PRODUCTS)
    halves = halves_ptr + first_row.to(tl.int64) * stride + first_block // 2
    sums = add_halves(sums, norms_ptr, halves, first, count, stride, g, half, q, GROUPS)
    row = band * 32 + half * 16 + g
    if HAS_BIAS:
        sums = add_bias(sums, bias_ptr, row, N, GROUPS)
    if LINES:
        first_column = tl.program_id(1) * (16 * WARPS)
        store_lines(sums, out_ptr, shared, thread, first_row, first_column, M, N, N, GROUPS, WARPS)
    else:
        out = out_ptr + tl.program_id(2).to(tl.int64) * M * N
        store_each(sums, out, first_row, row, q, M, N, N, GROUPS)
    if IN_PARTS:
        gdc_launch_dependents()  # what adds up: each program of this kernel is done


@triton.jit(do_not_specialize=["N"])  # of a size that is a multiple of 16 four sums are loaded at a time
def _add_splits_kernel(
    parts_ptr, bias_ptr, out_ptr, size, N, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, SIZE: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    keep = index < size
    y = tl.zeros((SIZE,), tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + index % N, mask=keep, other=0.0).to(tl.float32)
    gdc_wait()
    for split in tl.static_range(SPLITS):  # unrolled, so that no load waits for another
        y += tl.load(parts_ptr + split * size.to(tl.int64) + index, mask=keep, other=0.0)
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

    cut: the form, and how many blocks of K a program takes at most, a multiple of SCALE_BLOCKS; by shape when None.
    """
    rows = x.shape[0]
    blocks = tiles.shape[0] // triton.cdiv(out_features, TILE_ROWS)
    form, split_blocks = cut or choose_cut(rows, out_features, blocks, _multiprocessors(x.device))
    words, halves = quantize_chunks(x, awq_scales, table, form.product_rows, form.products)
    splits = triton.cdiv(blocks, split_blocks)
    out = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    parts = out if splits == 1 else torch.empty(splits, rows, out_features, dtype=torch.float32, device=x.device)
    _int8_wgmma_kernel[(words.shape[0], triton.cdiv(out_features, 16 * form.warps), splits)](
        tiles_ptr=tiles,
        norms_ptr=tile_norms.view(torch.int32),
        table_ptr=table,
        x_ptr=words,
        halves_ptr=halves.view(torch.int32),
        bias_ptr=bias if splits == 1 else None,
        out_ptr=parts,
        M=rows,
        N=out_features,
        blocks=blocks,
        split_blocks=split_blocks,
        stride=halves.shape[1] // 2,
        WIDTH=tiles.shape[1] // PLANE_WORDS,
        ROWS=form.product_rows,
        PRODUCTS=form.products,
        WARPS=form.warps,
        SHARED=form.shared_bytes,
        UNROLLED=form.unrolled if blocks % SCALE_BLOCKS == 0 else 1,
        LATE=form.late,
        HAS_BIAS=bias is not None and splits == 1,
        LINES=splits == 1 and out_features % 8 == 0,
        IN_PARTS=splits > 1,
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
            size=out.numel(),
            N=out_features,
            SPLITS=splits,
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
