"""How `int8_wgmma` is cut into programs, and which cut is the fastest for a shape."""

from dataclasses import dataclass
from functools import lru_cache

SCALE_BLOCKS = 4  # blocks of a row of x that have one scale; programs share the blocks of K by as many


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

    @property
    def product_rows(self) -> int:
        """Rows of x that one instruction multiplies by."""
        return min(self.rows, 128)

    @property
    def products(self) -> int:
        return self.rows // self.product_rows

    @property
    def shared_bytes(self) -> int:
        """A power of two, so that all resident programs fit."""
        return 1 << 17 if self.resident == 1 else 1 << 16


FORMS = (Form(64, 8, 128, 2, 1.08), Form(128, 4, 168, 3, 1.14), Form(128, 8, 255, 1, 0.815), Form(256, 8, 255, 1, 1.37))
_START_TIME = 2.0  # microseconds of a program outside its loop


@lru_cache(maxsize=4096)
def choose_cut(rows: int, out_features: int, blocks: int, multiprocessors: int) -> tuple[Form, int]:
    """The form, and how many blocks of K a program takes at most. Figures measured on an H100."""
    if rows <= FORMS[0].rows:
        # About three programs a multiprocessor: while one starts or ends, two are at work.
        programs = _cdiv(out_features, 16 * FORMS[0].warps)
        splits = 1
        while programs * splits * 2 <= 3 * multiprocessors and splits * 4 <= blocks:
            splits *= 2
        return FORMS[0], _split_blocks(blocks, splits)
    shares = range(1, max(2, min(blocks // SCALE_BLOCKS, 16) + 1))
    cuts = [(form, _split_blocks(blocks, share)) for form in FORMS[1:] for share in shares]
    return min(cuts, key=lambda cut: _predict(cut[0], cut[1], rows, out_features, blocks, multiprocessors))


def _predict(form: Form, split_blocks: int, rows: int, out_features: int, blocks: int, multiprocessors: int) -> float:
    """Microseconds of the product without the rotation: as many waves of programs as it takes, and the adding up."""
    splits = _cdiv(blocks, split_blocks)
    programs = _cdiv(rows, form.rows) * _cdiv(out_features, 16 * form.warps) * splits
    waves = _cdiv(programs, form.resident * multiprocessors)
    adding = splits * rows * out_features * 8 / 3.2e6 if splits > 1 else 0.0
    return waves * (split_blocks * form.block_time + _START_TIME) + adding


def _split_blocks(blocks: int, splits: int) -> int:
    return _cdiv(_cdiv(blocks, splits), SCALE_BLOCKS) * SCALE_BLOCKS


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
