"""Where the words of activations lie that a warp multiplies by, eight rows at a time, on the tensor cores.

Of a block of a row, lane q of four wants the columns 32 s + 8 q + 4 r + i; of each (s, r) that is one word in int8, and
two in 16 bits: WORDS. In fragments, what a load of 16 bytes a lane takes lies side by side, [row / 8, block, load,
row % 8, q, 4 words], which is four lines of the cache. Were a lane's words together, it would take 8, or 16 in 16 bits:
that cost the products of few rows up to a tenth of their time. Where rows are gathered, those of experts, each is for
itself: [row, block, load, q, 4 words].
"""

import triton
import triton.language as tl

from polar_kernels.kernels.ptx import load_cached


@triton.jit
def word_place(row, block, blocks, lane, WORDS: tl.constexpr, GATHERED: tl.constexpr):
    """Where the words of columns 4 lane .. 4 lane + 3 go, of a block of a row; lane: 8 s + 2 q + r."""
    q = lane // 2 % 4
    word = (lane // 8 * 2 + lane % 2) * WORDS
    if GATHERED:
        return (row * blocks + block) * (32 * WORDS) + word // 4 * 16 + q * 4 + word % 4
    else:
        start = (row // 8 * blocks + block) * (256 * WORDS)
        return start + word // 4 * 128 + (row % 8 * 4 + q) * 4 + word % 4


@triton.jit
def load_gathered(x_ptr, row, blocks, block, q, WORDS: tl.constexpr):
    """A lane's words of one block of a row."""
    start = x_ptr + (row.to(tl.int64) * blocks + block) * (32 * WORDS) + q * 4
    words = ()
    for i in tl.static_range(2 * WORDS):
        words = words + (load_cached(start + 16 * i),)
    return words


@triton.jit
def load_fragment(x_ptr, group, blocks, block, lane, WORDS: tl.constexpr):
    """A lane's words of one block of eight rows: 2 WORDS loads of four words."""
    start = x_ptr + (group * blocks + block).to(tl.int64) * (256 * WORDS) + lane * 4
    words = ()
    for i in tl.static_range(2 * WORDS):
        words = words + (load_cached(start + 128 * i),)
    return words
