"""Codes to fp16 or bf16 in registers, two at a time, looked up in shared memory.

A byte of a tile's word is two nibbles, the index into a table of 256 words of two levels each. Every lane has its own
copy, in a bank of its own, so that no lane waits for another whatever they look up: 32 KB. The address takes one
instruction, the dot product of the word's bytes with 128 for one of them. Of what runs at half the rate that leaves
one operation of logic for two weights, by which signs are put in; of width 4 none, since its nibbles have the sign.
"""

import triton
import triton.language as tl

from polar_kernels.kernels.ptx import load_cached
from polar_kernels.kernels.shared_memory import declared_memory
from polar_kernels.tiles import BF16_PAIRS, FP16_PAIRS, PAIRS

_FP16_PAIRS, _BF16_PAIRS, _PAIRS = tl.constexpr(FP16_PAIRS), tl.constexpr(BF16_PAIRS), tl.constexpr(PAIRS)
_COPIES = 128  # bytes of all lanes' copies of a pair
PAIRS_BYTES = PAIRS * _COPIES
_PAIRS_BYTES = tl.constexpr(PAIRS_BYTES)
# Four pairs $1..$4, eight of the copies of each, from the address $5 on.
_STORE = tl.constexpr(
    "{ "
    + "".join(f"st.shared.v4.b32 [$5+{_COPIES * (i - 1)}], {{${i}, ${i}, ${i}, ${i}}}; " for i in range(1, 5))
    + "mov.b32 $0, $5; }"
)
_MEET = tl.constexpr("bar.sync 0; mov.b32 $0, $1;")
# The signs of weights 0 and 1 of each group in the upper bytes of both halves, of 2 and 3 in the lower ones.
_SPREAD_SIGNS = tl.constexpr("prmt.b32 $0, $1, $1, 0x1302;")


@triton.jit
def open_pairs(table_ptr, thread, DTYPE: tl.constexpr, THREADS: tl.constexpr):
    """The address of a thread's own copy of the table of pairs in DTYPE, in shared memory that assembly declares. All
    threads of the program together."""
    memory = declared_memory(thread, _PAIRS_BYTES)
    FIRST: tl.constexpr = _BF16_PAIRS if tl.bfloat16 == DTYPE else _FP16_PAIRS
    for start in tl.static_range(0, _PAIRS, THREADS // 2):
        first = start + thread // 8 * 4
        pairs = load_cached(table_ptr + FIRST + first)
        place = memory + first * 128 + thread % 8 * 16
        tl.inline_asm_elementwise(_STORE, "=r,r,r,r,r,r", pairs + (place,), tl.int32, False, 1)
    return tl.inline_asm_elementwise(_MEET, "=r,r", [memory + thread % 32 * 4], tl.int32, False, 1)


@triton.jit
def spread_signs(signs):
    """A word of signs as `decode_eight_pairs` takes it."""
    return tl.inline_asm_elementwise(_SPREAD_SIGNS, "=r,r", [signs], tl.int32, True, 1)


@triton.constexpr_function
def decode_pairs_code(step: int, width: int) -> str:
    """PTX: eight weights of the word $4 and, of width 5, the spread signs $5 to four registers of two values.

    $6: the address of the lane's table; step: which of the block's four times 32 columns.
    """
    code = ["{ .reg .b32 at, s;"]
    for i in range(4):
        code.append(f"dp4a.u32.u32 at, $4, {_COPIES << (8 * i)}, $6; ld.shared.b32 ${i}, [at];")
        if width == 5:
            code.append(f"shl.b32 s, $5, {2 * step + i // 2 + i % 2 * 8}; lop3.b32 ${i}, ${i}, s, 0x80008000, 0x78;")
    return " ".join(code) + " }"


@triton.jit
def decode_eight_pairs(step: tl.constexpr, word, signs, pairs, WIDTH: tl.constexpr):
    """Eight columns of a row, two a register; signs: spread; pairs: see `open_pairs`."""
    return tl.inline_asm_elementwise(
        decode_pairs_code(step, WIDTH),
        "=&r,=&r,=&r,=&r,r,r,r",
        [word, signs, pairs],
        (tl.int32, tl.int32, tl.int32, tl.int32),
        True,
        1,
    )
