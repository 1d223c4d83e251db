"""H against its closed form, and the transform of padded blocks."""

import math

import pytest
import torch

from polar_kernels.hadamard import BLOCK_SIZE, hadamard_matrix, pad_blocks, padded_size, transform_blocks


@pytest.fixture
def closed_form(device: torch.device) -> torch.Tensor:
    """(-1)^popcount(i & j) / sqrt(128)."""
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(BLOCK_SIZE)] for i in range(BLOCK_SIZE)]
    return torch.tensor(signs, dtype=torch.float64, device=device) / math.sqrt(BLOCK_SIZE)


def test_natural_order(device: torch.device, closed_form: torch.Tensor) -> None:
    assert torch.equal(hadamard_matrix(torch.float64, device), closed_form)


def test_symmetric_and_orthonormal(device: torch.device) -> None:
    matrix = hadamard_matrix(torch.float64, device)
    assert torch.equal(matrix, matrix.T)
    identity = torch.eye(BLOCK_SIZE, dtype=torch.float64, device=device)
    torch.testing.assert_close(matrix @ matrix, identity, rtol=0, atol=1e-14)


def test_matrix_has_the_asked_dtype_and_device(device: torch.device) -> None:
    matrix = hadamard_matrix(torch.bfloat16, device)
    assert matrix.dtype == torch.bfloat16
    assert matrix.device.type == device.type


@pytest.mark.parametrize("context", [lambda: torch.device("meta"), torch.inference_mode])
def test_matrix_does_not_depend_on_the_context_of_its_first_call(device: torch.device, context) -> None:
    hadamard_matrix.cache_clear()
    try:
        with context():
            matrix = hadamard_matrix(torch.float64, device)
        assert matrix.device.type == device.type
        assert not matrix.is_inference()
    finally:
        hadamard_matrix.cache_clear()


def test_blocks_are_transformed_one_by_one(device: torch.device, closed_form: torch.Tensor) -> None:
    x = torch.randn(2, 3, 3 * BLOCK_SIZE, dtype=torch.float64, device=device)
    expected = torch.cat([block @ closed_form for block in x.split(BLOCK_SIZE, -1)], -1)
    torch.testing.assert_close(transform_blocks(x), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(transform_blocks(transform_blocks(x)), x, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("features", "padded"), [(0, 0), (1, 128), (127, 128), (128, 128), (129, 256), (200, 256)])
def test_padding(device: torch.device, features: int, padded: int) -> None:
    assert padded_size(features) == padded
    x = torch.ones(3, features, device=device)
    result = pad_blocks(x)
    assert result.shape == (3, padded)
    assert torch.equal(result[:, :features], x)
    assert not result[:, features:].any()
