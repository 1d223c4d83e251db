"""Products of few rows by every program that some weight gets."""

import pytest
import torch
from int8_errors import INT8_ERROR

from polar_kernels import reference
from polar_kernels.kernels import exact_matmul, int8_matmul
from polar_kernels.kernels.band_programs import Program, choose_program

_BANDS, _BLOCKS = (1, 32, 66, 67, 128, 192, 256, 384, 512, 576, 640, 768, 896, 7760), (1, 16, 32, 96, 136)
PROGRAMS = [
    (exact, groups, program)
    for exact, numbers in ((False, (1, 2, 4, 8)), (True, (1, 2)))
    for groups in numbers
    for program in sorted(
        {choose_program(bands, blocks, groups, 132, exact=exact) for bands in _BANDS for blocks in _BLOCKS}
    )
]


@pytest.mark.parametrize("program", sorted({program for *_, program in PROGRAMS}), ids=str)
def test_a_multiprocessor_has_room_for_it(program: Program) -> None:
    assert program.registers * program.warps * 32 <= 65536
    assert program.registers <= 255
    assert program.warps <= 16  # `open_pairs` fills its table by that many at most


@pytest.mark.parametrize(
    ("bands", "blocks", "resident"),
    [
        (32, 32, 0.5),
        (66, 32, 0.5),
        (128, 96, 1),
        (192, 32, 1.5),
        (256, 32, 2),
        (384, 32, 3),
        (512, 32, 4),
        (640, 32, 5),
    ],
)
@pytest.mark.parametrize("exact", [False, True])
def test_one_wave_that_is_full(bands: int, blocks: int, resident: float, exact: bool) -> None:
    """resident: bands that a multiprocessor needs room for at a time."""
    program = choose_program(bands, blocks, 1, 132, exact=exact)
    assert resident <= 65536 // (32 * program.warps * program.registers) / program.halves <= resident + 1


def test_fewer_multiprocessors_take_larger_programs() -> None:
    assert choose_program(384, 32, 1, 132).warps == 8
    assert choose_program(384, 32, 1, 96) == Program(4, 128)


@pytest.mark.gpu
@pytest.mark.parametrize(("exact_mode", "groups", "program"), PROGRAMS, ids=str)
@pytest.mark.parametrize("bits", [4, 5])
def test_product(
    device, poisoned, tiled, relative_error, monkeypatch, exact_mode: bool, groups: int, program: Program, bits: int
) -> None:
    """Of weights with rows, and columns, that do not fill their last band, half a band and block."""
    multiply = exact_matmul.exact_linear if exact_mode else int8_matmul.int8_linear
    for module in (exact_matmul, int8_matmul):
        monkeypatch.setattr(module, "choose_program", lambda *shape, **mode: program)
    for rows, columns in ((40, 128), (70, 680), (33, 4200)):
        tiles, stored = tiled(rows, columns, bits=bits)
        x = torch.randn(groups * 8 - 3, columns, device=device).bfloat16()
        offset = torch.randn(rows, device=device)
        exact = reference.linear(x.double(), *stored, offset)
        y = multiply(x, *tiles[:4], offset, rows)
        if not exact_mode:
            assert relative_error(y, exact) < INT8_ERROR
        else:
            plain = torch.nn.functional.linear(x, reference.dequantize(*stored, columns, x.dtype), offset.bfloat16())
            assert relative_error(y, exact) < 2 * relative_error(plain, exact)
        x[1, -1] = torch.nan
        with_nan = multiply(x, *tiles[:4], offset, rows)
        assert with_nan[1].isnan().all()
        sound = torch.arange(len(x), device=device) != 1
        assert torch.equal(with_nan[sound], y[sound])
