"""How the products of few rows of x are cut into programs, one for each band of 32 rows of the weight.

Few bands want many warps each, to fill the GPU; many want few, whose sums are cheaper. A thread has registers for as
many programs on a multiprocessor as fill it in whole waves: with room for more, those that come early would fill some
multiprocessors and leave others idle. And ptxas asks for x's words only as early as it has registers for them.
Measured on an H100 and an H200.
"""

from typing import NamedTuple

_MULTIPROCESSORS = 132  # of those GPUs
_FEW = 2 * _MULTIPROCESSORS  # bands


class Program(NamedTuple):
    """Warps that share a band, and how many registers a thread has at most."""

    warps: int
    registers: int


def int8_program(bands: int, groups: int) -> Program:
    """groups: of 8 rows of x."""
    if groups >= 4:
        registers = 255 if groups > 4 or bands <= _FEW else 168
        return Program(4 if bands * groups >= 1024 else 8, registers)
    if bands <= 128:
        return Program(16, 128)
    if bands <= _FEW:
        return Program(8, 128)
    if groups == 1:
        return Program(8, 80)
    return Program(4, 168 if bands < 4096 else 128)


def exact_program(bands: int, groups: int) -> Program:
    """Likewise, for 1 or 2 groups; waits for look-ups in shared memory want more warps."""
    if groups == 1:
        if bands <= _FEW:
            return Program(16 if bands <= 128 else 8, 96)
        return Program(8, 80) if bands < 4096 else Program(4, 96)
    if bands <= 128:
        return Program(16, 128)
    return Program(4 if _FEW < bands <= 2 * _FEW or bands >= 4096 else 8, 128)
