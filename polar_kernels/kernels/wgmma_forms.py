"""How `int8_wgmma` is cut into programs, and which cut is the fastest for a shape."""

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Form:
    """What a program takes. rows: of x; warps: each with 16 rows of the weight; registers: of a thread, at most;
    resident: programs on a multiprocessor at a time; block_time: microseconds of a block of K, measured on an H100
    with all of them at work, which is hardly more than with one."""

    rows: int
    warps: int
    registers: int
    resident: int
    block_time: float


FORMS = (Form(64, 8, 128, 2, 1.20), Form(128, 4, 168, 3, 1.48), Form(128, 8, 255, 1, 1.07), Form(256, 8, 255, 1, 1.88))


@lru_cache(maxsize=4096)
def choose_cut(rows: int, out_features: int, blocks: int, multiprocessors: int) -> tuple[Form, int]:
    """The form, and how many programs share the blocks of K. Figures measured on an H100."""
    if rows <= FORMS[0].rows:
        # About three programs a multiprocessor: while one starts or ends, two are at work.
        programs = _cdiv(out_features, 16 * FORMS[0].warps)
        splits = 1
        while programs * splits * 2 <= 3 * multiprocessors and splits * 4 <= blocks:
            splits *= 2
        return FORMS[0], splits
    cuts = [(form, splits) for form in FORMS[1:] for splits in range(1, max(2, min(blocks // 2, 16) + 1))]
    return min(cuts, key=lambda cut: _predict(cut[0], cut[1], rows, out_features, blocks, multiprocessors))


def _predict(form: Form, splits: int, rows: int, out_features: int, blocks: int, multiprocessors: int) -> float:
    """Microseconds of the product without the rotation: as many waves of programs as it takes, and the adding up."""
    programs = _cdiv(rows, form.rows) * _cdiv(out_features, 16 * form.warps) * splits
    waves = _cdiv(programs, form.resident * multiprocessors)
    adding = 1.5 + splits * rows * out_features * 8 / 4e6 if splits > 1 else 0.0
    return waves * _cdiv(blocks, splits) * form.block_time + adding


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
