"""How `int8_wgmma` is cut into programs, and which cut is the fastest for a shape."""

from dataclasses import dataclass
from functools import lru_cache

SCALE_BLOCKS = 4  # blocks of a row of x that have one scale; programs share the blocks of K by as many


@dataclass(frozen=True)
class Form:
    """What a program takes.

    rows: of x; warps: each with 16 rows of the weight; registers: of a thread, at most; resident: programs on a
    multiprocessor at a time; block_time: microseconds of a block of K with all of them at work; alone: what part of
    that a block takes however few there are; unrolled: blocks of K without a branch; late: whether the next tile of
    the weight is asked for only once there are registers, after the product.
    """

    rows: int
    warps: int
    registers: int
    resident: int
    block_time: float
    alone: float
    unrolled: int = SCALE_BLOCKS
    late: bool = False

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
        return {1: 1 << 17, 2: 1 << 16, 3: 1 << 16, 4: 1 << 15}[self.resident]


# Times as measured on an H200, all fitted together with those below; a cut chosen by them is 1 % slower than the best.
FORMS = (
    Form(64, 4, 128, 4, 0.834, 0.477),
    Form(128, 4, 168, 3, 1.123, 0.655, unrolled=1, late=True),
    Form(128, 8, 255, 1, 0.735, 1.0),
    Form(256, 8, 255, 1, 1.439, 1.0, unrolled=1),
)
EXPERT_FORM = Form(64, 8, 128, 2, 1.0, 1.0)  # chosen for any shape: its times are of no account
_WAVE_TIME = 1.5  # microseconds of a program outside its loop
_SUM_TIME = 1.77  # of adding up a million sums of one of the programs that share K


@lru_cache(maxsize=4096)
def choose_cut(rows: int, out_features: int, blocks: int, multiprocessors: int) -> tuple[Form, int]:
    """The form, and how many blocks of K a program takes at most."""
    shares = range(1, max(2, min(blocks // SCALE_BLOCKS, 16) + 1))
    forms = FORMS[:1] if rows <= FORMS[0].rows else FORMS[1:]
    cuts = [(form, _split_blocks(blocks, share)) for form in forms for share in shares]
    return min(cuts, key=lambda cut: _predict(cut[0], cut[1], rows, out_features, blocks, multiprocessors))


def _predict(form: Form, split_blocks: int, rows: int, out_features: int, blocks: int, multiprocessors: int) -> float:
    """Microseconds of the product, but for what is the same for every cut: waves of programs, and the adding up."""
    splits = _cdiv(blocks, split_blocks)
    programs = _cdiv(rows, form.rows) * _cdiv(out_features, 16 * form.warps) * splits
    whole_waves, left = divmod(programs, form.resident * multiprocessors)
    time = whole_waves * (split_blocks * form.block_time + _WAVE_TIME)
    if left:
        busy = _cdiv(left, multiprocessors) / form.resident
        time += split_blocks * form.block_time * (form.alone + (1 - form.alone) * busy) + _WAVE_TIME
    return time + (_SUM_TIME * splits * rows * out_features / 1e6 if splits > 1 else 0.0)


def _split_blocks(blocks: int, splits: int) -> int:
    return _cdiv(_cdiv(blocks, splits), SCALE_BLOCKS) * SCALE_BLOCKS


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
