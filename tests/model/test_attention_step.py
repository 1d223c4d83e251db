"""Attention of one new token beside torch's own in fp64: any heads and mask, a cache that is part of a longer one."""

import pytest
import torch
import torch.nn.functional as F

from model_patch.decode import attention_step as kernels
from model_patch.decode.attention_step import attention_step

# rows, heads, key heads, dim, length
SHAPES = [(1, 4, 4, 32, 17), (2, 8, 2, 64, 130), (3, 6, 1, 40, 64), (1, 32, 1, 16, 200), (2, 2, 2, 128, 1)]


def case(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """query, key, value and mask; keys and values are the first tokens of longer ones, the rest of which is NaN."""
    rows, heads, key_heads, dim, length = shape
    query = torch.randn(rows, heads, dim, device=device).to(dtype)
    kept = torch.full((2, rows + 1, key_heads, length + 5, dim), torch.nan, device=device, dtype=dtype)
    kept[:, :rows, :, :length] = torch.randn(2, rows, key_heads, length, dim, device=device).to(dtype)
    seen = torch.rand(rows + 1, 1, 1, length + 3, device=device) < 0.6
    seen[..., length - 1] = True
    if length > 100:
        seen[0, ..., :100] = False  # whole parts that a row does not see
    mask = seen[:rows, 0, 0, :length]
    return query, kept[0, :rows, :, :length], kept[1, :rows, :, :length], mask


def expected(query, key, value, mask, scale, dtype) -> torch.Tensor:
    rows, heads, dim = query.shape
    grouped = query.to(dtype).reshape(rows, key.shape[1], -1, dim)
    y = F.scaled_dot_product_attention(grouped, key.to(dtype), value.to(dtype), mask[:, None, None], scale=scale)
    return y.reshape(rows, heads, dim)


@pytest.mark.parametrize("programs", [1, 256])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(device, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], programs: int) -> None:
    monkeypatch.setattr(kernels, "_PROGRAMS", programs)
    parts = case(shape, device, torch.float32)
    y = attention_step(*parts, 0.3)
    torch.testing.assert_close(y.double(), expected(*parts, 0.3, torch.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 16, 4, 256, 700), (16, 16, 4, 256, 2048)])
def test_sixteen_bits(device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The error is below twice that of torch's own."""
    parts = case(shape, device, dtype)
    exact = expected(*parts, 0.1, torch.float64)
    plain = expected(*parts, 0.1, dtype)
    error = (plain.double() - exact).norm()
    assert (attention_step(*parts, 0.1).double() - exact).norm() < 2 * error + 1e-6 * exact.norm()


def test_a_nan_stays_in_its_row(device: torch.device) -> None:
    query, key, value, mask = case((2, 4, 2, 32, 40), device, torch.float32)
    query[1, 0, 0] = torch.nan
    y = attention_step(query, key, value, mask, 0.2)
    assert y[0].isfinite().all()
    assert y[1, 0].isnan().all()
    assert y[1, 1:].isfinite().all()
