"""The product for few rows: codes decoded to int8 in registers, multiplied on the tensor cores, norms once a block.

A warp multiplies one tile (32 rows x one 128-block) by 8 rows of x at a time. Decoding costs about two integer
instructions a weight, the tensor cores the same for 1 row of x as for 8:

- a byte permute looks up four magnitudes 0..7 and four 8..15 at once, a second one makes the mask that picks between;
- negation is a bitwise complement, since levels are half-integers; what a half is worth comes back once a block;
- the integer accumulator starts at 0x4B400000, which read as a float is 12582912 plus the sum.

Warps of a program that share rows split the blocks of K, and add up in shared memory at the end.
"""

import torch
import triton
import triton.language as tl

from polar_kernels.kernels.ptx import as_float, load_cached, mma_s8, wait_for_previous_kernel
from polar_kernels.kernels.quantize_activation import quantize_activation
from polar_kernels.kernels.tile_access import load_tile, norm_of
from polar_kernels.tiles import TILE_ROWS


def _decode(group: int) -> str:
    """PTX: eight weights of the magnitude word $2 and the sign word $3, by the table $4..$7, to two registers.

    group: the sign group of the first four.
    """

    def four(out: str, selector: str, mask: int, shift: int) -> str:
        sign = f"shl.b32 s, $3, {shift};" if shift else "mov.b32 s, $3;"
        return (
            f"prmt.b32 lo, $4, $5, {selector}; prmt.b32 hi, $6, $7, {selector}; prmt.b32 m, up, $2, {mask};"
            f"lop3.b32 v, hi, lo, m, 0xE4; {sign} prmt.b32 s, s, 0, 0xBA98; xor.b32 {out}, v, s;"
        )

    return (
        "{ .reg .b32 a, b, up, lo, hi, m, v, s; and.b32 a, $2, 0x77777777; shl.b32 up, $2, 4;"
        + four("$0", "a", 0xD9C8, group)
        + " shr.u32 b, a, 16;"
        + four("$1", "b", 0xFBEA, group + 1)
        + " }"
    )


_DECODE_0, _DECODE_1, _DECODE_2, _DECODE_3 = (tl.constexpr(_decode(2 * s)) for s in range(4))
ROW_GROUP = 8  # rows of x the tensor cores take at a time
MAX_ROWS = 64  # of x in one launch: more would not fit in registers


def _reduce(warps: int) -> tuple[str, str]:
    """PTX: the sum of 8 values a thread over `warps` neighbouring warps, and its constraints.

    $0..: the 8 / warps sums (at least one) that fall to this warp; then the 8 values, the thread, the scratch address.
    """
    outs = max(1, 8 // warps)
    thread, base = f"${outs + 8}", f"${outs + 9}"
    code = [
        "{ .reg .u32 lane, warp, own, first, p; .reg .f32 v;",
        f"and.b32 lane, {thread}, 31; shr.u32 warp, {thread}, 5;",
        f"mad.lo.u32 p, warp, 1024, {base}; mad.lo.u32 p, lane, 4, p;",
        *(f"st.shared.f32 [p+{128 * e}], ${outs + e};" for e in range(8)),
        "bar.sync 0;",
        f"and.b32 own, warp, {warps - 1}; sub.u32 first, warp, own; and.b32 own, own, {8 // outs - 1};",
        f"mad.lo.u32 p, first, 1024, {base}; mad.lo.u32 p, lane, 4, p; mad.lo.u32 p, own, {128 * outs}, p;",
    ]
    for out in range(outs):
        code.append(f"ld.shared.f32 ${out}, [p+{128 * out}];")
        code += [f"ld.shared.f32 v, [p+{128 * out + 1024 * w}]; add.f32 ${out}, ${out}, v;" for w in range(1, warps)]
    code.append("bar.sync 0; }")
    return " ".join(code), ",".join(["=&f"] * outs + ["f"] * 8 + ["r", "r"])


_REDUCE_4, _REDUCE_8, _REDUCE_16 = (tl.constexpr(_reduce(warps)) for warps in (4, 8, 16))
_SCRATCH_4, _SCRATCH_8, _SCRATCH_16 = (
    tl.constexpr(f"{{ .shared .align 16 .b8 sums[{1024 * warps}]; mov.u32 $0, sums; }} // $1") for warps in (4, 8, 16)
)


@triton.jit
def _decode_eight(code: tl.constexpr, word, signs, table):
    return tl.inline_asm_elementwise(
        code,
        "=&r,=&r,r,r,r,r,r,r",
        [word, signs, table[0], table[1], table[2], table[3]],
        (tl.int32, tl.int32),
        True,
        1,
    )


@triton.jit
def _decode_half_tile(w0, w1, signs0, signs1, table):
    """The A fragments of 16 rows by 128 columns: four registers for each of four steps of 32 columns."""
    a0, a2 = _decode_eight(_DECODE_0, w0[0], signs0, table)
    a1, a3 = _decode_eight(_DECODE_0, w0[1], signs1, table)
    b0, b2 = _decode_eight(_DECODE_1, w0[2], signs0, table)
    b1, b3 = _decode_eight(_DECODE_1, w0[3], signs1, table)
    c0, c2 = _decode_eight(_DECODE_2, w1[0], signs0, table)
    c1, c3 = _decode_eight(_DECODE_2, w1[1], signs1, table)
    d0, d2 = _decode_eight(_DECODE_3, w1[2], signs0, table)
    d1, d3 = _decode_eight(_DECODE_3, w1[3], signs1, table)
    return a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3


@triton.jit
def _multiply_half_tile(a, x0, x1):
    """16 rows by 128 columns times 8 rows of x: four sums a thread, as bits of 12582912 + sum."""
    start = tl.full(x0[0].shape, 0x4B400000, tl.int32)
    c0, c1, c2, c3 = mma_s8(a[0], a[1], a[2], a[3], x0[0], x0[1], start, start, start, start)
    c0, c1, c2, c3 = mma_s8(a[4], a[5], a[6], a[7], x0[2], x0[3], c0, c1, c2, c3)
    c0, c1, c2, c3 = mma_s8(a[8], a[9], a[10], a[11], x1[0], x1[1], c0, c1, c2, c3)
    c0, c1, c2, c3 = mma_s8(a[12], a[13], a[14], a[15], x1[2], x1[3], c0, c1, c2, c3)
    return as_float(c0), as_float(c1), as_float(c2), as_float(c3)


@triton.jit
def _sum_warps(sums, group: tl.constexpr, thread, scratch, WARPS: tl.constexpr):
    values = [
        sums[8 * group],
        sums[8 * group + 1],
        sums[8 * group + 2],
        sums[8 * group + 3],
        sums[8 * group + 4],
        sums[8 * group + 5],
        sums[8 * group + 6],
        sums[8 * group + 7],
        thread,
        scratch,
    ]
    if WARPS == 4:
        return tl.inline_asm_elementwise(_REDUCE_4[0], _REDUCE_4[1], values, (tl.float32, tl.float32), False, 1)
    elif WARPS == 8:
        return (tl.inline_asm_elementwise(_REDUCE_8[0], _REDUCE_8[1], values, tl.float32, False, 1),)
    else:
        return (tl.inline_asm_elementwise(_REDUCE_16[0], _REDUCE_16[1], values, tl.float32, False, 1),)


@triton.jit
def _scratch(thread, WARPS: tl.constexpr):
    """Address of shared memory for the sums of WARPS warps."""
    if WARPS == 4:
        return tl.inline_asm_elementwise(_SCRATCH_4, "=r,r", [thread], tl.int32, False, 1)
    elif WARPS == 8:
        return tl.inline_asm_elementwise(_SCRATCH_8, "=r,r", [thread], tl.int32, False, 1)
    else:
        return tl.inline_asm_elementwise(_SCRATCH_16, "=r,r", [thread], tl.int32, False, 1)


@triton.jit(do_not_specialize=["M"])
def _int8_matmul_kernel(
    tiles_ptr,
    norms_ptr,
    table_ptr,
    x_ptr,
    meta_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    blocks,
    padded_rows,
    GROUPS: tl.constexpr,
    WARPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    warp = thread // 32
    g = lane // 4
    first = tl.program_id(0) * blocks
    tile = load_tile(tiles_ptr, first + tl.minimum(warp, blocks - 1), lane)
    table = load_cached(table_ptr + thread * 0)
    # Everything above was there before; x and meta come from the kernel before this one.
    q = lane % 4 + wait_for_previous_kernel(thread)
    sums = ()
    for _ in tl.static_range(8 * GROUPS):
        sums = sums + (tl.zeros(lane.shape, tl.float32),)
    for step in range(tl.cdiv(blocks, WARPS)):
        block = step * WARPS + warp
        inside = block < blocks
        block = tl.minimum(block, blocks - 1)
        upper = _decode_half_tile(tile[0], tile[1], tile[4][0], tile[4][1], table)
        lower = _decode_half_tile(tile[2], tile[3], tile[4][2], tile[4][3], table)
        tile = load_tile(tiles_ptr, first + tl.minimum(block + WARPS, blocks - 1), lane)
        norms = tl.load(norms_ptr + (first + block).to(tl.int64) * 8 + g, mask=inside, other=0)
        n0 = norm_of(norms, 0)
        n1 = norm_of(norms, 16)
        n2 = norm_of(norms, 32)
        n3 = norm_of(norms, 48)
        added = ()
        for group in tl.static_range(GROUPS):
            words = x_ptr + ((group * 8 + g).to(tl.int64) * blocks + block) * 32 + q * 8
            x0 = load_cached(words)
            x1 = load_cached(words + 4)
            meta = load_cached(meta_ptr + (block * padded_rows + group * 8 + 2 * q) * 2)
            u0, u1, u2, u3 = _multiply_half_tile(upper, x0, x1)
            l0, l1, l2, l3 = _multiply_half_tile(lower, x0, x1)
            offset0 = as_float(meta[0])
            scale0 = as_float(meta[1])
            offset1 = as_float(meta[2])
            scale1 = as_float(meta[3])
            added = added + (
                sums[8 * group] + (u0 + offset0) * (n0 * scale0),
                sums[8 * group + 1] + (u1 + offset1) * (n0 * scale1),
                sums[8 * group + 2] + (u2 + offset0) * (n1 * scale0),
                sums[8 * group + 3] + (u3 + offset1) * (n1 * scale1),
                sums[8 * group + 4] + (l0 + offset0) * (n2 * scale0),
                sums[8 * group + 5] + (l1 + offset1) * (n2 * scale1),
                sums[8 * group + 6] + (l2 + offset0) * (n3 * scale0),
                sums[8 * group + 7] + (l3 + offset1) * (n3 * scale1),
            )
        sums = added
    scratch = _scratch(thread, WARPS)
    SHARE: tl.constexpr = 2 if WARPS == 4 else 1
    for group in tl.static_range(GROUPS):
        share = _sum_warps(sums, group, thread, scratch, WARPS)
        for i in tl.static_range(SHARE):
            index = warp % (8 // SHARE) * SHARE + i
            column = group * 8 + 2 * q + index % 2
            row = tl.program_id(0) * 32 + index // 2 * 8 + g
            keep = (column < M) & (row < N) & (warp < 8)
            y = share[i]
            if HAS_BIAS:
                y += tl.load(bias_ptr + row, mask=keep, other=0.0).to(tl.float32)
            tl.store(out_ptr + column.to(tl.int64) * N + row, y.to(out_ptr.dtype.element_ty), mask=keep)


def int8_linear(
    x: torch.Tensor,
    tiles: torch.Tensor,
    tile_norms: torch.Tensor,
    awq_scales: torch.Tensor | None,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    warps: int | None = None,
) -> torch.Tensor:
    """x [M, K] contiguous, 1 <= M <= MAX_ROWS, times the transposed weight, plus bias: [M, N] in x's dtype.

    warps: 4, 8 or 16 that share a band of 32 rows; chosen by shape when None.
    """
    rows = x.shape[0]
    groups = triton.next_power_of_2(triton.cdiv(rows, ROW_GROUP))
    words, meta = quantize_activation(x, awq_scales, table, groups * ROW_GROUP)
    bands = triton.cdiv(out_features, TILE_ROWS)
    blocks = tiles.shape[0] // bands
    out = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    warps = warps or _choose_warps(bands, groups)
    _int8_matmul_kernel[(bands,)](
        tiles_ptr=tiles,
        norms_ptr=tile_norms.view(torch.int64),
        table_ptr=table,
        x_ptr=words,
        meta_ptr=meta,
        bias_ptr=bias,
        out_ptr=out,
        M=rows,
        N=out_features,
        blocks=blocks,
        padded_rows=words.shape[0],
        GROUPS=groups,
        WARPS=warps,
        HAS_BIAS=bias is not None,
        num_warps=warps,
        num_stages=1,
        launch_pdl=True,
        maxnreg=80 if groups == 1 and warps == 8 else None,
    )
    return out


def _choose_warps(bands: int, groups: int) -> int:
    """Few bands want many warps each, to fill the GPU; many want few, whose sums are cheaper. Measured on an H200."""
    if groups >= 4:
        return 4 if bands * groups >= 1536 else 8
    if bands >= 4096:
        return 4
    return 16 if bands <= 64 * groups else 8
