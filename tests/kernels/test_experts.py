"""A mixture of experts: definition against dense fp64, kernels against definition, the operator, the module."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from polar_kernels import (
    ArgumentError,
    PolarError,
    PolarExpertProjection,
    PolarExperts,
    QuantizationError,
    ops,
    quantize_weight,
    reference,
)
from polar_kernels.checks import FLOATS
from polar_kernels.experts import quantize_experts
from polar_kernels.kernels.experts import experts

E, H, MIDDLE, K = 5, 200, 72, 2
Arguments = list[torch.Tensor | None]


@pytest.fixture
def build(device: torch.device, random_weight) -> Callable[..., Arguments]:
    """Builds the arguments of an experts operator, of which each token is sent to K different experts."""

    def stack(count: int, rows: int, columns: int, bits: int, awq: bool) -> Arguments:
        packed, norms, scales, centroids = random_weight(count * rows, columns, bits, awq=awq)
        return [packed.unflatten(0, (count, rows)), norms.unflatten(0, (count, rows)) / 8, scales, centroids]

    def make(tokens: int = 7, dtype=torch.float32, bits=(5, 5), awq=True, shape=(E, H, MIDDLE), top_k=K) -> Arguments:
        count, hidden, middle = shape
        x = torch.randn(tokens, hidden, device=device).to(dtype)
        scores = torch.rand(tokens, count, device=device)
        weights, index = scores.topk(top_k)
        gate_up = stack(count, 2 * middle, hidden, bits[0], awq)
        return [x, index, weights.to(dtype), *gate_up, *stack(count, hidden, middle, bits[1], awq)]

    return make


def dense(given: Arguments) -> torch.Tensor:
    """Dequantised experts applied token by token in fp64, as transformers' eager experts do."""
    x, index, weights = (part.cpu() for part in given[:3])
    stacks = []
    for packed, norms, scales, centroids in (given[3:7], given[7:]):
        columns = x.shape[1] if not stacks else stacks[0].shape[1] // 2
        parts = [None if part is None else part.cpu() for part in (scales, centroids)]
        pairs = zip(packed.cpu(), norms.cpu(), strict=True)
        stacks.append(torch.stack([reference.dequantize(*pair, *parts, columns, torch.float64) for pair in pairs]))
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(len(x)):
        for expert, weight in zip(index[token].tolist(), weights[token].double(), strict=True):
            gate, up = (stacks[0][expert] @ x[token].double()).chunk(2)
            out[token] += weight * (stacks[1][expert] @ (F.silu(gate) * up))
    return out


@pytest.mark.parametrize("awq", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_definition_is_the_dense_mixture(build, relative_error, bits: int, awq: bool) -> None:
    given = build(bits=(bits, 10 - bits), awq=awq)
    given[0] = given[0].double()
    assert relative_error(reference.experts(*given).cpu(), dense(given)) < 1e-12


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bits", range(2, 9))
def test_kernels_at_all_bits(build, relative_error, bits: int) -> None:
    given = build(bits=(bits, 10 - bits))
    assert relative_error(experts(*given).cpu(), dense(given)) < 1e-5


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2.5e-2)])
@pytest.mark.parametrize("tokens", [1, 50])  # the last of more rows than the small tiles are for
@pytest.mark.parametrize("shape", [(E, H, MIDDLE), (1, 64, 128), (3, 384, 33)])
def test_kernels_of_shapes(build, relative_error, tokens: int, dtype: torch.dtype, limit: float, shape) -> None:
    given = build(tokens, dtype, awq=False, shape=shape, top_k=min(K, shape[0]))
    out = experts(*given)
    assert out.dtype == dtype
    assert relative_error(out.cpu(), dense(given)) < limit


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("routing", ["one expert", "an expert left out", "one expert twice"])
def test_uneven_routing(build, relative_error, routing: str) -> None:
    given = build(19, shape=(E, 128, 32))
    index = given[1]
    if routing == "one expert":
        given[1], given[2] = torch.full_like(index[:, :1], 3), given[2][:, :1].contiguous()
    elif routing == "an expert left out":
        given[1] = torch.where(index == 2, 4, index)
    else:
        given[1] = index[:, :1].expand(-1, K)
    for run in (experts, ops.experts):
        assert relative_error(run(*given).cpu(), dense(given)) < 1e-5


def test_no_tokens(build) -> None:
    given = build(0)
    for run in (experts, ops.experts):
        assert run(*given).shape == (0, H)


@pytest.mark.parametrize("place", ["token", "router weight"])
def test_nan_stays_in_its_row(build, place: str) -> None:
    given = build(9)
    expected = [run(*given) for run in (experts, ops.experts)]
    (given[0] if place == "token" else given[2])[4, 1] = torch.nan
    for run, clean in zip((experts, ops.experts), expected, strict=True):
        out = run(*given)
        assert out[4].isnan().all()
        kept = torch.arange(9, device=out.device) != 4
        assert torch.equal(out[kept], clean[kept])


@pytest.mark.parametrize("unknown", [-1, E])
def test_unknown_experts(build, unknown: int) -> None:
    given = build(9)
    clean = experts(*given)
    given[1][4, 1] = unknown
    out, kept = experts(*given), torch.arange(9, device=clean.device) != 4
    assert out[4].isnan().all()
    assert torch.equal(out[kept], clean[kept])
    with pytest.raises(IndexError, match=f"expert {unknown} is outside the {E}"):
        reference.experts(*given)


class _NoReads(TorchDispatchMode):
    """Refuses what waits for the values of a tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "_unique2", "bincount")
        return func(*args, **(kwargs or {}))


def test_the_kernels_read_no_value_on_the_host(build, monkeypatch: pytest.MonkeyPatch) -> None:
    from polar_kernels.kernels import experts as module
    from polar_kernels.kernels import rotate

    class Unlaunched:  # the interpreter itself copies its arguments
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda **_: None

    given = build(9)
    monkeypatch.setattr(module, "_grouped_matmul_kernel", Unlaunched())
    monkeypatch.setattr(rotate, "_rotate_kernel", Unlaunched())
    with _NoReads():
        experts(*given)
    with pytest.raises(AssertionError), _NoReads():
        reference.experts(*given)


@pytest.mark.parametrize("awq", [False, True])
def test_opcheck(build, awq: bool) -> None:
    torch.library.opcheck(ops.experts, tuple(build(awq=awq)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_operator_equals_the_definition(build, relative_error, rounding, dtype: torch.dtype) -> None:
    given = build(dtype=dtype)
    assert relative_error(ops.experts(*given).cpu(), dense(given)) < 8 * rounding[dtype]


def test_a_gradient_is_refused(build) -> None:
    given = build()
    given[0].requires_grad_()
    out = ops.experts(*given)
    with pytest.raises(PolarError, match="no gradients through quantised experts"):
        out.sum().backward()


def test_the_number_of_tokens_may_be_dynamic(build) -> None:
    torch.compiler.reset()
    given = build()
    for part in given[:3]:
        torch._dynamo.mark_dynamic(part, 0)  # an error where it is specialised
    compiled = torch.compile(lambda *args: ops.experts(*args) * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*given), ops.experts(*given) * 2)


def test_compiles_in_one_graph(build) -> None:
    given = build()
    compiled = torch.compile(lambda *args: ops.experts(*args) * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*given), ops.experts(*given) * 2)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda t: t[None], r"x must be \[T, H\]"),
        (0, lambda t: t.double(), "x must be float16, bfloat16 or float32"),
        (1, lambda t: t.float(), "top_k_index must be int32 or int64"),
        (1, lambda t: t[:3], r"must both be \[7, k\], found \[3, 2\] and \[7, 2\]"),
        (2, lambda t: t.long(), "top_k_weights must be float"),
        (2, lambda t: t[:, :1], "must both be"),
        (3, lambda t: t[0], r"gate_up_packed must be \[E, 2 \* I, bytes\]"),
        (3, lambda t: t[:, 1:], r"gate_up_packed must be \[E, 2 \* I, bytes\]"),
        (4, lambda t: t[1:], "gate_up_norms must be"),
        (5, lambda t: t[1:], "gate_up_awq_scales must be"),
        (7, lambda t: t[1:], "down_packed must be"),
        (8, lambda t: t.float(), "down_norms must be"),
        (10, lambda t: t[:16], "down_packed must be"),
    ],
)
def test_wrong_arguments_are_refused(build, place: int, change: Callable, message: str) -> None:
    given = build()
    given[place] = change(given[place])
    with pytest.raises(ArgumentError, match=message):
        ops.experts(*given)


@pytest.fixture
def weights(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(E, 2 * MIDDLE, H, device=device), torch.randn(E, H, MIDDLE, device=device)


@pytest.fixture
def layer(weights) -> PolarExperts:
    scales = torch.rand(H, device=weights[0].device) + 0.5
    gate_up = PolarExpertProjection.from_dense(weights[0], 4, awq_scales=scales)
    return PolarExperts(gate_up, PolarExpertProjection.from_dense(weights[1], 6))


@pytest.fixture
def routed(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weights, index = torch.rand(7, E, device=device).topk(K)
    return torch.randn(7, H, device=device), index, weights


def test_experts_are_quantised_one_by_one(weights) -> None:
    made, singles = quantize_experts(weights[1], 5), [quantize_weight(w, 5) for w in weights[1]]
    assert torch.equal(made.packed, torch.cat([s.packed for s in singles]))
    assert torch.equal(made.norms, torch.cat([s.norms for s in singles]))


def test_the_module_is_its_dequantised_mixture(layer: PolarExperts, routed, relative_error) -> None:
    x, index, weights = routed
    gate_up, down = (p.dequantize(torch.float32) for p in (layer.gate_up_proj, layer.down_proj))
    assert gate_up.shape == (E, 2 * MIDDLE, H)
    each = torch.einsum("eni,eti->etn", gate_up, x.expand(E, -1, -1))
    gate, up = each.chunk(2, -1)
    full = torch.einsum("ehi,eti->teh", down, F.silu(gate) * up)
    chosen = full.gather(1, index[..., None].expand(-1, -1, H))
    assert relative_error(layer(*routed), (chosen * weights[..., None]).sum(1)) < 1e-5


def test_the_state_dict_keeps_every_bit(layer: PolarExperts, routed) -> None:
    state = layer.state_dict()
    assert state["gate_up_proj.packed"].shape == (E, 2 * MIDDLE, 256 * 4 // 8)
    assert state["down_proj.norms"].shape == (E, H, 1)
    empty = PolarExperts(
        PolarExpertProjection(E, H, 2 * MIDDLE, bits=4, awq=True), PolarExpertProjection(E, MIDDLE, H, bits=6)
    ).to(routed[0].device)
    assert empty(*routed).abs().max() == 0
    empty.load_state_dict(state)
    assert torch.equal(empty.to(torch.bfloat16)(*routed), layer(*routed))
    assert empty.down_proj.norms.dtype == torch.float16


def test_dequantize_into_a_buffer(layer: PolarExperts) -> None:
    out = torch.empty(E * H, MIDDLE, device=layer.down_proj.norms.device)
    layer.down_proj.dequantize_into(out)
    assert torch.equal(out, layer.down_proj.dequantize(torch.float32).flatten(0, 1))


def test_autocast_decides_the_dtype(layer: PolarExperts, routed) -> None:
    with torch.autocast(routed[0].device.type, torch.bfloat16):
        assert layer(*routed).dtype == torch.bfloat16


def test_projections_that_do_not_fit(weights) -> None:
    down: Any = PolarExpertProjection(E, MIDDLE + 1, H)
    with pytest.raises(ArgumentError, match=r"found \[5, 144, 200\] and \[5, 200, 73\]"):
        PolarExperts(PolarExpertProjection(E, H, 2 * MIDDLE), down)


def test_an_expert_that_cannot_be_quantised_is_named(weights) -> None:
    weights[1][3, 2, 1] = torch.nan
    with pytest.raises(QuantizationError, match="expert 3: "):
        PolarExpertProjection.from_dense(weights[1])
    with pytest.raises(ArgumentError, match=r"\[E, N, K\]"):
        quantize_experts(weights[0][0])


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 16, 64, 300, 2048])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_qwen_35b(build, relative_error, tokens: int, dtype: torch.dtype) -> None:
    given = build(tokens, dtype, shape=(256, 2048, 512), top_k=8)
    exact = reference.experts(given[0].double(), *given[1:])
    assert relative_error(ops.experts(*given), exact) < (3e-3 if dtype == torch.float16 else 2.5e-2)


@pytest.mark.gpu
def test_in_a_cuda_graph(build) -> None:
    given = build(9, torch.float16)
    ops.experts(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.experts(*given)
    fresh = build(9, torch.float16)
    for place in range(3):  # another routing through the same graph
        given[place].copy_(fresh[place])
    graph.replay()
    assert torch.equal(out, ops.experts(*given))
