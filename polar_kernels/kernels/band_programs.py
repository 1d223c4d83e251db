"""How the products of few rows of x are cut into programs: one for each band of 32 rows of the weight, or two.

All read the weight once, at the memory's speed, so that what a cut costs is how full its waves are: the programs that
fit on all multiprocessors at a time, by the registers that they take. And they must not fit by more: programs that come
early would fill some multiprocessors and leave others idle, and ptxas asks for x's words only as early as it has
registers for them. More warps share fewer steps of K, but have more to add up.
"""

from functools import lru_cache
from typing import NamedTuple

import triton


class Program(NamedTuple):
    """Warps of a program, how many registers a thread has at most, and programs that share a band, 1 or 2."""

    warps: int
    registers: int
    halves: int = 1


_COMMON = (Program(16, 128, 2), Program(16, 128), Program(8, 128, 2), Program(8, 128), Program(8, 80, 2))
# By how many groups of 8 rows of x there are. Of two that are predicted to be as fast the first is taken.
_INT8 = {
    1: (*_COMMON, Program(8, 80), Program(4, 128), Program(4, 96)),
    2: (*_COMMON, Program(4, 168), Program(4, 128), Program(4, 96)),
    4: (Program(8, 255, 2), Program(8, 255), Program(4, 255), Program(4, 168, 2), Program(4, 168)),
    8: (Program(8, 255, 2), Program(4, 255, 2), Program(4, 255), Program(4, 168, 2)),
}
_EXACT = {
    1: (Program(16, 96, 2), Program(16, 96), Program(8, 96), Program(8, 80, 2), Program(8, 80), Program(4, 96)),
    2: (Program(16, 96, 2), *_COMMON[1:], Program(4, 128)),
}
_REGISTERS, _WARPS = 65536, 64  # of a multiprocessor
# In units of what a multiprocessor takes for a tile: a wave beside its tiles, and by how many warps; and by how much a
# tile in halves takes longer. Fitted to an H100 and an H200, 150 shapes of 512 rows to 65536: a program chosen by them
# is 0.6 % slower than the best of those above. Shared memory has room for all of them.
_WAVE_TILES, _WARP_TILES, _HALF_TILES = 40, 0.5, 1.1


@lru_cache(maxsize=4096)
def choose_program(bands: int, blocks: int, groups: int, multiprocessors: int, *, exact: bool = False) -> Program:
    """blocks: of K; groups: of 8 rows of x: 1, 2, 4 or 8; exact: 1 or 2."""
    programs = (_EXACT if exact else _INT8)[groups]
    return min(programs, key=lambda program: _predict(program, bands, blocks, multiprocessors))


def _predict(program: Program, bands: int, blocks: int, multiprocessors: int) -> float:
    """Time of all waves, each as long as a full one, in what a multiprocessor takes for a tile."""
    resident = min(_REGISTERS // (32 * program.warps * program.registers), _WARPS // program.warps)
    waves = triton.cdiv(bands * program.halves, resident * multiprocessors)
    tiles = resident / program.halves * triton.cdiv(blocks, program.warps) * program.warps
    tile = _HALF_TILES if program.halves == 2 else 1
    return waves * (tiles * tile + _WAVE_TILES + _WARP_TILES * program.warps)
