"""Weights and error measures shared by the tests of polar_kernels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from polar_kernels import BLOCK_SIZE, lloyd_max_levels
from polar_kernels.tiles import level_table, tile_weight

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]


@pytest.fixture
def random_weight(device: torch.device) -> Callable[..., Parts]:
    """Builds (packed, norms, awq_scales, centroids) from random bytes, each of which is a valid piece of a stream."""

    def build(rows: int, columns: int, bits: int = 5, *, awq: bool = True) -> Parts:
        blocks = -(-columns // BLOCK_SIZE)
        packed = torch.randint(0, 256, (rows, blocks * BLOCK_SIZE * bits // 8), dtype=torch.uint8, device=device)
        norms = torch.rand(rows, blocks, device=device).add(0.5).half()
        scales = torch.rand(columns, device=device).add(0.5).half() if awq else None
        return packed, norms, scales, lloyd_max_levels(bits).to(device)

    return build


@pytest.fixture
def tiled(random_weight: Callable[..., Parts]) -> Callable[..., tuple[tuple, Parts]]:
    """(tiled parts, stored parts) of a random weight."""

    def make(rows: int, columns: int, awq: bool = True, bits: int = 5) -> tuple[tuple, Parts]:
        packed, norms, scales, centroids = random_weight(rows, columns, bits, awq=awq)
        tiles, tile_norms = tile_weight(packed, norms, bits)
        return (tiles, tile_norms, scales, level_table(centroids), centroids), (packed, norms, scales, centroids)

    return make


@pytest.fixture(scope="session")
def relative_error() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Frobenius norm of the error over that of the exact value, in fp64."""

    def measure(actual: torch.Tensor, exact: torch.Tensor) -> float:
        return ((actual.double() - exact.double()).norm() / exact.double().norm()).item()

    return measure


@pytest.fixture(scope="session")
def rounding() -> dict[torch.dtype, float]:
    """Relative errors allowed: a few roundings in fp32, whose sums are fp32 too, and one or two in the others."""
    return {torch.float32: 4e-7, torch.float16: 2**-11, torch.bfloat16: 2**-8}


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets torch.empty return NaN, so that an element which a kernel does not write is seen."""
    empty = torch.empty

    def nan_filled(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", nan_filled)
