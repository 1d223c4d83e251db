"""PTX that Triton has no words for, as functions on one value a thread.

Kernels built on these are written as CUDA would be: every tensor has as many elements as the program has threads, so
that each thread holds one, and a value is a register. `inline_asm_elementwise` then runs an instruction per thread,
warp-wide ones (mma, shfl) included, as long as all threads of a warp reach them together.
Not for Triton's interpreter, which runs no assembly.
"""

import triton
import triton.language as tl

_LOAD_STREAM = tl.constexpr("ld.global.L1::no_allocate.L2::128B.v4.b32 {$0, $1, $2, $3}, [$4];")
_LOAD_STREAM_TWO = tl.constexpr("ld.global.L1::no_allocate.L2::128B.v2.b32 {$0, $1}, [$2];")
_LOAD_CACHED = tl.constexpr("ld.global.v4.b32 {$0, $1, $2, $3}, [$4];")
_MMA_S8 = tl.constexpr(
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
)
_WAIT = tl.constexpr("griddepcontrol.wait; mov.b32 $0, 0; // $1")
_ADD_LANES = tl.constexpr("{ .reg .f32 t; shfl.sync.bfly.b32 t, $1, $2, 0x1f, 0xffffffff; add.f32 $0, $1, t; }")
_MAX_LANES = tl.constexpr("{ .reg .f32 t; shfl.sync.bfly.b32 t, $1, $2, 0x1f, 0xffffffff; max.NaN.f32 $0, $1, t; }")
_MMA_HALVES = {
    dtype: tl.constexpr(
        f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    for dtype in ("f16", "bf16")
}
_MMA_F16, _MMA_BF16 = _MMA_HALVES["f16"], _MMA_HALVES["bf16"]
_PACK_BF16 = tl.constexpr("cvt.rn.bf16x2.f32 $0, $1, $2;")
_PACK_F16 = tl.constexpr("cvt.rn.f16x2.f32 $0, $1, $2;")
_STORE = tl.constexpr(
    "{ .reg .pred p; setp.ne.u32 p, $6, 0; mov.b32 $0, 0; @p st.global.v4.b32 [$1], {$2, $3, $4, $5}; }"
)
_STORE_TWO = tl.constexpr("{ .reg .pred p; setp.ne.u32 p, $4, 0; mov.b32 $0, 0; @p st.global.v2.b32 [$1], {$2, $3}; }")
_HIDDEN_ZERO = tl.constexpr("{ .reg .b32 t; shfl.sync.bfly.b32 t, $1, 0, 0x1f, 0xffffffff; shr.u32 $0, t, 5; }")
_FIRST_LANE = tl.constexpr("shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;")
_SWAP_LANES = tl.constexpr("shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;")


@triton.jit
def load_stream(pointer):
    """Four words that are read once: past L1. No `.nc`: ptxas moves such a load behind a wait that it stands before."""
    return tl.inline_asm_elementwise(
        _LOAD_STREAM, "=r,=r,=r,=r,l", [pointer.to(tl.int64)], (tl.int32, tl.int32, tl.int32, tl.int32), True, 1
    )


@triton.jit
def load_stream_two(pointer):
    """Two words that are read once."""
    return tl.inline_asm_elementwise(_LOAD_STREAM_TWO, "=r,=r,l", [pointer.to(tl.int64)], (tl.int32, tl.int32), True, 1)


@triton.jit
def load_cached(pointer):
    """Four words, kept in L1, read where it stands."""
    return tl.inline_asm_elementwise(
        _LOAD_CACHED, "=r,=r,=r,=r,l", [pointer.to(tl.int64)], (tl.int32, tl.int32, tl.int32, tl.int32), False, 1
    )


@triton.constexpr_function
def _load_shared_code(words: int, at: int) -> str:
    outs = ", ".join(f"${i}" for i in range(words))
    return f"ld.shared.v{words}.b32 {{{outs}}}, [${words}+{at}];"


@triton.jit
def load_shared(address, AT: tl.constexpr = 0):
    """Four words of shared memory, AT bytes from an address on."""
    code: tl.constexpr = _load_shared_code(4, AT)
    return tl.inline_asm_elementwise(
        code, "=r,=r,=r,=r,r", [address], (tl.int32, tl.int32, tl.int32, tl.int32), False, 1
    )


@triton.jit
def load_shared_two(address, AT: tl.constexpr = 0):
    """Two words, likewise."""
    code: tl.constexpr = _load_shared_code(2, AT)
    return tl.inline_asm_elementwise(code, "=r,=r,r", [address], (tl.int32, tl.int32), False, 1)


@triton.jit
def mma_s8(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """C [16, 8] s32 += A [16, 32] s8 x B [32, 8] s8, a warp's fragments."""
    return tl.inline_asm_elementwise(
        _MMA_S8,
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
        [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
        (tl.int32, tl.int32, tl.int32, tl.int32),
        True,
        1,
    )


@triton.jit
def wait_for_previous_kernel(thread):
    """Zero, once the kernel before has written its results. What is added to it cannot be read earlier."""
    return tl.inline_asm_elementwise(_WAIT, "=r,r", [thread], tl.int32, False, 1)


@triton.jit
def hidden_zero(lane):
    """Zero, of which ptxas cannot tell that all threads have the same: what they load from one address it would keep in
    uniform registers, and copy before each use. lane: 0 to 31, of each thread its own."""
    return tl.inline_asm_elementwise(_HIDDEN_ZERO, "=r,r", [lane], tl.int32, True, 1)


@triton.jit
def first_lane(x):
    """x of the warp's first lane, of which ptxas can tell that all lanes have the same."""
    return tl.inline_asm_elementwise(_FIRST_LANE, "=r,r", [x], tl.int32, True, 1)


@triton.jit
def swap_lanes(x, distance):
    """x of the lane whose number differs by the bit `distance`."""
    return tl.inline_asm_elementwise(_SWAP_LANES, "=f,f,r", [x, distance], tl.float32, True, 1)


@triton.jit
def sum_lanes(x, BITS: tl.constexpr):
    """The sum over each 2^BITS neighbouring lanes, in all of them."""
    for bit in tl.static_range(BITS):
        distance = tl.full(x.shape, 1 << bit, tl.int32)
        x = tl.inline_asm_elementwise(_ADD_LANES, "=f,f,r", [x, distance], tl.float32, True, 1)
    return x


@triton.jit
def max_lanes(x, BITS: tl.constexpr):
    """Likewise the largest, NaN where any lane holds one."""
    for bit in tl.static_range(BITS):
        distance = tl.full(x.shape, 1 << bit, tl.int32)
        x = tl.inline_asm_elementwise(_MAX_LANES, "=f,f,r", [x, distance], tl.float32, True, 1)
    return x


@triton.jit
def mma_halves(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, DTYPE: tl.constexpr):
    """C [16, 8] fp32 += A [16, 16] x B [16, 8] in fp16 or bf16, a warp's fragments."""
    return tl.inline_asm_elementwise(
        _MMA_BF16 if tl.bfloat16 == DTYPE else _MMA_F16,
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
        (tl.float32, tl.float32, tl.float32, tl.float32),
        True,
        1,
    )


@triton.jit
def pack_halves(low, high, DTYPE: tl.constexpr):
    """Two fp32 rounded to one word of bf16 or fp16."""
    if tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(_PACK_BF16, "=r,f,f", [high, low], tl.int32, True, 1)
    else:
        return tl.inline_asm_elementwise(_PACK_F16, "=r,f,f", [high, low], tl.int32, True, 1)


@triton.jit
def unpack_halves(word, DTYPE: tl.constexpr):
    """The two values of a word of bf16 or fp16, as fp32."""
    if tl.bfloat16 == DTYPE:
        return as_float(word << 16), as_float(word & -65536)
    else:
        low = (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        high = ((word >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        return low, high


@triton.jit
def store_four(pointer, w0, w1, w2, w3, keep):
    """Four words, where `keep` is not 0. Returns nothing of use."""
    return tl.inline_asm_elementwise(
        _STORE, "=r,l,r,r,r,r,r", [pointer.to(tl.int64), w0, w1, w2, w3, keep], tl.int32, False, 1
    )


@triton.jit
def store_two(pointer, w0, w1, keep):
    """Two words, where `keep` is not 0. Returns nothing of use."""
    return tl.inline_asm_elementwise(_STORE_TWO, "=r,l,r,r,r", [pointer.to(tl.int64), w0, w1, keep], tl.int32, False, 1)


@triton.jit
def as_float(x):
    return x.to(tl.float32, bitcast=True)
