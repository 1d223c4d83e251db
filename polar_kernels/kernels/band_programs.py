"""How the products of few rows of x are cut into programs: one for each band of 32 rows of the weight, or two.

Few bands want many warps each, to fill the GPU; many want few, whose sums are cheaper. A thread has registers for as
many programs on a multiprocessor as fill it in whole waves: with room for more, those that come early would fill some
multiprocessors and leave others idle. And ptxas asks for x's words only as early as it has registers for them.
Measured on an H100 and an H200.
"""

from bisect import bisect_left
from typing import NamedTuple


class Program(NamedTuple):
    """Warps of a program, how many registers a thread has at most, and programs that share a band, 1 or 2."""

    warps: int
    registers: int
    halves: int = 1


_Programs = dict[int, tuple[tuple[int, int, int], ...]]
# Most bands of which 132 multiprocessors have one, two or three halves each; two or four whole ones; and a head's.
_BANDS = (66, 132, 198, 264, 528, 4095)
# A Program's fields for up to so many bands each, and for more; by how many groups of 8 rows of x there are.
_INT8: _Programs = {
    1: ((16, 128, 2), (16, 128, 1), (8, 80, 2), (8, 128, 1), (8, 80, 1), (8, 80, 1), (8, 80, 1)),
    2: ((16, 128, 2), (16, 128, 1), (8, 80, 2), (8, 128, 1), (4, 168, 1), (4, 168, 1), (4, 128, 1)),
    4: ((8, 255, 2), (8, 255, 1), (4, 168, 2), (4, 255, 1), (4, 168, 1), (4, 168, 1), (4, 168, 1)),
    8: ((8, 255, 2), (4, 255, 2), (4, 168, 2), (4, 255, 1), (4, 255, 1), (4, 255, 1), (4, 255, 1)),
}
# Waits for look-ups in shared memory want more warps.
_EXACT: _Programs = {
    1: ((16, 96, 2), (16, 96, 1), (8, 80, 2), (8, 96, 1), (8, 80, 1), (8, 80, 1), (4, 96, 1)),
    2: ((16, 96, 2), (16, 128, 1), (8, 80, 2), (8, 128, 1), (4, 128, 1), (8, 128, 1), (4, 128, 1)),
}
# Whole bands of so few blocks of K leave most of 16 warps one or two tiles: then two halves of 8 warps.
_FEW_BLOCKS, _OF_FEW_BLOCKS = 32, Program(8, 128, 2)


def int8_program(bands: int, blocks: int, groups: int) -> Program:
    """blocks: of K; groups: of 8 rows of x, 1, 2, 4 or 8."""
    return _choose(_INT8, bands, blocks, groups)


def exact_program(bands: int, blocks: int, groups: int) -> Program:
    """Likewise, for 1 or 2 groups."""
    return _choose(_EXACT, bands, blocks, groups)


def _choose(programs: _Programs, bands: int, blocks: int, groups: int) -> Program:
    program = Program(*programs[groups][bisect_left(_BANDS, bands)])
    return _OF_FEW_BLOCKS if program.warps == 16 and program.halves == 1 and blocks <= _FEW_BLOCKS else program
