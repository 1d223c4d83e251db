"""Products of few rows by every program that some weight gets."""

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from int8_errors import INT8_ERROR

from polar_kernels import reference
from polar_kernels.kernels import exact_matmul, int8_matmul
from polar_kernels.kernels.band_programs import Program, exact_program, int8_program

_CHOICES = {int8_matmul: (int8_program, (1, 2, 4, 8)), exact_matmul: (exact_program, (1, 2))}
_BANDS, _BLOCKS = (1, 32, 66, 67, 128, 192, 256, 384, 512, 576, 640, 768, 896, 7760), (1, 16, 32, 96, 136)
PROGRAMS = [
    (module.__name__.split(".")[-1], groups, program)
    for module, (choose, numbers) in _CHOICES.items()
    for groups in numbers
    for program in sorted({choose(bands, blocks, groups, 132) for bands in _BANDS for blocks in _BLOCKS})
]


@pytest.mark.parametrize("program", sorted({program for *_, program in PROGRAMS}), ids=str)
def test_a_multiprocessor_has_registers_for_it(program: Program) -> None:
    assert program.registers * program.warps * 32 <= 65536
    assert program.registers <= 255
    assert program.halves in (1, 2)


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
def test_one_wave_that_is_full(bands: int, blocks: int, resident: float) -> None:
    """resident: bands that a multiprocessor has room for at a time."""
    for choose in (int8_program, exact_program):
        program = choose(bands, blocks, 1, 132)
        assert resident <= 65536 // (32 * program.warps * program.registers) / program.halves <= resident + 1


def test_fewer_multiprocessors_take_larger_programs() -> None:
    assert int8_program(384, 32, 1, 132).warps == 8
    assert int8_program(384, 32, 1, 96) == Program(4, 128)


@pytest.mark.gpu
@pytest.mark.parametrize(("kernel", "groups", "program"), PROGRAMS, ids=lambda value: str(value))
@pytest.mark.parametrize("bits", [4, 5])
def test_product(
    device, poisoned, tiled, relative_error, monkeypatch, kernel: str, groups: int, program: Program, bits: int
) -> None:
    """Of weights with rows, and columns, that do not fill their last band, half a band and block."""
    module = import_module(f"polar_kernels.kernels.{kernel}")
    multiply: Callable[..., torch.Tensor] = getattr(module, kernel.replace("matmul", "linear"))
    monkeypatch.setattr(module, kernel.replace("matmul", "program"), lambda *shape: program)
    for rows, columns in ((40, 128), (70, 680), (33, 4200)):
        tiles, stored = tiled(rows, columns, bits=bits)
        x = torch.randn(groups * 8 - 3, columns, device=device).bfloat16()
        offset = torch.randn(rows, device=device)
        exact = reference.linear(x.double(), *stored, offset)
        y = multiply(x, *tiles[:4], offset, rows)
        if module is int8_matmul:
            assert relative_error(y, exact) < INT8_ERROR
        else:
            plain = torch.nn.functional.linear(x, reference.dequantize(*stored, columns, x.dtype), offset.bfloat16())
            assert relative_error(y, exact) < 2 * relative_error(plain, exact)
        x[1, -1] = torch.nan
        with_nan = multiply(x, *tiles[:4], offset, rows)
        assert with_nan[1].isnan().all()
        sound = torch.arange(len(x), device=device) != 1
        assert torch.equal(with_nan[sound], y[sound])
