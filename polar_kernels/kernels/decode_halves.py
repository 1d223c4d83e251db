"""Codes to fp16 or bf16 in registers. Levels are looked up by byte permutes, their low and high bytes apart.

A permute looks up four magnitudes 0..7 and another four 8..15, a mask picks between; signs go to the bytes' top bits.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def _decode_code(step: int) -> str:
    """PTX: eight weights of the magnitude word $4 and the sign word $5 to four registers of two values.

    Table: $6..$9 the low bytes of the 16 levels, $10..$13 the high ones; step: which 32 columns.
    """

    def four(first: str, second: str, selector: str, mask: int, shift: int) -> str:
        sign = f"shl.b32 s, $5, {shift};" if shift else "mov.b32 s, $5;"
        return (
            f"prmt.b32 m, up, $4, {mask}; {sign}"
            f"prmt.b32 x, $6, $7, {selector}; prmt.b32 y, $8, $9, {selector}; lop3.b32 lo, y, x, m, 0xE4;"
            f"prmt.b32 x, $10, $11, {selector}; prmt.b32 y, $12, $13, {selector}; lop3.b32 hi, y, x, m, 0xE4;"
            f"lop3.b32 hi, hi, s, 0x80808080, 0xF8;"
            f"prmt.b32 {first}, lo, hi, 0x5140; prmt.b32 {second}, lo, hi, 0x7362;"
        )

    return (
        "{ .reg .b32 a, b, up, lo, hi, m, s, x, y; and.b32 a, $4, 0x77777777; shl.b32 up, $4, 4;"
        + four("$0", "$1", "a", 0xD9C8, 2 * step)
        + " shr.u32 b, a, 16;"
        + four("$2", "$3", "b", 0xFBEA, 2 * step + 1)
        + " }"
    )


@triton.jit
def decode_eight_halves(step: tl.constexpr, word, signs, low, high):
    """Eight columns of a row, two a register; step: which of the block's four times 32 columns."""
    return tl.inline_asm_elementwise(
        _decode_code(step),
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r",
        [word, signs, low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]],
        (tl.int32, tl.int32, tl.int32, tl.int32),
        True,
        1,
    )
