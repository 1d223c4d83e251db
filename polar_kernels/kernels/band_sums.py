"""How the warps that share a band, 32 rows of the weight, or half of one, add up their sums and store them: for few
rows of x.

A thread holds 8 sums a group of 8 rows of x: rows g, g + 8, g + 16, g + 24 of the weight (g = lane // 4), times rows
2 q and 2 q + 1 of the group (q = lane % 4); of half a band the first 4. Of one row of x, one a lane.
"""

import triton
import triton.language as tl

from polar_kernels.kernels.shared_memory import declared_memory

ROW_GROUP = 8  # rows of x the tensor cores take at a time


@triton.constexpr_function
def _reduce(warps: int, values: int) -> str:
    """PTX: the sum of 4 or 8 values a thread over `warps` neighbouring warps.

    $0..: the values / warps sums (at least one) that fall to this warp; then the values, the thread, the scratch
    address.
    """
    outs = max(1, values // warps)
    size = 128 * values
    thread, base = f"${outs + values}", f"${outs + values + 1}"
    code = [
        "{ .reg .u32 lane, warp, own, first, p; .reg .f32 v;",
        f"and.b32 lane, {thread}, 31; shr.u32 warp, {thread}, 5;",
        f"mad.lo.u32 p, warp, {size}, {base}; mad.lo.u32 p, lane, 4, p;",
        *(f"st.shared.f32 [p+{128 * e}], ${outs + e};" for e in range(values)),
        "bar.sync 0;",
        f"and.b32 own, warp, {warps - 1}; sub.u32 first, warp, own; and.b32 own, own, {values // outs - 1};",
        f"mad.lo.u32 p, first, {size}, {base}; mad.lo.u32 p, lane, 4, p; mad.lo.u32 p, own, {128 * outs}, p;",
    ]
    for out in range(outs):
        code.append(f"ld.shared.f32 ${out}, [p+{128 * out}];")
        code += [f"ld.shared.f32 v, [p+{128 * out + size * w}]; add.f32 ${out}, ${out}, v;" for w in range(1, warps)]
    code.append("bar.sync 0; }")
    return " ".join(code)


@triton.constexpr_function
def _reduce_constraints(warps: int, values: int) -> str:
    return ",".join(["=&f"] * max(1, values // warps) + ["f"] * values + ["r", "r"])


@triton.jit
def _sum_warps(sums, group: tl.constexpr, thread, scratch, WARPS: tl.constexpr, VALUES: tl.constexpr):
    values = ()
    for i in tl.static_range(VALUES):
        values = values + (sums[VALUES * group + i],)
    values = values + (thread, scratch)
    code: tl.constexpr = _reduce(WARPS, VALUES)
    constraints: tl.constexpr = _reduce_constraints(WARPS, VALUES)
    if WARPS < VALUES:
        return tl.inline_asm_elementwise(code, constraints, values, (tl.float32, tl.float32), False, 1)
    else:
        return (tl.inline_asm_elementwise(code, constraints, values, tl.float32, False, 1),)


@triton.jit
def store_band(
    sums,
    thread,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    GROUPS: tl.constexpr,
    WARPS: tl.constexpr,
    HALVES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Add up over the WARPS warps of the program, add the bias, round, add the residual [M, N], and store. HALVES:
    programs that share a band."""
    lane = thread % 32
    warp = thread // 32
    VALUES: tl.constexpr = 8 // HALVES
    SHARE: tl.constexpr = 2 if WARPS < VALUES else 1
    scratch = declared_memory(thread, 128 * VALUES * WARPS)
    for group in tl.static_range(GROUPS):
        share = _sum_warps(sums, group, thread, scratch, WARPS, VALUES)
        for i in tl.static_range(SHARE):
            index = warp % (VALUES // SHARE) * SHARE + i
            column = group * 8 + 2 * (lane % 4) + index % 2
            row = tl.program_id(0) * (32 // HALVES) + index // 2 * 8 + lane // 4
            keep = (column < M) & (row < N) & (warp < VALUES)
            y = share[i]
            if HAS_BIAS:
                y += tl.load(bias_ptr + row, mask=keep, other=0.0).to(tl.float32)
            at = column.to(tl.int64) * N + row
            if HAS_RESIDUAL:  # after the rounding that torch would do before the addition
                y = y.to(out_ptr.dtype.element_ty).to(tl.float32)
                y += tl.load(residual_ptr + at, mask=keep, other=0.0).to(tl.float32)
            tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=keep)


def _sum_rows(warps: int) -> str:
    """PTX: $0 = the sum over `warps` warps of row `lane`; $1: a row's value, $2: that row, $3: the thread."""
    add = " ".join(f"ld.shared.f32 v, [at+{128 * w}]; add.f32 $0, $0, v;" for w in range(1, warps))
    return (
        f"{{ .shared .align 16 .b8 rows[{128 * warps}]; .reg .u32 at, base; .reg .f32 v; mov.u32 base, rows;"
        "shr.u32 at, $3, 5; mad.lo.u32 at, at, 128, base; mad.lo.u32 at, $2, 4, at; st.shared.f32 [at], $1;"
        "bar.sync 0; and.b32 at, $3, 31; mad.lo.u32 at, at, 4, base; ld.shared.f32 $0, [at];"
        f"{add} }}"
    )


_SUM_ROWS_4, _SUM_ROWS_8 = (tl.constexpr(_sum_rows(warps)) for warps in (4, 8))


@triton.jit
def sum_band(value, row, thread, WARPS: tl.constexpr):
    """The sum over the program's warps of row `lane` of a band, each thread of a warp giving the value of one row."""
    CODE: tl.constexpr = _SUM_ROWS_4 if WARPS == 4 else _SUM_ROWS_8
    return tl.inline_asm_elementwise(CODE, "=&f,f,r,r", [value, row, thread], tl.float32, False, 1)
