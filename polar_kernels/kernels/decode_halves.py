"""Codes to fp16 in registers. Levels are looked up by byte permutes, their low and high bytes apart.

A permute looks up four magnitudes at once; of 16 magnitudes a second one looks up 8..15, and a mask picks between them.
Signs go to the high bytes' top bits.
"""

import triton
import triton.language as tl

from polar_kernels.kernels.ptx import hidden_zero, load_cached
from polar_kernels.tiles import FP16_LEVELS

_LEVELS = tl.constexpr(FP16_LEVELS)


@triton.jit
def load_levels(table_ptr, lane):
    """The low and the high bytes of the levels, four words each, of a `level_table`."""
    levels_ptr = table_ptr + _LEVELS + hidden_zero(lane)
    return load_cached(levels_ptr), load_cached(levels_ptr + 4)


@triton.constexpr_function
def decode_halves_code(step: int, width: int) -> str:
    """PTX: eight weights of the word $4 and, of width 5, the sign word $5 to four registers of two values.

    Table: $6..$9 the low bytes of the levels, $10..$13 the high ones; step: which of the block's four times 32 columns.
    """

    def four(first: str, second: str, selector: str, top_bits: int, group: int) -> str:
        code = [
            f"prmt.b32 m, up, $4, {top_bits};",
            f"prmt.b32 lo, $6, $7, {selector}; prmt.b32 hi, $10, $11, {selector};",
        ]
        if width == 5:
            code.append(
                f"prmt.b32 x, $8, $9, {selector}; lop3.b32 lo, x, lo, m, 0xE4;"
                f"prmt.b32 x, $12, $13, {selector}; lop3.b32 hi, x, hi, m, 0xE4; shl.b32 m, $5, {group};"
            )
        code.append(
            f"lop3.b32 hi, hi, m, 0x80808080, 0xF8;prmt.b32 {first}, lo, hi, 0x5140; prmt.b32 {second}, lo, hi, 0x7362;"
        )
        return " ".join(code)

    return (
        "{ .reg .b32 a, b, up, lo, hi, m, x; and.b32 a, $4, 0x77777777; shl.b32 up, $4, 4;"
        + four("$0", "$1", "a", 0xD9C8, 2 * step)
        + " dp2a.lo.u32.u32 b, a, 0x100, 0;"  # its upper half; a shift would wait for the permutes
        + four("$2", "$3", "b", 0xFBEA, 2 * step + 1)
        + " }"
    )


@triton.jit
def decode_eight_halves(step: tl.constexpr, word, signs, low, high, WIDTH: tl.constexpr):
    """Eight columns of a row, two a register; step: which of the block's four times 32 columns."""
    return tl.inline_asm_elementwise(
        decode_halves_code(step, WIDTH),
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r",
        [word, signs, low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]],
        (tl.int32, tl.int32, tl.int32, tl.int32),
        True,
        1,
    )
