"""How products by `wgmma` are cut into programs, and which cut is the fastest for a shape."""

from dataclasses import dataclass
from functools import lru_cache

SCALE_BLOCKS = 4  # blocks of a row, of x and of the weight, that have one scale; K is shared by as many


@dataclass(frozen=True)
class Form:
    """What a program takes.

    rows: of x; warps: of a share, each with 16 rows of the weight; shares: of K, taken side by side and added up in the
    end; registers: of a thread, at most; resident: programs on a multiprocessor at a time; x_slots: for chunks of x in
    shared memory; block_time: microseconds of a block of K with all of them at work; alone: what part of that a block
    takes however few there are.
    """

    rows: int
    warps: int
    shares: int
    registers: int
    resident: int
    x_slots: int
    block_time: float
    alone: float


# Times as measured on an H200, fitted together with those below; a cut chosen by them is 0.2 % slower than the best.
FORMS = (
    Form(64, 4, 1, 128, 4, 2, 0.855, 0.258),
    Form(64, 4, 2, 128, 2, 2, 0.947, 0.163),
    Form(128, 4, 1, 168, 3, 2, 0.959, 0.359),
    Form(128, 8, 1, 208, 1, 4, 0.627, 1.0),
    Form(128, 4, 2, 240, 1, 2, 0.725, 1.0),
)
EXACT_FORMS = (  # as measured on an H100; 0.9 %
    Form(32, 8, 1, 128, 2, 2, 0.958, 0.315),
    Form(32, 4, 2, 128, 1, 2, 0.627, 1.0),
    Form(64, 4, 1, 168, 2, 2, 0.666, 0.426),
    Form(64, 4, 2, 168, 1, 2, 0.626, 1.0),
    Form(128, 8, 1, 255, 1, 2, 0.853, 1.0),
)
EXPERT_FORM = Form(64, 8, 1, 128, 2, 2, 1.0, 1.0)  # chosen for any shape: its times are of no account
_WAVE_TIME = 1.25  # microseconds of a program outside its loop
_ADD_TIME, _SUM_TIME = 1.2, 1.78  # of adding up, and of a million sums of one of the programs that share K
_MOST_SPLITS = 16


@lru_cache(maxsize=4096)
def choose_cut(
    rows: int, out_features: int, blocks: int, multiprocessors: int, *, exact: bool = False
) -> tuple[Form, int]:
    """The form, and how many blocks of K a share of a program takes at most. exact: of EXACT_FORMS."""
    forms = _exact_forms(rows) if exact else _int8_forms(rows)
    cuts = [(form, split_blocks) for form in forms for split_blocks in _possible_splits(form, blocks)]
    return min(cuts, key=lambda cut: _predict(cut[0], cut[1], rows, out_features, blocks, multiprocessors))


def _int8_forms(rows: int) -> list[Form]:
    """Those that may be the best for so many rows of x."""
    return [form for form in FORMS if (form.rows == 64) == (rows <= 64)]


def _exact_forms(rows: int) -> list[Form]:
    return [form for form in EXACT_FORMS if (form.rows == 32) == (rows <= 32) and (form.rows < 128 or rows > 64)]


def _possible_splits(form: Form, blocks: int) -> list[int]:
    """Blocks of a share, of few programs that share K first."""
    most = max(1, min(_cdiv(blocks, SCALE_BLOCKS * form.shares), _MOST_SPLITS))
    return sorted({_split_blocks(blocks, splits * form.shares) for splits in range(1, most + 1)}, reverse=True)


def _predict(form: Form, split_blocks: int, rows: int, out_features: int, blocks: int, multiprocessors: int) -> float:
    """Microseconds of the product, but for what is the same for every cut: waves of programs, and the adding up."""
    splits = _cdiv(blocks, split_blocks * form.shares)
    programs = _cdiv(rows, form.rows) * _cdiv(out_features, 16 * form.warps) * splits
    whole_waves, left = divmod(programs, form.resident * multiprocessors)
    time = whole_waves * (split_blocks * _block_time(form, form.resident) + _WAVE_TIME)
    if left:
        time += split_blocks * _block_time(form, _cdiv(left, multiprocessors)) + _WAVE_TIME
    return time + (_ADD_TIME + _SUM_TIME * splits * rows * out_features / 1e6 if splits > 1 else 0.0)


def _block_time(form: Form, programs: int) -> float:
    """Microseconds of a block of K where a multiprocessor has so many programs."""
    return form.block_time * (form.alone + (1 - form.alone) * programs / form.resident)


def _split_blocks(blocks: int, parts: int) -> int:
    return _cdiv(_cdiv(blocks, parts), SCALE_BLOCKS) * SCALE_BLOCKS


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
