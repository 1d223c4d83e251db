"""What every kernel does to a 128-block: read its codes from the byte stream, look up levels, transform."""

import torch
import triton
import triton.language as tl

from polar_kernels.hadamard import BLOCK_SIZE

BLOCK = tl.constexpr(BLOCK_SIZE)
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def load_codes(packed_ptr, rows, row_mask, block, row_bytes, BITS: tl.constexpr):
    """Codes [rows, 128] int32 of one block column; rows int64. Masked rows read as code 0.

    A code lies in one byte or straddles two; the second is read only where it does, so no read leaves the row.
    """
    bit = (block * BLOCK + tl.arange(0, BLOCK)) * BITS
    pointers = packed_ptr + rows[:, None] * row_bytes + (bit // 8)[None, :]
    word = tl.load(pointers, mask=row_mask[:, None], other=0).to(tl.int32)
    if 8 % BITS != 0:
        straddles = (bit % 8 + BITS > 8)[None, :] & row_mask[:, None]
        word |= tl.load(pointers + 1, mask=straddles, other=0).to(tl.int32) << 8
    return (word >> (bit % 8)[None, :]) & ((1 << BITS) - 1)


@triton.jit
def butterflies(x, ROWS: tl.constexpr):
    """x [ROWS, 128] fp32 times sqrt(128) * H.

    Each pass sends the pair (2i, 2i + 1) to its sum at i and its difference at i + 64, which turns one bit of the
    index and moves it to the top; after seven passes every bit has been turned and is back in its place.
    """
    for _ in tl.static_range(7):
        even, odd = tl.split(tl.reshape(x, (ROWS, BLOCK // 2, 2)))
        x = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), (ROWS, BLOCK))
    return x


def storable(dtype: torch.dtype) -> torch.dtype:
    """The dtype kernels may compute and store in for `dtype`.

    Triton's CPU interpreter multiplies bf16 by its raw bits and truncates when storing it, so bf16 becomes fp32
    there and the caller rounds; on a GPU this is `dtype` itself.
    """
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype
