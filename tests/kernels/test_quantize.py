"""quantize_weight against the formula of the format, worked out in fp64 by brute force."""

import math

import pytest
import torch

from polar_kernels import (
    ArgumentError,
    PolarWeight,
    QuantizationError,
    lloyd_max_levels,
    published_levels,
    quantize_weight,
    reference,
    unpack_codes,
)

FP16_HALF_ULP = 2**-11 * (1 + 1e-4)  # relative to the stored number, with room for the fp32 arithmetic before it


def rotated_blocks(weight: torch.Tensor, scales: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms [N, B] and coordinates z [N, B, 128] of the format's formula."""
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(128)] for i in range(128)]
    h = torch.tensor(signs, dtype=torch.float64, device=weight.device) / math.sqrt(128)
    scaled = weight.double() if scales is None else weight.double() * scales.double()
    padded = torch.zeros(weight.shape[0], -(-weight.shape[1] // 128) * 128, dtype=torch.float64, device=weight.device)
    padded[:, : weight.shape[1]] = scaled
    blocks = padded.view(weight.shape[0], -1, 128)
    norms = blocks.norm(dim=-1)
    return norms, math.sqrt(128) * (blocks / norms[..., None]) @ h


def dense(weight: PolarWeight) -> torch.Tensor:
    parts = (weight.packed, weight.norms, weight.awq_scales, weight.centroids)
    return reference.dequantize(*parts, weight.in_features, torch.float64)


def sphere_mse(levels: torch.Tensor) -> float:
    """Mean squared error at its nearest level of a coordinate uniform on the sphere of radius sqrt(128).

    N(0, 1) is its limit for long blocks; at 128 the sphere's error is up to 3 % lower.
    """
    z = torch.linspace(-math.sqrt(128), math.sqrt(128), 20_001, dtype=torch.float64)
    density = (1 - z.square() / 128).clamp_min(0) ** ((128 - 3) / 2)
    error = (z[:, None] - levels.double()).square().amin(1)
    return (torch.trapezoid(error * density, z) / torch.trapezoid(density, z)).item()


def same(a: PolarWeight, b: PolarWeight) -> bool:
    return torch.equal(a.packed, b.packed) and torch.equal(a.norms, b.norms) and a.in_features == b.in_features


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [64, 128, 200, 384])
def test_codes_are_nearest_levels(device: torch.device, bits: int, columns: int) -> None:
    weight = torch.randn(7, columns, device=device) * 0.02
    stored = quantize_weight(weight, bits, least_squares=False)
    norms, z = rotated_blocks(weight)
    assert ((stored.norms.double() - norms).abs() <= norms * FP16_HALF_ULP).all()
    distance = (z[..., None] - lloyd_max_levels(bits).to(device).double()).abs()
    codes = unpack_codes(stored.packed, bits).long().view(7, -1, 128)
    chosen = distance.gather(-1, codes[..., None]).squeeze(-1)
    # fp32 arithmetic may pick the other side where z lies within its rounding of a boundary.
    assert (chosen - distance.amin(-1)).max() < 2e-6
    assert (codes == distance.argmin(-1)).double().mean() > 0.999


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_float_dtype(device: torch.device, dtype: torch.dtype) -> None:
    weight = torch.randn(5, 256, device=device).to(dtype)
    assert same(quantize_weight(weight), quantize_weight(weight.float()))


def test_least_squares_scale(device: torch.device) -> None:
    weight = torch.randn(64, 1024, device=device)
    plain, fitted = quantize_weight(weight, least_squares=False), quantize_weight(weight)
    assert torch.equal(plain.packed, fitted.packed)
    norms, z = rotated_blocks(weight)
    levels = lloyd_max_levels(5).to(device).double()[unpack_codes(plain.packed, 5).long().view_as(z)]
    expected = norms * (z * levels).sum(-1) / levels.square().sum(-1)
    assert ((fitted.norms.double() - expected).abs() <= expected * FP16_HALF_ULP).all()


def test_least_squares_lowers_the_error(device: torch.device) -> None:
    weight = torch.randn(64, 1024, device=device)
    plain, fitted = quantize_weight(weight, least_squares=False), quantize_weight(weight)
    errors = [(dense(w) - weight.double()).view(64, 8, 128).square().sum(-1) for w in (plain, fitted)]
    # A block at its least-squares scale is at its minimum, but for that scale's rounding to fp16.
    mean_square = dense(fitted).view(64, 8, 128).square().sum(-1) / fitted.norms.double().square()
    rounding = (fitted.norms.double() * FP16_HALF_ULP).square() * mean_square
    assert (errors[1] <= errors[0] + rounding).all()
    assert errors[1].sum() < errors[0].sum() * 0.995


@pytest.mark.parametrize("table", [lloyd_max_levels, published_levels])
@pytest.mark.parametrize("bits", [2, 3, 5, 6, 8])
def test_error_is_that_of_a_normal_source(device: torch.device, relative_error, table, bits: int) -> None:
    weight = torch.randn(256, 4096, device=device)
    stored = quantize_weight(weight, bits, centroids=table(bits), least_squares=False)
    assert torch.equal(stored.centroids, table(bits).to(device))
    assert relative_error(dense(stored), weight) ** 2 == pytest.approx(sphere_mse(table(bits)), rel=0.01)


def test_outliers_cost_no_more(device: torch.device, relative_error) -> None:
    weight = torch.randn(64, 1024, device=device) * torch.randn(1024, device=device).exp()
    assert relative_error(dense(quantize_weight(weight)), weight) ** 2 < 0.0026


def test_awq_scales_are_rounded_before_use(device: torch.device, relative_error) -> None:
    scales = torch.rand(384, device=device) * 3 + 0.1
    weight = torch.randn(32, 384, device=device)
    stored = quantize_weight(weight, awq_scales=scales, least_squares=False)
    assert torch.equal(stored.awq_scales, scales.half())
    norms, _ = rotated_blocks(weight, scales.half())
    assert ((stored.norms.double() - norms).abs() <= norms * FP16_HALF_ULP).all()
    assert relative_error(dense(stored) * scales.half().double(), weight * scales.half()) ** 2 < 0.0026


@pytest.mark.parametrize("rows", [0, 1, 13])
@pytest.mark.parametrize("columns", [1, 100, 128, 129, 500])
@pytest.mark.parametrize("bits", [3, 5, 8])
def test_odd_shapes(device: torch.device, relative_error, rows: int, columns: int, bits: int) -> None:
    weight = torch.randn(rows, columns, device=device)
    stored = quantize_weight(weight, bits)
    blocks = -(-columns // 128)
    assert stored.packed.shape == (rows, blocks * 16 * bits)
    assert stored.norms.shape == (rows, blocks)
    assert (stored.in_features, stored.out_features, stored.bits) == (columns, rows, bits)
    # Of a block with k real columns, the error in them is k / 128 of the block's at most in the mean.
    assert rows == 0 or relative_error(dense(stored), weight) < {3: 0.2, 5: 0.06, 8: 0.01}[bits]


@pytest.mark.parametrize("least_squares", [False, True])
def test_zeros_stay_zeros(device: torch.device, least_squares: bool) -> None:
    weight = torch.randn(4, 300, device=device)
    weight[1] = 0
    weight[2, 128:256] = 0
    weight[3, 256:] = 0
    stored = quantize_weight(weight, awq_scales=torch.full((300,), 0.5), least_squares=least_squares)
    assert stored.norms.isfinite().all()
    assert torch.equal(stored.norms == 0, torch.tensor([[0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1]]).bool().to(device))
    restored = dense(stored)
    assert restored.isfinite().all()
    assert not restored[1].any()
    assert not restored[2, 128:256].any()
    assert not restored[3, 256:].any()


def test_a_zero_weight(device: torch.device) -> None:
    stored = quantize_weight(torch.zeros(3, 256, device=device))
    assert not stored.norms.any()
    assert torch.equal(dense(stored), torch.zeros(3, 256, dtype=torch.float64, device=device))


@pytest.mark.parametrize("chunk", [1, 300, 900])
def test_row_chunks_change_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    weight, scales = torch.randn(11, 300, device=device), torch.rand(300) + 0.5
    whole = quantize_weight(weight, awq_scales=scales)
    monkeypatch.setattr("polar_kernels.quantize._CHUNK", chunk)
    assert same(quantize_weight(weight, awq_scales=scales), whole)


def test_non_contiguous_weight(device: torch.device) -> None:
    weight = torch.randn(256, 9, device=device).T
    stored = quantize_weight(weight)
    assert same(stored, quantize_weight(weight.contiguous()))
    assert stored.packed.is_contiguous()


def test_stored_dtypes_and_device(device: torch.device) -> None:
    stored = quantize_weight(torch.randn(3, 128, device=device), awq_scales=torch.ones(128))
    parts = (stored.packed, stored.norms, stored.awq_scales, stored.centroids)
    assert [part.dtype for part in parts] == [torch.uint8, torch.float16, torch.float16, torch.float32]
    assert {part.device.type for part in parts} == {device.type}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_element(device: torch.device, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    weight = torch.randn(9, 200, device=device)
    weight[7, 150] = value
    monkeypatch.setattr("polar_kernels.quantize._CHUNK", 400)
    with pytest.raises(QuantizationError, match=rf"1 NaN or infinite elements, the first at \[7, 150\] = {value}"):
        quantize_weight(weight)


def test_norm_beyond_fp16(device: torch.device) -> None:
    weight = torch.randn(4, 384, device=device)
    weight[2, 200] = 7e4
    with pytest.raises(QuantizationError, match=r"\[2, 200\]|row 2, block 1 is beyond fp16"):
        quantize_weight(weight)


@pytest.mark.parametrize("element", [3e38, 1e30])
def test_scaled_weight_beyond_fp32(device: torch.device, element: float) -> None:
    """The weight and its scales are finite and their product or its norm is not."""
    weight = torch.randn(4, 384, device=device)
    weight[2, 200] = element
    with pytest.raises(QuantizationError, match=r"\[2, 200\]|row 2, block 1 is beyond fp16"):
        quantize_weight(weight, awq_scales=torch.full((384,), 1000.0))


def test_largest_norm_of_fp16(device: torch.device, relative_error) -> None:
    weight = torch.randn(4, 256, device=device)
    weight *= 65000 / weight.view(4, 2, 128).norm(dim=-1).max()
    stored = quantize_weight(weight, least_squares=False)
    assert stored.norms.max() == 65000
    assert relative_error(dense(stored), weight) ** 2 < 0.0035  # 0.0025 on average; this weight is small


@pytest.mark.parametrize("scale", [1e-7, 1e-9, 1e-30])
def test_norms_too_small_for_fp16(device: torch.device, scale: float) -> None:
    with pytest.raises(QuantizationError, match="too small for fp16"):
        quantize_weight(torch.randn(8, 256, device=device) * scale)


def test_dead_rows_among_normal_ones(device: torch.device) -> None:
    weight = torch.randn(16, 256, device=device)
    weight[[3, 8]] *= 1e-30
    restored = dense(quantize_weight(weight))
    assert not restored[[3, 8]].any()
    assert restored[[2, 4, 7, 9]].any(1).all()


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, 7e4, 1e-9])
def test_bad_awq_scale(device: torch.device, value: float) -> None:
    scales = torch.ones(256, device=device)
    scales[5] = value
    with pytest.raises(ArgumentError, match=r"awq_scales must be finite and positive in fp16; found .* at \[5\]"):
        quantize_weight(torch.randn(2, 256, device=device), awq_scales=scales)


@pytest.mark.parametrize("shape", [(255,), (257,), (1, 256), ()])
def test_awq_scales_of_wrong_shape(device: torch.device, shape: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match=r"awq_scales must have shape \[256\]"):
        quantize_weight(torch.randn(2, 256, device=device), awq_scales=torch.ones(shape, device=device))


@pytest.mark.parametrize(
    "table",
    [
        [0.0, 1.0, 3.0, 2.0],
        [0.0, 1.0, 1.0, 2.0],
        [0.0, 1.0, math.nan, 2.0],
        [0.0, 1.0, 2.0, math.inf],
        [0.0, 1.0, 2.0],
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
        [[0.0, 1.0], [2.0, 3.0]],
        [0.0, 1.0],
        [],
    ],
)
def test_bad_table(device: torch.device, table: list) -> None:
    with pytest.raises(ArgumentError, match="centroids must"):
        quantize_weight(torch.randn(2, 128, device=device), 2, centroids=torch.tensor(table, device=device))


@pytest.mark.parametrize("bits", [1, 9, True, 5.0, "5"])
@pytest.mark.parametrize("centroids", [None, lloyd_max_levels(5)])
def test_wrong_bits(device: torch.device, bits: object, centroids: torch.Tensor | None) -> None:
    with pytest.raises(ArgumentError, match=r"bits must be|levels at"):
        quantize_weight(torch.randn(2, 128, device=device), bits, centroids=centroids)


@pytest.mark.parametrize("weight", [torch.zeros(128), torch.zeros(1, 2, 128), torch.zeros(2, 128, dtype=torch.int64)])
def test_wrong_weight(weight: torch.Tensor) -> None:
    with pytest.raises(ArgumentError, match="weight must be a 2-D float tensor"):
        quantize_weight(weight)


def test_the_shared_table_is_not_handed_out(device: torch.device) -> None:
    """Writing into a weight's table, as loading a state dict does, must not change the table of later weights."""
    expected = lloyd_max_levels(5).clone()
    stored = quantize_weight(torch.randn(2, 128, device=device))
    stored.centroids.mul_(2)
    changed = lloyd_max_levels(5).clone()
    lloyd_max_levels(5).copy_(expected)
    assert torch.equal(changed, expected)
