"""Codes and norms chosen for the error of a layer's outputs."""

import pytest
import torch

from polar_kernels import ArgumentError, PolarWeight, QuantizationError, feedback, quantize_weight, reference
from polar_kernels import quantize as quantize_module
from polar_kernels.codebook import lloyd_max_levels

N, K = 60, 300


@pytest.fixture
def inputs(device: torch.device) -> torch.Tensor:
    """Correlated activations, one channel of them large."""
    x = torch.randn(2000, 40, device=device) @ torch.randn(40, K, device=device)
    x += 0.3 * torch.randn(2000, K, device=device)
    x[:, 5] *= 20
    return x


@pytest.fixture
def weight(device: torch.device) -> torch.Tensor:
    return torch.randn(N, K, device=device)


def moments_of(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def dense(quantized: PolarWeight) -> torch.Tensor:
    parts = (quantized.packed, quantized.norms, quantized.awq_scales, quantized.centroids)
    return reference.dequantize(*parts, quantized.in_features, torch.float64)


def row_costs(quantized: PolarWeight, weight: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    error = dense(quantized) - weight.double()
    return ((error @ moments.double()) * error).sum(1)


@pytest.mark.parametrize("awq", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_the_outputs_are_much_closer(inputs, weight, relative_error, bits: int, awq: bool) -> None:
    scales = torch.rand(K) + 0.5 if awq else None
    outputs = weight.double() @ inputs.double().T
    plain, fed = (
        quantize_weight(weight, bits, awq_scales=scales, moments=moments) for moments in (None, moments_of(inputs))
    )
    assert fed.norms.dtype == plain.norms.dtype
    assert fed.packed.shape == plain.packed.shape
    before, after = (relative_error(dense(q) @ inputs.double().T, outputs) for q in (plain, fed))
    assert after < before / 5


@pytest.mark.parametrize("bits", [3, 5])
def test_no_row_is_worse(inputs, weight, bits: int) -> None:
    for moments in (moments_of(inputs), torch.eye(K, device=weight.device), torch.rand(K, device=weight.device).diag()):
        plain, fed = quantize_weight(weight, bits), quantize_weight(weight, bits, moments=moments)
        assert (
            row_costs(fed, weight, moments) <= 1.02 * row_costs(plain, weight, moments)
        ).all()  # damping is not cost


def test_moments_may_have_any_factor(inputs, weight) -> None:
    """A power of two, so that every rounding is the same."""
    one, other = (quantize_weight(weight, 4, moments=f * moments_of(inputs)) for f in (1.0, 2.0**-20))
    assert torch.equal(one.packed, other.packed)
    assert torch.equal(one.norms, other.norms)


def test_rows_in_parts_are_the_same(inputs, weight, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantize_weight(weight, 3, moments=moments_of(inputs))
    monkeypatch.setattr(quantize_module, "_CHUNK", 7 * K)
    parts = quantize_weight(weight, 3, moments=moments_of(inputs))
    assert (whole.packed != parts.packed).float().mean() < 0.01  # sums of another shape round differently
    assert torch.allclose(dense(whole), dense(parts), atol=0.5)


@pytest.mark.parametrize("seen", [1, 30])
def test_too_few_inputs_for_the_channels(inputs, weight, seen: int) -> None:
    moments = moments_of(inputs[:seen])
    fed = quantize_weight(weight, 5, moments=moments)
    assert dense(fed).isfinite().all()
    assert row_costs(fed, weight, moments).sum() < 0.1 * row_costs(quantize_weight(weight, 5), weight, moments).sum()


def test_dead_channels(inputs, weight, relative_error) -> None:
    inputs[:, 100:200] = 0
    fed = quantize_weight(weight, 5, moments=moments_of(inputs))
    assert dense(fed).isfinite().all()
    assert relative_error(dense(fed), weight) < 0.2


def test_zeros_stay_zeros(inputs, weight) -> None:
    weight[3] = 0
    weight[:, 128:256] = 0
    fed = dense(quantize_weight(weight, 5, moments=moments_of(inputs)))
    assert not fed[3].any()
    assert not fed[:, 128:256].any()


def test_twice_gives_the_same(inputs, weight) -> None:
    one, other = (quantize_weight(weight, 5, moments=moments_of(inputs)) for _ in range(2))
    assert torch.equal(one.packed, other.packed)
    assert torch.equal(one.norms, other.norms)


def test_moments_that_are_none(inputs, weight) -> None:
    good = moments_of(inputs)
    spoilt = good.clone()
    spoilt[2, 7] = torch.nan
    for moments, kind, message in (
        (good[:-1], ArgumentError, r"moments must be float \[300, 300\], found torch.float32 \[299, 300\]"),
        (good.long(), ArgumentError, "found torch.int64"),
        (spoilt, QuantizationError, "NaN or infinite elements, or are all zero"),
        (torch.zeros_like(good), QuantizationError, "NaN or infinite elements, or are all zero"),
        (good - 1000 * good.diagonal().mean() * torch.ones_like(good), QuantizationError, "all zero|semi-definite"),
    ):
        with pytest.raises(kind, match=message):
            quantize_weight(weight, 5, moments=moments)


def test_norms_that_fp16_cannot_hold(inputs, weight) -> None:
    with pytest.raises(QuantizationError, match="beyond fp16"):
        quantize_weight(weight * 1e5, 5, moments=moments_of(inputs))
    with pytest.raises(QuantizationError, match="too small for fp16"):
        quantize_weight(weight * 1e-9, 5, moments=moments_of(inputs))


@pytest.mark.parametrize(("bits", "swept"), [(3, True), (5, False)])
def test_the_kernel_settles_columns_as_torch_does(device: torch.device, bits: int, swept: bool) -> None:
    from polar_kernels.kernels.settle import settle as settle_in_kernel

    table = lloyd_max_levels(bits).to(device)
    targets, before = torch.randn(2, 13, 128, device=device)
    scales = torch.rand(13, 128, device=device) + 0.5
    scales[5] = 0
    coupling = 0.05 * torch.randn(128, 128, device=device)
    coupling = coupling - coupling.diagonal().diag() if swept else coupling.triu(1)
    given = before if swept else None
    expected_targets, found_targets = targets.to("cpu", copy=True), targets.clone()
    expected = feedback.settle(
        expected_targets, given if given is None else given.cpu(), scales.cpu(), coupling.cpu(), table.cpu()
    )
    found = settle_in_kernel(found_targets, given, scales, coupling, table)
    same = (found.cpu() == expected).all(1)
    assert same.float().mean() > 0.8  # a sum rounded otherwise may tip a code, and with it the row
    assert torch.allclose(found_targets.cpu()[same], expected_targets[same], atol=1e-4)
    assert not torch.equal(expected_targets, targets.cpu())
