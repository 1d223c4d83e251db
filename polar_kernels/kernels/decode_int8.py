"""Codes to int8 in registers: the A fragments of the integer tensor-core instructions, straight from a tile's words.

A byte permute looks up four magnitudes 0..7 and four 8..15 at once, a second one makes the mask that picks between;
negation is a bitwise complement, since levels are half-integers.
"""

import triton
import triton.language as tl


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
def decode_half_tile(w0, w1, signs0, signs1, table):
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
