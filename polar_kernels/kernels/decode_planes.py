"""Codes to 14 bits in registers, as two planes of int8: the A fragments of the integer tensor-core instructions twice.

As `decode_int8` does it, whose tricks with signs and with magnitudes from 8 on work for both planes, since neither
byte of a level has its top bit set. They share the masks of signs and all that is done to a word itself. Of what runs
at half the rate, permutes and logic, that is 15 instructions for eight weights, of width 4 11.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def decode_planes_code(step: int, width: int) -> str:
    """PTX: eight weights of the word $4 and, of width 5, the sign word $5, to two registers of the high bytes $0, $1
    and two of the low ones $2, $3.

    Table: $6..$9 the high bytes of the levels, $10..$13 the low ones; step: which of the block's four times 32 columns.
    """

    def nibbles(high: str, low: str, selector: str, top_bits: int) -> str:
        return (
            f"prmt.b32 s, up, $4, {top_bits};"
            f"prmt.b32 a, $6, $7, {selector}; xor.b32 {high}, a, s;"
            f"prmt.b32 a, $10, $11, {selector}; xor.b32 {low}, a, s;"
        )

    def four(high: str, low: str, selector: str, other: str, group: int) -> str:
        return (
            f"shl.b32 s, $5, {group}; prmt.b32 s, s, s, 0xBA98;"
            f"prmt.b32 a, $6, $7, {selector}; prmt.b32 b, $8, $9, {other}; lop3.b32 {high}, a, b, s, 0x56;"
            f"prmt.b32 a, $10, $11, {selector}; prmt.b32 b, $12, $13, {other}; lop3.b32 {low}, a, b, s, 0x56;"
        )

    if width == 4:
        return (
            "{ .reg .b32 own, up, a, s; and.b32 own, $4, 0x77777777; shl.b32 up, $4, 4;"
            + nibbles("$0", "$2", "own", 0xD9C8)
            + " dp2a.lo.u32.u32 own, own, 0x100, 0;"
            + nibbles("$1", "$3", "own", 0xFBEA)
            + " }"
        )
    return (
        "{ .reg .b32 own, up, a, b, s; xor.b32 up, $4, 0x88888888;"
        + four("$0", "$2", "$4", "up", 2 * step)
        + " dp2a.lo.u32.u32 own, $4, 0x100, 0; dp2a.lo.u32.u32 up, up, 0x100, 0;"
        + four("$1", "$3", "own", "up", 2 * step + 1)
        + " }"
    )


@triton.jit
def _decode_eight(step: tl.constexpr, word, signs, levels, WIDTH: tl.constexpr):
    return tl.inline_asm_elementwise(
        decode_planes_code(step, WIDTH),
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r",
        [word, signs, levels[0], levels[1], levels[2], levels[3], levels[4], levels[5], levels[6], levels[7]],
        (tl.int32, tl.int32, tl.int32, tl.int32),
        True,
        1,
    )


@triton.jit
def decode_step(step: tl.constexpr, word0, word1, signs0, signs1, levels, WIDTH: tl.constexpr):
    """The A fragments of 16 rows by 32 columns: four registers of the high plane, and four of the low one.

    levels: the eight words of their bytes.
    """
    h0, h2, l0, l2 = _decode_eight(step, word0, signs0, levels, WIDTH)
    h1, h3, l1, l3 = _decode_eight(step, word1, signs1, levels, WIDTH)
    return (h0, h1, h2, h3), (l0, l1, l2, l3)
