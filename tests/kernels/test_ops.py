"""torch.ops.polar as operators: fakes, compile, export, gradients, argument errors, CUDA graphs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from polar_kernels import ArgumentError, PolarLinear, PolarWeight, ops, reference
from polar_kernels.checks import FLOATS

N, K = 37, 200
OPERATORS = {"linear": ops.linear, "rotate": ops.rotate, "dequantize": ops.dequantize, "embedding": ops.embedding}
NAMES = tuple(OPERATORS)
WEIGHT_NAMES = ("linear", "dequantize", "embedding")


@pytest.fixture
def arguments(device: torch.device, random_weight) -> Callable[..., dict[str, Any]]:
    """Builds an operator's arguments by name, `rows` activations or ids."""

    def build(name: str, rows: int = 6, dtype: torch.dtype = torch.float16) -> dict[str, Any]:
        packed, norms, scales, centroids = random_weight(N, K)
        weight = {"packed": packed, "norms": norms, "awq_scales": scales, "centroids": centroids}
        x = torch.randn(rows, K, device=device).to(dtype)
        if name == "rotate":
            return {"x": x, "awq_scales": scales}
        if name == "linear":
            return {"x": x, **weight, "bias": torch.randn(N, device=device).to(dtype)}
        if name == "dequantize":
            return {**weight, "in_features": K, "dtype": dtype}
        ids = torch.randint(0, N, (rows,), device=device)
        return {"ids": ids, **weight, "embedding_dim": K, "dtype": dtype}

    return build


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("optional", [False, True])
def test_opcheck(arguments, name: str, optional: bool) -> None:
    given = arguments(name)
    if not optional:
        given.update({key: None for key in ("awq_scales", "bias") if key in given})
    torch.library.opcheck(OPERATORS[name], tuple(given.values()))


def test_opcheck_with_gradients(arguments) -> None:
    given = arguments("linear", dtype=torch.float32)
    given["x"].requires_grad_()
    given["bias"].requires_grad_()
    torch.library.opcheck(ops.linear, tuple(given.values()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_results_equal_the_reference(arguments, relative_error, rounding, name: str, dtype: torch.dtype) -> None:
    given = arguments(name, dtype=dtype)
    exact = {key: torch.float64 if key == "dtype" else value for key, value in given.items()}
    if "x" in exact:
        exact["x"] = exact["x"].double()
    actual = OPERATORS[name](**given)
    assert actual.dtype == dtype
    assert relative_error(actual, getattr(reference, name)(**exact)) < rounding[dtype]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lead", [(), (0,), (4,), (2, 3)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_fakes_agree(arguments, name: str, lead: tuple[int, ...], dtype: torch.dtype) -> None:
    given = arguments(name, rows=1, dtype=dtype)
    if "x" in given:
        given["x"] = given["x"][0].expand(*lead, K)
    if "ids" in given:
        given["ids"] = given["ids"][0].expand(lead)
    real = OPERATORS[name](**given)
    with FakeTensorMode() as mode:
        fakes = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        fake = OPERATORS[name](**fakes)
    assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)
    assert fake.stride() == real.stride()
    meta = OPERATORS[name](**{k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in given.items()})
    assert (meta.shape, meta.dtype, meta.device.type) == (real.shape, real.dtype, "meta")


@pytest.mark.parametrize(("name", "backend"), [*((name, "aot_eager") for name in NAMES), ("linear", "inductor")])
def test_compile_with_a_dynamic_batch(arguments, name: str, backend: str) -> None:
    """One graph, without breaks, for all batch sizes."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)

    def function(**given: Any) -> torch.Tensor:
        return OPERATORS[name](**given) * 2

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for rows in (6, 3, 11):
        given = arguments(name, rows)
        assert torch.equal(compiled(**given), function(**given))
    assert counter.frame_count == 1


class TwoLayers(nn.Module):
    def __init__(self, first: PolarLinear, second: PolarLinear) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.fixture
def two_layers(device: torch.device, random_weight) -> TwoLayers:
    first = PolarLinear.from_weight(PolarWeight(*random_weight(N, K), K), torch.randn(N, device=device))
    return TwoLayers(first, PolarLinear.from_weight(PolarWeight(*random_weight(9, N, awq=False), N))).eval()


def test_export(device: torch.device, two_layers: TwoLayers) -> None:
    x = torch.randn(4, K, device=device)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(two_layers, (x,), dynamic_shapes=({0: batch},))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(ops.linear) + targets.count(ops.tiled_linear) == 2
    held = program.state_dict | program.constants
    assert held["first.tiles" if "first.tiles" in held else "first.packed"].dtype in (torch.uint8, torch.int32)
    for rows in (4, 7):
        x = torch.randn(rows, K, device=device)
        assert torch.equal(program.module()(x), two_layers(x))


def replaced(key: str, change: Callable[[torch.Tensor], object]) -> Callable[[dict], dict]:
    return lambda given: {**given, key: change(given[key])}


def strided(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.repeat_interleave(2, -1)[..., ::2]


WRONG = {
    "x float64": ("linear", replaced("x", torch.Tensor.double), "x must be float16"),
    "x int": ("linear", replaced("x", torch.Tensor.long), "x must be float16"),
    "x scalar": ("linear", replaced("x", torch.Tensor.sum), "x must have at least one dimension"),
    "x columns": ("linear", replaced("x", lambda x: x[:, :-1]), "x has 199 features but awq_scales"),
    "x on meta": ("linear", replaced("x", lambda x: x.to("meta")), "is on .* but should be on meta"),
    "bias shape": ("linear", replaced("bias", lambda b: b[:-1]), r"bias must be float \[37\]"),
    "bias int": ("linear", replaced("bias", torch.Tensor.int), r"bias must be float \[37\]"),
    "bias on meta": ("linear", replaced("bias", lambda b: b.to("meta")), "bias is on meta but should be on"),
    "rotate int": ("rotate", replaced("x", torch.Tensor.int), "x must be float16"),
    "rotate scalar": ("rotate", replaced("x", torch.Tensor.sum), "x must have at least one dimension"),
    "rotate scales": ("rotate", replaced("awq_scales", lambda s: s[:-1]), "awq_scales has shape"),
    "rotate on meta": ("rotate", replaced("x", lambda x: x.to("meta")), "awq_scales is on"),
    "dequantize dtype": ("dequantize", replaced("dtype", lambda _: torch.float64), "dtype must be float16"),
    "dequantize columns": ("dequantize", replaced("in_features", lambda _: 300), "packed must be"),
    "dequantize scales": ("dequantize", replaced("in_features", lambda _: 201), "awq_scales must be"),
    "ids float": ("embedding", replaced("ids", torch.Tensor.float), "ids must be int32 or int64"),
    "ids int16": ("embedding", replaced("ids", torch.Tensor.short), "ids must be int32 or int64"),
    "ids on meta": ("embedding", replaced("ids", lambda i: i.to("meta")), "ids is on meta"),
    "embedding dtype": ("embedding", replaced("dtype", lambda _: torch.int64), "dtype must be float16"),
    "embedding columns": ("embedding", replaced("embedding_dim", lambda _: 300), "packed must be"),
}
WRONG_WEIGHT = {
    "packed dtype": (replaced("packed", torch.Tensor.char), "packed must be torch.uint8"),
    "packed columns": (replaced("packed", lambda p: p[:, :-1].contiguous()), "packed must be torch.uint8"),
    "packed 1-D": (replaced("packed", torch.Tensor.flatten), "packed must be torch.uint8"),
    "packed strided": (replaced("packed", strided), "packed must be contiguous"),
    "norms dtype": (replaced("norms", torch.Tensor.float), "norms must be torch.float16"),
    "norms rows": (replaced("norms", lambda n: n[:-1]), "norms must be torch.float16"),
    "norms columns": (replaced("norms", lambda n: n[:, :1].contiguous()), "norms must be torch.float16"),
    "norms strided": (replaced("norms", strided), "norms must be contiguous"),
    "scales dtype": (replaced("awq_scales", torch.Tensor.float), "awq_scales must be torch.float16"),
    "scales strided": (replaced("awq_scales", strided), "awq_scales must be contiguous"),
    "centroids dtype": (replaced("centroids", torch.Tensor.double), "centroids must be torch.float32"),
    "centroids count": (replaced("centroids", lambda c: c[:-1]), "centroids must be 1-D with"),
    "centroids bits": (replaced("centroids", lambda c: c[:16]), "packed must be torch.uint8"),
    "centroids none": (replaced("centroids", lambda c: c[:0]), "centroids must be 1-D with"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(arguments, case: str) -> None:
    name, change, message = WRONG[case]
    with pytest.raises(ArgumentError, match=message):
        OPERATORS[name](**change(arguments(name)))


@pytest.mark.parametrize("name", WEIGHT_NAMES)
@pytest.mark.parametrize("case", WRONG_WEIGHT)
def test_wrong_weights(arguments, name: str, case: str) -> None:
    change, message = WRONG_WEIGHT[case]
    with pytest.raises(ArgumentError, match=message):
        OPERATORS[name](**change(arguments(name)))


@pytest.mark.parametrize("name", WEIGHT_NAMES)
@pytest.mark.parametrize("part", ["packed", "norms", "awq_scales", "centroids"])
def test_weights_on_two_devices(arguments, name: str, part: str) -> None:
    given = arguments(name)
    with pytest.raises(ArgumentError, match=r"is on .* (should be on|and packed on)"):
        OPERATORS[name](**{**given, part: given[part].to("meta")})


@pytest.mark.gpu
@pytest.mark.parametrize("name", WEIGHT_NAMES)
@pytest.mark.parametrize("part", ["x", "ids", "packed", "norms", "awq_scales", "centroids", "bias"])
def test_cpu_and_gpu_are_not_mixed(arguments, name: str, part: str) -> None:
    given = arguments(name)
    if part not in given:
        pytest.skip(f"{name} takes no {part}")
    with pytest.raises(ArgumentError, match=r"is on .* (should be on|and packed on)"):
        OPERATORS[name](**{**given, part: given[part].cpu()})


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3)])
def test_gradients(arguments, relative_error, rounding, dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    given = arguments("linear", dtype=dtype)
    x = torch.randn(*lead, K, device=given["x"].device).to(dtype).requires_grad_()
    bias = given["bias"].requires_grad_()
    out = ops.linear(**{**given, "x": x})
    grad = torch.randn_like(out)
    out.backward(grad)
    weight = (given["packed"], given["norms"], given["awq_scales"], given["centroids"])
    exact = grad.double() @ reference.dequantize(*weight, K, torch.float64)
    assert x.grad.dtype == bias.grad.dtype == dtype
    assert x.grad.shape == x.shape
    assert relative_error(x.grad, exact) < rounding[dtype]
    assert relative_error(bias.grad, grad.double().view(-1, N).sum(0)) < rounding[dtype]


def test_gradients_of_no_rows(arguments) -> None:
    given = arguments("linear", rows=0)
    x, bias = given["x"].requires_grad_(), given["bias"].requires_grad_()
    ops.linear(**given).sum().backward()
    assert x.grad.shape == (0, K)
    assert torch.equal(bias.grad, torch.zeros_like(bias))


def test_gradient_of_a_bias_in_another_dtype(arguments) -> None:
    given = arguments("linear", dtype=torch.float16)
    given["bias"] = given["bias"].float().requires_grad_()
    ops.linear(**given).sum().backward()
    assert torch.equal(given["bias"].grad, torch.full_like(given["bias"], 6))


def test_strided_activations(arguments) -> None:
    given = arguments("linear", rows=12)
    x = given["x"].T.contiguous().T[::2]
    assert not x.is_contiguous()
    expected = ops.linear(**{**given, "x": x.contiguous()})
    assert torch.equal(ops.linear(**{**given, "x": x}), expected)


def test_strided_bias(arguments) -> None:
    given = arguments("linear")
    expected = ops.linear(**given)
    assert torch.equal(ops.linear(**{**given, "bias": strided(given["bias"])}), expected)


def test_strided_scales_of_rotate(arguments) -> None:
    given = arguments("rotate")
    expected = ops.rotate(**given)
    assert torch.equal(ops.rotate(**{**given, "awq_scales": strided(given["awq_scales"])}), expected)


def test_strided_ids(arguments) -> None:
    given = arguments("embedding")
    expected = ops.embedding(**given)
    assert torch.equal(ops.embedding(**{**given, "ids": strided(given["ids"])}), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_cuda_graph(arguments, name: str) -> None:
    given, fresh = arguments(name), arguments(name)
    operator, changing = OPERATORS[name], {"linear": "x", "rotate": "x", "embedding": "ids"}.get(name, "packed")
    operator(**given)  # compiles the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = operator(**given)
    given[changing].copy_(fresh[changing])
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, operator(**given))
