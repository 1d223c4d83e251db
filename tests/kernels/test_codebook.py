"""The tables of levels against the documented numbers and the definition of a Lloyd-Max quantiser."""

import contextlib
import math
from itertools import pairwise

import pytest
import torch

from polar_kernels import ArgumentError, lloyd_max_levels, published_levels
from polar_kernels.codebook import lloyd_max_distortion

ALL_BITS = range(2, 9)
LEVELS_32 = (
    "0.06589 0.19805 0.33138 0.46670 0.60493 0.74714 0.89457 1.04878 "
    "1.21180 1.38634 1.57623 1.78723 2.02873 2.31774 2.69112 3.26073"
)


def normal_mse(levels: torch.Tensor) -> float:
    """Mean squared error of N(0, 1) at its nearest level, by the trapezoidal rule."""
    z = torch.linspace(-9, 9, 100_001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    error = (z[:, None] - levels.double()).square().amin(1)
    return torch.trapezoid(error * density, z).item()


def cell_centroid(low: float, high: float) -> float:
    """Mean of N(0, 1) on [low, high], 0 <= low."""
    moment = (math.exp(-low * low / 2) - math.exp(-high * high / 2)) / math.sqrt(2 * math.pi)
    mass = (math.erfc(low / math.sqrt(2)) - math.erfc(high / math.sqrt(2))) / 2
    return moment / mass


@pytest.mark.parametrize(
    ("bits", "mse", "last_digit"),
    [(2, 0.11748, 1e-5), (3, 0.034548, 1e-6), (4, 0.009501, 1e-6), (5, 0.0025047, 1e-7), (6, 0.000644, 1e-6)],
)
def test_documented_mse(bits: int, mse: float, last_digit: float) -> None:
    assert normal_mse(lloyd_max_levels(bits)) == pytest.approx(mse, abs=last_digit / 2, rel=0)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_distortion(bits: int) -> None:
    assert lloyd_max_distortion(bits) == pytest.approx(normal_mse(lloyd_max_levels(bits)), rel=1e-4)


@pytest.mark.parametrize(("bits", "mse"), [(5, 0.002923), (6, 0.001047)])
def test_published_mse(bits: int, mse: float) -> None:
    assert normal_mse(published_levels(bits)) == pytest.approx(mse, abs=5e-7, rel=0)


def test_documented_levels_at_32() -> None:
    assert [f"{level:.5f}" for level in lloyd_max_levels(5)[16:].tolist()] == LEVELS_32.split()


@pytest.mark.parametrize("bits", ALL_BITS)
def test_levels_are_centroids_of_their_cells(bits: int) -> None:
    positive = lloyd_max_levels(bits)[1 << (bits - 1) :].tolist()
    inner = [(a + b) / 2 for a, b in pairwise(positive)]
    edges = [0.0, *inner, math.inf]
    cells = [cell_centroid(low, high) for low, high in pairwise(edges)]
    assert positive == pytest.approx(cells, abs=1e-6, rel=0)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("table", [lloyd_max_levels, published_levels])
def test_tables_are_sorted_odd_fp32(table, bits: int) -> None:
    levels = table(bits)
    assert levels.dtype == torch.float32
    assert levels.shape == (1 << bits,)
    assert (levels.diff() > 0).all()
    torch.testing.assert_close(levels, -levels.flip(0), rtol=0, atol=0)


@pytest.mark.parametrize("table", [lloyd_max_levels, published_levels])
@pytest.mark.parametrize("bits", [1, 9, True, 5.0, "5", None])
def test_wrong_bits(table, bits: object) -> None:
    table(5)  # a cached table must not answer for 5.0
    with pytest.raises(ArgumentError, match="bits must be an integer from 2 to 8"):
        table(bits)


CONTEXTS = {
    "default_device_meta": lambda: torch.device("meta"),
    "inference_mode": torch.inference_mode,
    "no_context": contextlib.nullcontext,
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("table", [lloyd_max_levels, published_levels])
def test_tables_do_not_depend_on_the_context_of_their_first_call(table, context: str) -> None:
    """Models are built under `torch.device("meta")`, and what the first caller makes is kept for all."""
    expected = table(5).clone()
    table.cache_clear()
    try:
        with CONTEXTS[context]():
            levels = table(5)
        assert levels.device.type == "cpu"
        assert not levels.is_inference()
        assert torch.equal(levels, expected)
    finally:
        table.cache_clear()
