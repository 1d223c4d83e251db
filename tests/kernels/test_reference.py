"""The definition against itself: products equal those with the dense weight."""

import pytest
import torch

from polar_kernels import ArgumentError, pack_codes, reference

SHAPES = [(1, 128), (37, 200), (70, 384), (16, 64)]


def dense(parts: tuple, columns: int) -> torch.Tensor:
    return reference.dequantize(*parts, columns, torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("awq", [False, True])
@pytest.mark.parametrize("bits", [2, 5, 7, 8])
def test_linear_equals_the_dense_product(
    device: torch.device, random_weight, relative_error, shape: tuple[int, int], awq: bool, bits: int
) -> None:
    parts = random_weight(*shape, bits, awq=awq)
    x = torch.randn(9, shape[1], dtype=torch.float64, device=device)
    bias = torch.randn(shape[0], dtype=torch.float64, device=device)
    expected = x @ dense(parts, shape[1]).T
    assert relative_error(reference.linear(x, *parts), expected) < 1e-12
    assert relative_error(reference.linear(x, *parts, bias), expected + bias) < 1e-12


def test_dequantize_by_hand(device: torch.device) -> None:
    """One nonzero coordinate each: a row of H times norm and level; and AWQ divides."""
    levels = torch.tensor([-1.0, 0.0, 2.0, 3.0], device=device)
    codes = torch.ones(2, 128, dtype=torch.int64, device=device)
    codes[0, 0], codes[1, 1] = 2, 3
    norms = torch.tensor([[64.0], [128.0]], dtype=torch.float16, device=device)
    scales = torch.full((128,), 0.5, dtype=torch.float16, device=device)
    weight = reference.dequantize(pack_codes(codes, 2), norms, scales, levels, 128, torch.float64)
    alternating = torch.tensor([1.0, -1.0] * 64, dtype=torch.float64, device=device)
    expected = torch.stack([64 * 2 / 128 / 0.5 * alternating.abs(), 128 * 3 / 128 / 0.5 * alternating])
    torch.testing.assert_close(weight, expected, rtol=1e-14, atol=0)


def test_rotate_is_its_own_inverse(device: torch.device) -> None:
    x = torch.randn(3, 5, 384, dtype=torch.float64, device=device)
    rotated = reference.rotate(x, None)
    torch.testing.assert_close(reference.rotate(rotated, None), x, rtol=0, atol=1e-13)
    torch.testing.assert_close(rotated.norm(), x.norm(), rtol=1e-13, atol=0)


def test_rotate_divides_and_pads(device: torch.device) -> None:
    x, scales = torch.randn(4, 200, dtype=torch.float64, device=device), torch.rand(200, device=device).half() + 0.5
    rotated = reference.rotate(x, scales)
    assert rotated.shape == (4, 256)
    back = reference.rotate(rotated, None)
    torch.testing.assert_close(back[:, :200], x / scales.double(), rtol=0, atol=1e-13)
    assert back[:, 200:].abs().max() < 1e-13


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_are_rounded_once(device: torch.device, random_weight, dtype: torch.dtype) -> None:
    parts, x = random_weight(37, 200), torch.randn(9, 200, device=device).to(dtype)
    assert torch.equal(reference.linear(x, *parts), reference.linear(x.float(), *parts).to(dtype))
    assert torch.equal(reference.rotate(x, parts[2]), reference.rotate(x.float(), parts[2]).to(dtype))
    dense_fp32 = reference.dequantize(*parts, 200, torch.float32)
    assert torch.equal(reference.dequantize(*parts, 200, dtype), dense_fp32.to(dtype))


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (0,), (2, 0, 3)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_embedding_rows(device: torch.device, random_weight, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    parts = random_weight(37, 200)
    ids = torch.randint(0, 37, shape, dtype=dtype, device=device)
    rows = reference.embedding(ids, *parts, 200, torch.float64)
    assert rows.shape == (*shape, 200)
    torch.testing.assert_close(rows, dense(parts, 200)[ids.long()], rtol=0, atol=1e-15)


@pytest.mark.parametrize("chunk", [1, 600, 5000])
def test_chunks_change_nothing(
    device: torch.device, random_weight, relative_error, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    parts, x = random_weight(37, 200), torch.randn(9, 200, dtype=torch.float64, device=device)
    product, weight = reference.linear(x, *parts), dense(parts, 200)
    monkeypatch.setattr(reference, "_CHUNK", chunk)
    assert relative_error(reference.linear(x, *parts), product) < 1e-14
    assert relative_error(dense(parts, 200), weight) < 1e-14


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (2, 0, 3)])
def test_leading_shapes(device: torch.device, random_weight, shape: tuple[int, ...]) -> None:
    parts = random_weight(37, 200)
    x = torch.randn(*shape, 200, dtype=torch.float64, device=device)
    bias = torch.randn(37, dtype=torch.float64, device=device)
    product = reference.linear(x, *parts, bias)
    assert product.shape == (*shape, 37)
    torch.testing.assert_close(product, x @ dense(parts, 200).T + bias, rtol=0, atol=1e-10)
    assert reference.rotate(x, parts[2]).shape == (*shape, 256)


def test_no_rows(device: torch.device, random_weight) -> None:
    parts = random_weight(0, 200)
    assert reference.linear(torch.randn(3, 200, device=device), *parts).shape == (3, 0)
    assert dense(parts, 200).shape == (0, 200)


@pytest.mark.parametrize("wrong", [3, 5, 1, 512])
def test_table_of_wrong_length(device: torch.device, random_weight, wrong: int) -> None:
    packed, norms, scales, _ = random_weight(4, 128)
    with pytest.raises(ArgumentError, match="centroids must be 1-D with 2\\^bits levels"):
        reference.dequantize(packed, norms, scales, torch.zeros(wrong, device=device), 128, torch.float32)
