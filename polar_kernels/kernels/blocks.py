"""What every kernel does to a 128-block: read its codes from the byte stream, look up levels, transform."""

import torch
import triton
import triton.language as tl

from polar_kernels.hadamard import BLOCK_SIZE

BLOCK = tl.constexpr(BLOCK_SIZE)
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def load_levels(packed_ptr, centroids_ptr, row, known, block, row_bytes, BITS: tl.constexpr, ROWS: tl.constexpr):
    """Levels [ROWS, 128] fp32 of one block column.

    row, known: int64 and bool [ROWS * 128], the row of each element and whether it is there; others read as code 0.
    A code lies in one byte or straddles two; the second is read only where it does, so no read leaves the row.
    Elements are numbered through in one dimension because Triton, which cannot see that neighbouring codes lie side by
    side, then still gives them to neighbouring threads; of two dimensions it may pick the rows, and read each byte of
    an instruction from another one.
    """
    bit = (block * BLOCK + tl.arange(0, ROWS * BLOCK) % BLOCK) * BITS
    pointers = packed_ptr + row * row_bytes + bit // 8
    word = tl.load(pointers, mask=known, other=0).to(tl.int32)
    if 8 % BITS != 0:
        word |= tl.load(pointers + 1, mask=known & (bit % 8 + BITS > 8), other=0).to(tl.int32) << 8
    codes = (word >> (bit % 8)) & ((1 << BITS) - 1)
    return tl.reshape(tl.load(centroids_ptr + codes), (ROWS, BLOCK))


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
