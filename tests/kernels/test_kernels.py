"""Every Triton kernel against the definition in fp64.

The measure is plain torch in the same dtype: a kernel may have at most twice the error of a product with a weight
rounded to that dtype. Errors are taken over enough outputs that this ratio is no accident of a few numbers.
"""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from polar_kernels import lloyd_max_levels, pack_codes, reference, unpack_codes
from polar_kernels.hadamard import hadamard_matrix, pad_blocks
from polar_kernels.kernels.dequantize import dequantize_rows
from polar_kernels.kernels.matmul import linear, matmul
from polar_kernels.kernels.rotate import rotate

pytestmark = pytest.mark.usefixtures("poisoned")

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 128), (37, 200), (70, 384), (16, 64), (257, 1152)]
QWEN_SHAPES = [(12288, 4096), (4096, 12288), (8192, 4096), (1024, 4096)]
OUTPUTS = 128  # fewest numbers an error is measured over


@pytest.fixture
def assert_precise(relative_error) -> Callable[..., None]:
    """Asserts that an error is below twice the measure's, up to a hundredth of a rounding."""

    def check(actual: torch.Tensor, measure: torch.Tensor, exact: torch.Tensor) -> None:
        assert actual.shape == exact.shape
        assert actual.dtype == measure.dtype
        limit = 2 * relative_error(measure, exact) + 0.01 * torch.finfo(actual.dtype).eps
        assert relative_error(actual, exact) < limit

    return check


@pytest.fixture
def check_linear(device: torch.device, random_weight, assert_precise) -> Callable[..., None]:
    """Compares calls with `rows` rows each, as many as OUTPUTS takes."""

    def check(rows: int, shape: tuple[int, int], dtype: torch.dtype, bits: int = 5, awq=True, bias=True) -> None:
        parts = random_weight(*shape, bits, awq=awq)
        calls = -(-OUTPUTS // (rows * shape[0]))
        x = torch.randn(calls * rows, shape[1], device=device).to(dtype)
        offset = torch.randn(shape[0], device=device).to(dtype) if bias else None
        exact = reference.linear(x.double(), *parts, offset)
        dense = reference.dequantize(*parts, shape[1], torch.float64)
        actual = torch.cat([linear(part, *parts, offset) for part in x.split(rows)])
        # In fp32 the rotation itself rounds as much as the product, so that the measure has to make it too.
        plain = reference.linear(x, *parts, offset) if dtype == torch.float32 else F.linear(x, dense.to(dtype), offset)
        assert_precise(actual, plain, exact)

    return check


@pytest.mark.parametrize("bits", range(2, 9))
def test_linear_at_all_bits(check_linear, bits: int) -> None:
    check_linear(7, (37, 200), torch.float16, bits)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_shapes(check_linear, shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_linear(2, shape, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 33])
def test_linear_rows(check_linear, rows: int, dtype: torch.dtype) -> None:
    check_linear(rows, (70, 384), dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("awq", [False, True])
def test_linear_options(check_linear, awq: bool, bias: bool) -> None:
    check_linear(3, (37, 200), torch.float32, awq=awq, bias=bias)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 128, 1000])
@pytest.mark.parametrize("bits", range(2, 9))
def test_linear_of_many_rows(check_linear, rows: int, bits: int, dtype: torch.dtype) -> None:
    check_linear(rows, (257, 1152), dtype, bits)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 33, 128, 1000])
@pytest.mark.parametrize("shape", QWEN_SHAPES)
def test_linear_of_qwen(check_linear, shape: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
    check_linear(rows, shape, dtype)


@pytest.mark.gpu
def test_linear_of_qwen_in_fp32(check_linear) -> None:
    check_linear(33, QWEN_SHAPES[1], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bias_may_have_another_dtype(device: torch.device, random_weight, assert_precise, dtype: torch.dtype) -> None:
    parts, x = random_weight(37, 200), torch.randn(5, 200, device=device).half()
    bias = torch.randn(37, device=device).to(dtype)
    dense = reference.dequantize(*parts, 200, torch.float16)
    exact = reference.linear(x.double(), *parts, bias)
    assert_precise(linear(x, *parts, bias), F.linear(x, dense, bias.half()), exact)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("awq", [False, True])
@pytest.mark.parametrize("columns", [64, 128, 200, 1152])
def test_rotate(device: torch.device, assert_precise, columns: int, awq: bool, dtype: torch.dtype) -> None:
    x = torch.randn(7, columns, device=device).to(dtype)
    scales = torch.rand(columns, device=device).half() + 0.5 if awq else None
    divided = x.float() / scales.float() if awq else x
    blocks = pad_blocks(divided.to(dtype)).unflatten(-1, (-1, 128))
    measure = (blocks @ hadamard_matrix(dtype, device)).flatten(-2)
    assert_precise(rotate(x, scales).to(dtype), measure, reference.rotate(x.double(), scales))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
def test_rotate_of_many_rows(device: torch.device, assert_precise, dtype: torch.dtype) -> None:
    x = torch.randn(1000, 12288, device=device).to(dtype)
    measure = (x.unflatten(-1, (-1, 128)) @ hadamard_matrix(dtype, device)).flatten(-2)
    assert_precise(rotate(x, None), measure, reference.rotate(x.double(), None))


def test_rotate_of_unit_vectors_is_the_matrix(device: torch.device) -> None:
    actual = rotate(torch.eye(128, device=device), None)
    torch.testing.assert_close(actual, hadamard_matrix(torch.float32, device), rtol=1.2e-7, atol=0)


def plain_dequantize(parts: tuple, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Every step of the formula rounded to `dtype`."""
    packed, norms, scales, centroids = parts
    codes = unpack_codes(packed, len(centroids).bit_length() - 1).int()
    levels = (centroids.double() / 128**0.5).to(dtype)[codes]
    blocks = levels.unflatten(-1, (-1, 128)) @ hadamard_matrix(dtype, packed.device)
    weight = (blocks * norms.to(dtype)[..., None]).flatten(-2)[:, :columns]
    return weight if scales is None else weight / scales.to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize(
    device: torch.device, random_weight, assert_precise, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    for awq in (False, True):
        parts = random_weight(*shape, awq=awq)
        exact = reference.dequantize(*parts, shape[1], torch.float64)
        actual = dequantize_rows(None, *parts, shape[1], dtype)
        assert_precise(actual, plain_dequantize(parts, shape[1], dtype), exact)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", QWEN_SHAPES)
def test_dequantize_of_qwen(random_weight, assert_precise, shape: tuple[int, int], dtype: torch.dtype) -> None:
    parts = random_weight(*shape)
    exact = reference.dequantize(*parts, shape[1], torch.float64)
    assert_precise(dequantize_rows(None, *parts, shape[1], dtype), plain_dequantize(parts, shape[1], dtype), exact)


def every_code(bits: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [2^bits, 256] with every code at every position of two blocks, and their stream."""
    codes = (torch.arange(1 << bits)[:, None] * 3 + torch.arange(256)) % (1 << bits)
    assert all(len(column.unique()) == 1 << bits for column in codes.T)
    return codes.to(device), pack_codes(codes, bits).to(device)


@pytest.mark.parametrize("bits", range(2, 9))
def test_dequantize_every_code_at_every_position(device: torch.device, assert_precise, bits: int) -> None:
    _, packed = every_code(bits, device)
    parts = (packed, torch.ones(1 << bits, 2, device=device).half(), None, lloyd_max_levels(bits).to(device))
    exact = reference.dequantize(*parts, 256, torch.float64)
    actual = dequantize_rows(None, *parts, 256, torch.float32)
    assert_precise(actual, plain_dequantize(parts, 256, torch.float32), exact)


@pytest.mark.parametrize("bits", range(2, 9))
def test_matmul_reads_every_code_at_every_position(device: torch.device, bits: int) -> None:
    """With unit vectors for activations, the product is the levels themselves, exactly."""
    codes, packed = every_code(bits, device)
    table, norms = lloyd_max_levels(bits).to(device), torch.ones(1 << bits, 2, device=device).half()
    expected = table[codes].T
    for dtype in (torch.float32, torch.float16):
        out = matmul(torch.eye(256, device=device, dtype=dtype), packed, norms, table, None, dtype)
        assert torch.equal(out, expected.to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_zero_norms_give_exact_zeros(device: torch.device, random_weight, dtype: torch.dtype) -> None:
    packed, norms, scales, centroids = random_weight(37, 200)
    norms[5], norms[8, 1] = 0, 0
    parts = (packed, norms, scales, centroids)
    weight = dequantize_rows(None, *parts, 200, dtype)
    assert not weight[5].any()
    assert not weight[8, 128:].any()
    assert weight[8, :128].any()
    out = linear(torch.randn(3, 200, device=device).to(dtype), *parts, None)
    assert not out[:, 5].any()
    assert out[:, 8].all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_activations_stay_in_their_row(device: torch.device, random_weight, value: float) -> None:
    parts, x = random_weight(37, 200), torch.randn(20, 200, device=device)
    clean = linear(x, *parts, None)
    x[7, 150] = value
    out = linear(x, *parts, None)
    others = torch.arange(20) != 7
    assert torch.equal(out[others], clean[others])
    assert not out[7].isfinite().any()
    rotated = rotate(x, None)
    assert rotated[others].isfinite().all()
    assert rotated[7, :128].isfinite().all()
    assert not rotated[7, 128:].isfinite().any()


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
def test_large_fp16_activations(device: torch.device, random_weight, assert_precise) -> None:
    """A block of fp16 numbers can rotate to one beyond fp16; a dense layer's output is finite all the same."""
    packed, norms, _, centroids = random_weight(37, 128, awq=False)
    parts = (packed, norms * 0.01, None, centroids)
    x = torch.full((4, 128), 6000.0, device=device).half()
    measure = F.linear(x, reference.dequantize(*parts, 128, torch.float16))
    assert_precise(linear(x, *parts, None), measure, reference.linear(x.double(), *parts))


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", FLOATS)
def test_lookup(device: torch.device, random_weight, ids_dtype: torch.dtype, dtype: torch.dtype) -> None:
    parts = random_weight(37, 200)
    ids = torch.tensor([36, 0, 5, 5, *range(20), 36], dtype=ids_dtype, device=device)
    rows = dequantize_rows(ids, *parts, 200, dtype)
    assert torch.equal(rows, dequantize_rows(None, *parts, 200, dtype)[ids.long()])


@pytest.mark.parametrize("bad", [-1, 37, 2**31 - 1, -(2**31), 2**40])
def test_lookup_outside_the_table(device: torch.device, random_weight, bad: int) -> None:
    parts, ids = random_weight(37, 200), torch.tensor([3, 0, 36], device=device)
    ids[1] = bad
    rows = dequantize_rows(ids, *parts, 200, torch.float32)
    assert rows[1].isnan().all()
    assert torch.equal(rows[[0, 2]], dequantize_rows(None, *parts, 200, torch.float32)[[3, 36]])


@pytest.mark.gpu
def test_table_of_more_than_two_gigabytes(device: torch.device) -> None:
    rows, columns = 600_000, 4096
    packed = torch.zeros(rows, columns, dtype=torch.uint8, device=device)
    norms = torch.ones(rows, columns // 128, device=device).half()
    packed[-1] = torch.randint(0, 256, (columns,), dtype=torch.uint8, device=device)
    table = lloyd_max_levels(8).to(device)
    last = (packed[-1:].clone(), norms[-1:].clone(), None, table)
    ids = torch.tensor([rows - 1], device=device)
    row = dequantize_rows(ids, packed, norms, None, table, columns, torch.float32)
    assert torch.equal(row, dequantize_rows(None, *last, columns, torch.float32))
    x = torch.randn(2, columns, device=device)
    out = matmul(x, packed, norms, table, None, torch.float32)
    assert torch.equal(out[:, -1], matmul(x, *last[:2], table, None, torch.float32)[:, 0])


@pytest.mark.parametrize("dtype", FLOATS)
def test_empty_inputs(device: torch.device, random_weight, dtype: torch.dtype) -> None:
    parts, none = random_weight(37, 200), random_weight(0, 200)
    x = torch.empty(0, 200, dtype=dtype, device=device)
    assert rotate(x, parts[2]).shape == (0, 256)
    assert linear(x, *parts, None).shape == (0, 37)
    assert linear(torch.ones(3, 200, dtype=dtype, device=device), *none, None).shape == (3, 0)
    assert dequantize_rows(None, *none, 200, dtype).shape == (0, 200)
    assert dequantize_rows(torch.empty(0, dtype=torch.int64, device=device), *parts, 200, dtype).shape == (0, 200)
