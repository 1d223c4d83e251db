"""What rounding to int8 costs, by the kernels' arithmetic in fp64: the figures of docs/kernels.md."""

import pytest
import torch

from polar_kernels import lloyd_max_levels
from polar_kernels.kernels.wgmma_forms import SCALE_BLOCKS
from polar_kernels.tiles import FP16_PAIRS, PART_LEVELS, PARTS, half_integer_levels, level_table

ROWS, BLOCKS, TOKENS = 256, 32, 64


def _rounded(x: torch.Tensor, blocks: int) -> torch.Tensor:
    """x [.., blocks of K, 128] rounded to int8, so many blocks to a scale."""
    parts = x.unflatten(1, (-1, blocks)).flatten(2)
    scales = parts.abs().amax(-1, keepdim=True) / 127
    return ((parts / scales).round() * scales).view_as(x)


def _errors(x: torch.Tensor, norms: torch.Tensor) -> list[float]:
    """Of a scale for each block, and of one for four blocks of x and of the weight: levels looked up, and rounded."""
    levels = lloyd_max_levels(5).double()
    codes = torch.bucketize(torch.randn(ROWS, BLOCKS, 128).double(), (levels[1:] + levels[:-1]) / 2)
    steps, delta = half_integer_levels(levels[16:])
    positive = (steps.double() + 0.5) * delta
    int8_levels = torch.cat([-positive.flip(0), positive])
    weight = levels[codes] * norms[..., None]
    largest = norms.unflatten(1, (-1, SCALE_BLOCKS)).amax(-1).repeat_interleave(SCALE_BLOCKS, 1)
    step = largest[..., None] * delta * 127.5 / 127
    exact = x.flatten(1) @ weight.flatten(1).T
    tables = level_table(levels.float())[PART_LEVELS:FP16_PAIRS].view(PARTS + 1, 4).view(torch.int8).double() + 0.5
    tables = torch.cat([-tables.flip(1), tables], 1) * delta
    parts = (norms / largest * PARTS).round().long()
    products = [
        (_rounded(x, 1), int8_levels[codes] * norms[..., None]),
        (_rounded(x, SCALE_BLOCKS), tables[parts[..., None], codes] * largest[..., None]),
        (_rounded(x, SCALE_BLOCKS), (weight / step).round() * step),
    ]
    found = [a.flatten(1) @ w.flatten(1).T for a, w in products]
    return [float((y - exact).norm() / exact.norm()) for y in found]


def _every_fourth(one: float, others: float) -> torch.Tensor:
    return torch.tensor([one] + [others] * 3).double().repeat(BLOCKS // 4)


@pytest.mark.parametrize(
    ("x_scale", "norm_scale", "expected"),
    [
        (_every_fourth(1, 1), _every_fourth(1, 1), [0.008, 0.012, 0.013]),
        (_every_fourth(1, 0.01), _every_fourth(1, 1), [0.008, 0.016, 0.0165]),
        (_every_fourth(1, 20), _every_fourth(1, 0.05), [0.008, 0.15, 0.15]),
    ],
    ids=["alike", "one block of x is large", "x is large where norms are small"],
)
def test_error(x_scale: torch.Tensor, norm_scale: torch.Tensor, expected: list[float]) -> None:
    x = torch.randn(TOKENS, BLOCKS, 128).double() * x_scale[:, None]
    norms = torch.rand(ROWS, BLOCKS).add(0.5).double() * norm_scale
    assert _errors(x, norms) == pytest.approx(expected, rel=0.15)
