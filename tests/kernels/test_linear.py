"""PolarLinear as a drop-in for nn.Linear."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from polar_kernels import (
    ArgumentError,
    NoDenseWeightError,
    PolarLinear,
    lloyd_max_levels,
    published_levels,
    quantize_weight,
    reference,
)
from polar_kernels.checks import FLOATS

N, K = 37, 200
STORED = {
    "packed": torch.uint8,
    "norms": torch.float16,
    "awq_scales": torch.float16,
    "centroids": torch.float32,
}


@pytest.fixture
def linear(device: torch.device) -> nn.Linear:
    return nn.Linear(K, N, device=device)


@pytest.fixture
def layer(linear: nn.Linear) -> PolarLinear:
    """Of a table without tiles, so that its buffers are the stored ones on a GPU too; test_tiled.py has the others."""
    table = lloyd_max_levels(5) + 0.01
    return PolarLinear.from_linear(linear, awq_scales=torch.rand(K) + 0.5, centroids=table)


def exact(layer: PolarLinear, x: torch.Tensor) -> torch.Tensor:
    weight = layer.polar_weight
    parts = (weight.packed, weight.norms, weight.awq_scales, weight.centroids)
    return reference.linear(x.double(), *parts, layer.bias)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_from_linear(device: torch.device, relative_error, rounding, bits: int, bias: bool, dtype: torch.dtype) -> None:
    linear = nn.Linear(K, N, bias=bias, device=device, dtype=dtype)
    layer = PolarLinear.from_linear(linear, bits)
    layer.activation = "exact"
    stored = quantize_weight(linear.weight.detach(), bits)
    assert torch.equal(layer.polar_weight.packed, stored.packed)
    assert torch.equal(layer.polar_weight.norms, stored.norms)
    assert (layer.in_features, layer.out_features, layer.bits) == (K, N, bits)
    assert (layer.bias is not None) == bias
    x = torch.randn(9, K, device=device).to(dtype)
    assert layer(x).dtype == dtype
    assert relative_error(layer(x), exact(layer, x)) < rounding[dtype]


def test_output_approximates_the_dense_layer(device: torch.device, linear: nn.Linear, layer: PolarLinear) -> None:
    x = torch.randn(64, K, device=device)
    error = (layer(x) - linear(x)).square().mean() / linear(x).square().mean()
    assert error < 0.004


@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (0,), (2, 0), (1, 1, 4)])
def test_leading_shapes(
    device: torch.device, layer: PolarLinear, relative_error, rounding, lead: tuple[int, ...]
) -> None:
    x = torch.randn(*lead, K, device=device)
    out = layer(x)
    assert out.shape == (*lead, N)
    assert not x.numel() or relative_error(out, exact(layer, x)) < rounding[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(device: torch.device, layer: PolarLinear, dtype: torch.dtype) -> None:
    x = torch.randn(3, K, device=device)
    with torch.autocast(device.type, dtype):
        out = layer(x)
    assert out.dtype == dtype
    assert torch.equal(out, layer(x.to(dtype)))
    with torch.autocast(device.type, dtype, enabled=False):
        assert layer(x).dtype == torch.float32


def test_autocast_does_not_reach_the_arithmetic(device: torch.device, layer: PolarLinear) -> None:
    expected = layer.dequantize(torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(layer.dequantize(torch.float32), expected)


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to bfloat16": lambda module: module.to(torch.bfloat16),
    "to device and dtype": lambda module: module.to("cpu", torch.float16),
    "bfloat16": nn.Module.bfloat16,
    "half": nn.Module.half,
    "float": nn.Module.float,
    "double": nn.Module.double,
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts_keep_what_is_stored(layer: PolarLinear, cast: str) -> None:
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    expected = CASTS[cast](nn.Linear(1, 1)).bias.dtype
    assert CASTS[cast](layer) is layer
    assert layer.bias.dtype == expected
    assert isinstance(layer.bias, nn.Parameter)
    for name, dtype in STORED.items():
        tensor = getattr(layer, name)
        assert tensor.dtype == dtype
        assert torch.equal(tensor.cpu(), before[name].cpu())


def test_casts_inside_a_model(layer: PolarLinear) -> None:
    model = nn.Sequential(nn.Linear(K, K), layer).to(torch.bfloat16)
    assert model[0].weight.dtype == torch.bfloat16
    assert {name: getattr(layer, name).dtype for name in STORED} == STORED


def test_empty_copies_of_a_meta_layer(device: torch.device, layer: PolarLinear) -> None:
    """How large models are loaded: built on meta, materialised, filled."""
    fresh = PolarLinear(K, N, awq=True, device="meta")
    assert {tensor.device.type for tensor in fresh.state_dict().values()} == {"meta"}
    fresh.to_empty(device=device).load_state_dict(layer.state_dict())
    x = torch.randn(3, K, device=device)
    assert torch.equal(fresh(x), layer(x))


def test_a_meta_layer_runs(layer: PolarLinear) -> None:
    out = layer.to("meta")(torch.empty(4, K, device="meta"))
    assert (out.shape, out.device.type) == ((4, N), "meta")


def test_a_layer_built_under_a_meta_context(layer: PolarLinear, device: torch.device) -> None:
    lloyd_max_levels.cache_clear()
    try:
        with torch.device("meta"):
            fresh = PolarLinear(K, N, awq=True)
        assert fresh.packed.device.type == "meta"
        assert lloyd_max_levels(5).device.type == "cpu"
    finally:
        lloyd_max_levels.cache_clear()
    fresh.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, K, device=device)
    assert torch.equal(fresh(x), layer(x))


@pytest.mark.parametrize("awq", [False, True])
@pytest.mark.parametrize("table", [lloyd_max_levels, published_levels])
def test_state_dict_round_trip(device: torch.device, linear: nn.Linear, table, awq: bool) -> None:
    scales = torch.rand(K) + 0.5 if awq else None
    layer = PolarLinear.from_linear(linear, 6, awq_scales=scales, centroids=table(6))
    state = layer.state_dict()
    assert set(state) == {"packed", "norms", "centroids", "bias"} | ({"awq_scales"} if awq else set())
    fresh = PolarLinear(K, N, bits=6, awq=awq, device=device)
    assert fresh.load_state_dict(state) == ([], [])
    assert torch.equal(fresh.centroids, table(6).to(device))
    x = torch.randn(3, K, device=device)
    assert torch.equal(fresh(x), layer(x))


def test_loading_changes_no_other_layer(device: torch.device, linear: nn.Linear) -> None:
    expected = lloyd_max_levels(5).clone()
    other = PolarLinear.from_linear(linear)
    target = PolarLinear.from_linear(linear)
    target.load_state_dict(PolarLinear.from_linear(linear, centroids=published_levels(5)).state_dict())
    seen = lloyd_max_levels(5).clone(), other.centroids.cpu().clone()
    lloyd_max_levels(5).copy_(expected)  # for the tests that follow, should this one fail
    assert torch.equal(seen[0], expected)
    assert torch.equal(seen[1], expected)


@pytest.mark.parametrize("missing", ["packed", "norms", "awq_scales", "centroids", "bias"])
def test_missing_key(device: torch.device, layer: PolarLinear, missing: str) -> None:
    state = {key: value for key, value in layer.state_dict().items() if key != missing}
    with pytest.raises(RuntimeError, match=f'Missing key\\(s\\) in state_dict: "{missing}"'):
        PolarLinear(K, N, awq=True, device=device).load_state_dict(state)


def test_unexpected_scales_and_wrong_bits(device: torch.device, layer: PolarLinear) -> None:
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "awq_scales"'):
        PolarLinear(K, N, device=device).load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for packed"):
        PolarLinear(K, N, awq=True, bits=4, device=device).load_state_dict(layer.state_dict())


def test_a_fresh_layer_is_zero(device: torch.device) -> None:
    layer = PolarLinear(K, N, device=device)
    assert torch.equal(layer(torch.randn(3, K, device=device)), torch.zeros(3, N, device=device))
    assert PolarLinear(K, N, bias=False).bias is None
    assert PolarLinear(K, N, dtype=torch.float16).bias.dtype == torch.float16


def test_no_dense_weight(layer: PolarLinear) -> None:
    with pytest.raises(NoDenseWeightError, match=r"5-bit codes and no dense weight: call \.dequantize"):
        _ = layer.weight
    assert not hasattr(layer, "weight")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = layer.nothing


@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantize(layer: PolarLinear, relative_error, rounding, dtype: torch.dtype) -> None:
    weight = layer.dequantize(dtype)
    assert (weight.dtype, weight.shape) == (dtype, (N, K))
    parts = (layer.packed, layer.norms, layer.awq_scales, layer.centroids)
    assert relative_error(weight, reference.dequantize(*parts, K, torch.float64)) < rounding[dtype]
    assert layer.dequantize().dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("table", ["tiled", "stored"])
def test_dequantize_into(
    device: torch.device, layer: PolarLinear, relative_error, rounding, table: str, dtype: torch.dtype
) -> None:
    if table == "tiled":
        layer = PolarLinear.from_linear(nn.Linear(K, N, device=device))
    out = torch.full((N, K), torch.nan, device=device, dtype=dtype)
    assert layer.dequantize_into(out) is out
    assert torch.equal(out, layer.dequantize(dtype))
    shifted = torch.empty(N * K + 1, device=device, dtype=dtype)[1:].view(N, K)  # not where 16 bytes begin
    # From tiles another kernel writes there, whose roundings are others.
    assert relative_error(layer.dequantize_into(shifted), out) < 2 * rounding[dtype]


def test_dequantize_into_something_wrong(device: torch.device, layer: PolarLinear) -> None:
    for out, found in (
        (torch.empty(N, K, device=device, dtype=torch.float64), "out must be float16"),
        (torch.empty(N, K + 1, device=device), r"must be .*200|awq_scales must be"),
        (torch.empty(N + 1, K, device=device), r"out must be \[37, K\]"),
        (torch.empty(K, N, device=device).T, "out must be contiguous"),
        (torch.empty(N, K, device="meta"), "out is on meta"),
    ):
        with pytest.raises(ArgumentError, match=found):
            layer.dequantize_into(out)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies(device: torch.device, layer: PolarLinear, duplicate) -> None:
    twin, x = duplicate(layer), torch.randn(3, K, device=device)
    assert torch.equal(twin(x), layer(x))
    assert {name: getattr(twin, name).dtype for name in STORED} == STORED
    assert all(getattr(twin, name).data_ptr() != getattr(layer, name).data_ptr() for name in STORED)
    assert not hasattr(twin, "weight")


def test_flags_follow_the_linear(linear: nn.Linear) -> None:
    linear.bias.requires_grad_(False)
    layer = PolarLinear.from_linear(linear.eval())
    assert not layer.training
    assert not layer.bias.requires_grad
    assert PolarLinear.from_linear(linear.train()).training


def test_gradients_of_input_and_bias(device: torch.device, layer: PolarLinear, relative_error) -> None:
    x = torch.randn(4, K, device=device, requires_grad=True)
    layer(x).sum().backward()
    expected = layer.dequantize(torch.float32).sum(0).expand(4, K)
    assert relative_error(x.grad, expected) < 1e-6
    assert torch.equal(layer.bias.grad, torch.full_like(layer.bias, 4))
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_training_after_a_first_use_in_inference_mode(device: torch.device, linear: nn.Linear) -> None:
    lloyd_max_levels.cache_clear()
    try:
        with torch.inference_mode():
            PolarLinear.from_linear(linear)
        layer = PolarLinear.from_linear(linear)
        layer(torch.randn(2, K, device=device)).sum().backward()
        assert torch.equal(layer.bias.grad, torch.full_like(layer.bias, 2))
    finally:
        lloyd_max_levels.cache_clear()


def test_from_weight_shares_tensors() -> None:
    stored = quantize_weight(torch.randn(N, K))
    layer = PolarLinear.from_weight(stored)
    assert layer.packed is stored.packed
    assert layer.polar_weight.packed is stored.packed
    assert layer.polar_weight.nbytes == N * (160 + 4)
    assert layer.bias is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_wrong_input(device: torch.device, layer: PolarLinear, dtype: torch.dtype) -> None:
    with pytest.raises(ArgumentError, match="x must be float16"):
        layer(torch.ones(3, K, device=device, dtype=dtype))
    with pytest.raises(ArgumentError, match="x has 199 features"):
        layer(torch.ones(3, K - 1, device=device))


def test_repr(layer: PolarLinear) -> None:
    assert repr(layer) == "PolarLinear(in_features=200, out_features=37, bias=True, bits=5, awq=True, activation=int8)"


def test_bytes_of_a_layer(device: torch.device) -> None:
    """5 bits a code and 16 a block of 128, and never a dense weight."""
    layer = PolarLinear(1024, 512, bias=False, device=device)
    tensors = [*layer.buffers(), *layer.parameters()]
    table = layer.centroids.nbytes
    assert sum(tensor.nbytes for tensor in tensors) - table == 1024 * 512 * (5 + 16 / 128) / 8


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64])
def test_memory_of_a_forward(device: torch.device, rows: int) -> None:
    """Apart from the layer itself, a call holds rotated activations, outputs and, of many rows, partial sums."""
    layer = PolarLinear(4096, 8192, bias=False, device=device)
    x = torch.randn(rows, 4096, device=device).half()
    layer(x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layer(x)
    used = torch.cuda.max_memory_allocated() - before
    partial_sums = 4 * rows * 8192 * 4 if rows > 16 else 0
    assert used <= 1.1 * x.nbytes + rows * 8192 * 2 + partial_sums + 4096
    assert used + sum(buffer.nbytes for buffer in layer.buffers()) < 4096 * 8192 * 2


@pytest.mark.gpu
def test_from_linear_stays_on_the_gpu(layer: PolarLinear) -> None:
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"cuda"}
    assert {tensor.device.type for tensor in layer.cpu().state_dict().values()} == {"cpu"}


@pytest.mark.gpu
def test_cpu_and_gpu_agree(layer: PolarLinear, relative_error, rounding) -> None:
    x = torch.randn(5, K)
    on_gpu = layer(x.cuda()).cpu()
    assert relative_error(on_gpu, layer.cpu()(x)) < rounding[torch.float32]
