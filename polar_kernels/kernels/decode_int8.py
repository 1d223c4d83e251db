"""Codes to int8 in registers: the A fragments of the integer tensor-core instructions, straight from a tile's words.

A byte permute looks up four magnitudes at once. Of 16 magnitudes each of two permutes looks up eight: an index whose
top bit is set asks a permute for the sign of a byte, and no level has its top bit set, so that what the other permute
is to look up becomes zero. Negation is a bitwise complement, since levels are half-integers; a permute that spreads
signs over bytes makes the mask for it. Permutes and logic, which run at half the rate of additions, are what bounds
these kernels. So where there is a choice the work goes to where the multiplications are: a shift to the left, and a
word's upper half, which is a dot product with (0, 1).
"""

import triton
import triton.language as tl


@triton.constexpr_function
def decode_int8_code(step: int, width: int, spread: bool) -> str:
    """PTX: eight weights of the word $2 and, of width 5, the sign word $3, by the table $4..$7, to two registers.

    step: which of the block's four times 32 columns; spread: one more operation goes to where the multiplications are.
    """
    upper_half = "dp2a.lo.u32.u32 {0}, {1}, 0x100, 0;"

    def nibbles(out: str, selector: str, top_bits: int) -> str:
        return f"prmt.b32 lo, $4, $5, {selector}; prmt.b32 m, up, $2, {top_bits}; xor.b32 {out}, lo, m;"

    def four(out: str, selector: str, other: str, group: int) -> str:
        return (
            f"prmt.b32 lo, $4, $5, {selector}; prmt.b32 hi, $6, $7, {other}; shl.b32 s, $3, {group};"
            f"prmt.b32 s, s, s, 0xBA98; lop3.b32 {out}, lo, hi, s, 0x56;"
        )

    if width == 4:
        return (
            "{ .reg .b32 a, b, up, lo, m; and.b32 a, $2, 0x77777777; shl.b32 up, $2, 4;"
            + nibbles("$0", "a", 0xD9C8)
            + " shr.u32 b, a, 16;"
            + nibbles("$1", "b", 0xFBEA)
            + " }"
        )
    return (
        "{ .reg .b32 b, up, lo, hi, s; xor.b32 up, $2, 0x88888888;"
        + four("$0", "$2", "up", 2 * step)
        + upper_half.format("b", "$2")
        + (upper_half.format("up", "up") if spread else "xor.b32 up, b, 0x8888;")
        + four("$1", "b", "up", 2 * step + 1)
        + " }"
    )


@triton.jit
def _decode_eight(step: tl.constexpr, word, signs, table, WIDTH: tl.constexpr, SPREAD: tl.constexpr):
    return tl.inline_asm_elementwise(
        decode_int8_code(step, WIDTH, SPREAD),
        "=&r,=&r,r,r,r,r,r,r",
        [word, signs, table[0], table[1], table[2], table[3]],
        (tl.int32, tl.int32),
        True,
        1,
    )


@triton.jit
def decode_half_tile(w0, w1, signs0, signs1, upper, lower, WIDTH: tl.constexpr, SPREAD: tl.constexpr = False):
    """The A fragments of 16 rows by 128 columns: four registers for each of four steps of 32 columns.

    upper: the table of a lane's row among the first 8; lower: among the others. SPREAD: faster where products are many
    for each weight.
    """
    a0, a2 = _decode_eight(0, w0[0], signs0, upper, WIDTH, SPREAD)
    a1, a3 = _decode_eight(0, w0[1], signs1, lower, WIDTH, SPREAD)
    b0, b2 = _decode_eight(1, w0[2], signs0, upper, WIDTH, SPREAD)
    b1, b3 = _decode_eight(1, w0[3], signs1, lower, WIDTH, SPREAD)
    c0, c2 = _decode_eight(2, w1[0], signs0, upper, WIDTH, SPREAD)
    c1, c3 = _decode_eight(2, w1[1], signs1, lower, WIDTH, SPREAD)
    d0, d2 = _decode_eight(3, w1[2], signs0, upper, WIDTH, SPREAD)
    d1, d3 = _decode_eight(3, w1[3], signs1, lower, WIDTH, SPREAD)
    return a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3
