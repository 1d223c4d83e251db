"""Shared memory for kernels that are written as CUDA would be: Triton has no words for it."""

import triton
import triton.language as tl

_ASSEMBLY_BYTES = 48 << 10  # what assembly may declare at most


@triton.constexpr_function
def declared_bytes(size: int) -> int:
    """Of pieces of so many bytes, those that assembly declares: the first piece, unless it is too large."""
    return size if size <= _ASSEMBLY_BYTES else 0


@triton.constexpr_function
def launched_bytes(pieces: int, size: int) -> int:
    """Those that Triton launches the kernel with for so many pieces, a power of two."""
    left = pieces * size - declared_bytes(size)
    return power_of_two(left) if left else 0


@triton.constexpr_function
def power_of_two(size: int) -> int:
    """At least `size`, which is positive."""
    return 1 << (size - 1).bit_length()


@triton.constexpr_function
def _declare_code(size: int) -> str:
    return f"{{ .shared .align 1024 .b8 own[{size}]; mov.u32 $0, own; }} // $1"


@triton.jit
def declared_memory(thread, SIZE: tl.constexpr):
    """The address of SIZE bytes that assembly declares: 48 KB at most in all of a kernel."""
    code: tl.constexpr = _declare_code(SIZE)
    return tl.inline_asm_elementwise(code, "=r,r", [thread], tl.int32, True, 1)


@triton.jit
def launched_memory(pointer, never, thread, SIZE: tl.constexpr):
    """The address of SIZE bytes, a power of two, that Triton launches the kernel with, beside what assembly declares.

    never: false, which the compiler must not know. A gather over several warps goes through as much as its source has,
    from `global_smem` on.
    """
    if never:
        source = tl.full((SIZE // 4,), 0, tl.int32) + tl.load(pointer)
        tl.store(pointer + thread, tl.gather(source, thread, 0))
    return tl.inline_asm_elementwise("mov.u32 $0, global_smem; // $1", "=r,r", [thread], tl.int32, True, 1)


@triton.constexpr_function
def all_launched_bytes(pieces: int, size: int) -> int:
    """What `all_launched` takes: more than 48 KB, since Triton asks for more in all only if it launches with more."""
    return max(power_of_two(pieces * size), 64 << 10)


@triton.jit
def all_launched(pointer, never, thread, PIECES: tl.constexpr, SIZE: tl.constexpr):
    """As `shared_memory`, beside what assembly has to declare for something else."""
    first = launched_memory(pointer, never, thread, all_launched_bytes(PIECES, SIZE))
    return first, first + (SIZE if declared_bytes(SIZE) > 0 else 0)


@triton.jit
def shared_memory(pointer, never, thread, PIECES: tl.constexpr, SIZE: tl.constexpr):
    """So many pieces of SIZE bytes, a multiple of 1024, of which `shared_piece` gives the addresses. never: see
    `launched_memory`."""
    declared = thread * 0
    if declared_bytes(SIZE) > 0:
        declared = declared_memory(thread, SIZE)
    launched = thread * 0
    if launched_bytes(PIECES, SIZE) > 0:
        launched = launched_memory(pointer, never, thread, launched_bytes(PIECES, SIZE))
    return declared, launched


@triton.jit
def shared_piece(memory, number, PIECES: tl.constexpr, SIZE: tl.constexpr):
    """The address of a piece."""
    if declared_bytes(SIZE) == 0:
        return memory[1] + number * SIZE
    elif PIECES == 1:
        return memory[0]
    else:
        return tl.where(number == 0, memory[0], memory[1] + (number - 1) * SIZE)
