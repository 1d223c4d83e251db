"""Experts from tile layout: grouping against torch, kernels against the definition, the operator, the module."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from polar_kernels import ArgumentError, PolarError, PolarExpertProjection, PolarExperts, ops, reference
from polar_kernels.kernels import tiled_experts
from polar_kernels.kernels.expert_groups import group_pairs
from polar_kernels.tiles import level_table, tile_weight

E, H, MIDDLE, K = 5, 160, 48, 2
QWEN, QWEN_K = (256, 2048, 512), 8
INT8_ERROR = 0.025  # of two int8 products, the second of a product of the first's outputs
TOKENS = [1, 7, 64, 65, 300]
Arguments = list[Any]


@pytest.fixture
def build(device: torch.device, random_weight) -> Callable[..., tuple[Arguments, Arguments]]:
    """Arguments of `ops.tiled_experts`, and of `ops.experts` for the same experts."""

    def stack(count: int, rows: int, columns: int, bits: int) -> tuple[Arguments, Arguments]:
        packed, norms, scales, centroids = random_weight(count * rows, columns, bits)
        norms /= 8
        tiled = [*tile_weight(packed, norms, bits), scales, level_table(centroids), centroids]
        return tiled, [packed.unflatten(0, (count, rows)), norms.unflatten(0, (count, rows)), scales, centroids]

    def make(tokens: int = 7, dtype=torch.float16, bits=(5, 5), shape=(E, H, MIDDLE), top_k=K, exact=False):
        count, hidden, middle = shape
        weights, index = torch.rand(tokens, count, device=device).topk(top_k)
        x = torch.randn(tokens, hidden, device=device)
        routed = [x.to(dtype), index, weights.to(dtype)]
        gate_up, down = stack(count, 2 * middle, hidden, bits[0]), stack(count, hidden, middle, bits[1])
        return [*routed, *gate_up[0], *down[0], count, middle, exact], [*routed, *gate_up[1], *down[1]]

    return make


def definition(stored: Arguments) -> torch.Tensor:
    return reference.experts(stored[0].double(), *stored[1:])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("rows", [8, 64])
@pytest.mark.parametrize(("pairs", "count"), [(1, 1), (200, 7), (600, 20), (9000, 3)])
@pytest.mark.parametrize("unknown", [False, True])
def test_groups_hold_the_pairs_of_their_expert_in_order(
    device: torch.device, pairs: int, count: int, rows: int, dtype: torch.dtype, unknown: bool
) -> None:
    """An expert without pairs and one with most of them included, and pairs without an expert."""
    low, high = (-1, count + 1) if unknown else (0, count)
    index = torch.randint(low, high, (pairs,), device=device, dtype=dtype)
    index[torch.rand(pairs, device=device) < 0.5] = count - 1
    index[index == 1] = count - 1
    order, groups, places, of = group_pairs(index, count, rows)
    assert of == rows
    assert len(groups) == pairs // rows + count
    found: dict[int, list[int]] = {expert: [] for expert in range(count)}
    for expert, start, stop, _ in groups.tolist():
        assert stop - start <= rows
        found[expert] += order[start:stop].tolist() if start < stop else []
    known = (index >= 0) & (index < count)
    assert (places[~known] == -1).all()
    own = groups[places[known] // rows]
    assert torch.equal(own[:, 0], index[known].int())
    inside = own[:, 1] + places[known] % rows
    assert torch.equal(order[inside], torch.arange(pairs, device=device, dtype=torch.int32)[known])
    assert found == {expert: (index == expert).nonzero().flatten().tolist() for expert in range(count)}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", TOKENS)
def test_the_operator_is_the_definition(build, relative_error, tokens: int, dtype: torch.dtype, exact: bool) -> None:
    given, stored = build(tokens, dtype, exact=exact)
    out = ops.tiled_experts(*given)
    assert out.dtype == dtype
    limit = INT8_ERROR if not exact else 2e-3 if dtype == torch.float16 else 1.6e-2
    assert relative_error(out, definition(stored)) < limit


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("wgmma", [False, True])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("tokens", [1, 10, 11, 40, 60])
def test_grouped(
    device: torch.device, build, relative_error, monkeypatch: pytest.MonkeyPatch, tokens: int, exact: bool, wgmma: bool
) -> None:
    """In all forms, whatever the number of tokens."""
    if wgmma and not tiled_experts.has_wgmma(device):
        pytest.skip("wgmma is Hopper's")
    monkeypatch.setattr(tiled_experts, "_FEW_PAIRS", 0)
    monkeypatch.setattr(tiled_experts, "has_wgmma", lambda device: wgmma)
    given, stored = build(tokens, exact=exact)
    assert relative_error(ops.tiled_experts(*given), definition(stored)) < (2e-3 if exact else 1.5 * INT8_ERROR)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("bits", [(2, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize("tokens", [3, 100])
def test_other_bits(build, relative_error, tokens: int, bits: tuple[int, int], exact: bool) -> None:
    given, stored = build(tokens, bits=bits, exact=exact)
    assert relative_error(ops.tiled_experts(*given), definition(stored)) < (2e-3 if exact else INT8_ERROR)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("tokens", [1, 20, 50, 150])
@pytest.mark.parametrize("shape", [(1, 32, 16), (3, 384, 144), (40, 64, 272)])
def test_shapes(build, relative_error, tokens: int, shape: tuple[int, int, int], exact: bool) -> None:
    given, stored = build(tokens, shape=shape, top_k=min(3, shape[0]), exact=exact)
    assert relative_error(ops.tiled_experts(*given), definition(stored)) < (2e-3 if exact else 1.5 * INT8_ERROR)


def test_in_fp32_it_is_exact(build, relative_error) -> None:
    given, stored = build(9, torch.float32)
    assert relative_error(ops.tiled_experts(*given), definition(stored)) < 1e-5


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("tokens", [19, 200])
@pytest.mark.parametrize("routing", ["one expert", "an expert left out", "one expert twice"])
def test_uneven_routing(build, relative_error, routing: str, tokens: int, exact: bool) -> None:
    given, stored = build(tokens, exact=exact)
    index = given[1]
    if routing == "one expert":
        index = torch.full_like(index, 3)
    elif routing == "an expert left out":
        index = torch.where(index == 2, 4, index)
    else:
        index = index[:, :1].expand(-1, K)
    given[1] = stored[1] = index
    assert relative_error(ops.tiled_experts(*given), definition(stored)) < (2e-3 if exact else INT8_ERROR)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("tokens", [2, 100])
def test_strided_and_narrow_choices(build, index_dtype: torch.dtype, tokens: int) -> None:
    given, _ = build(tokens)
    expected = ops.tiled_experts(*given)
    given[0] = torch.cat([given[0], given[0]], 1)[:, :H]
    given[1] = given[1].to(index_dtype).T.contiguous().T
    given[2] = given[2].float().T.contiguous().T
    assert torch.equal(ops.tiled_experts(*given), expected)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("tokens", [0, 9, 100])
@pytest.mark.parametrize("place", ["token", "router weight"])
def test_nan_stays_in_its_row(build, place: str, tokens: int, exact: bool) -> None:
    given, _ = build(tokens, exact=exact)
    clean = ops.tiled_experts(*given)
    assert clean.shape == (tokens, H)
    if tokens:
        (given[0] if place == "token" else given[2])[4, 1] = torch.nan
        out, kept = ops.tiled_experts(*given), torch.arange(tokens, device=clean.device) != 4
        assert out[4].isnan().all()
        assert torch.equal(out[kept], clean[kept])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("tokens", [1, 9, 100])
@pytest.mark.parametrize("unknown", [-1, E, 1 << 40])
def test_unknown_experts(device: torch.device, build, tokens: int, unknown: int, exact: bool) -> None:
    given, _ = build(tokens, exact=exact)
    clean = ops.tiled_experts(*given)
    given[1][tokens // 2, 1] = unknown
    if device.type == "cpu":
        with pytest.raises(IndexError, match=f"expert {unknown} is outside the {E}"):
            ops.tiled_experts(*given)
    else:
        out, kept = ops.tiled_experts(*given), torch.arange(tokens, device=device) != tokens // 2
        assert out[tokens // 2].isnan().all()
        assert torch.equal(out[kept], clean[kept])


def test_a_gradient_is_refused(build) -> None:
    given, _ = build()
    given[0].requires_grad_()
    with pytest.raises(PolarError, match="no gradients through quantised experts"):
        ops.tiled_experts(*given).sum().backward()


def test_opcheck(build) -> None:
    torch.library.opcheck(ops.tiled_experts, tuple(build()[0]))


def test_compiles_in_one_graph(build) -> None:
    given, _ = build()
    compiled = torch.compile(lambda *args: ops.tiled_experts(*args) * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*given), ops.tiled_experts(*given) * 2)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda t: t[0], r"x must be \[T, H\]"),
        (1, lambda t: t.float(), "top_k_index must be int32 or int64"),
        (2, lambda t: t[:, :1], r"must both be \[7, k\]"),
        (3, lambda t: t[1:], "tiles must be"),
        (4, lambda t: t[1:], "tile_norms must be"),
        (9, lambda t: t.float(), "tile_norms must be"),
        (13, lambda count: count + 1, "tiles must be"),
        (14, lambda middle: middle + 1, r"multiples of 32 rows, found \[5, 98, 160\] and \[5, 160, 49\]"),
    ],
)
def test_wrong_arguments_are_refused(build, place: int, change: Callable, message: str) -> None:
    given, _ = build()
    given[place] = change(given[place])
    with pytest.raises(ArgumentError, match=message):
        ops.tiled_experts(*given)


@pytest.fixture
def layer() -> PolarExperts:
    gate_up, down = torch.randn(E, 2 * MIDDLE, H), torch.randn(E, H, MIDDLE)
    scales = torch.rand(H) + 0.5
    return PolarExperts(
        PolarExpertProjection.from_dense(gate_up, awq_scales=scales), PolarExpertProjection.from_dense(down, 4)
    )


def test_activation_is_that_of_both_projections(layer: PolarExperts) -> None:
    assert layer.activation == "int8"
    layer.activation = "exact"
    assert (layer.gate_up_proj.activation, layer.down_proj.activation) == ("exact", "exact")
    with pytest.raises(ArgumentError, match="activation must be"):
        layer.activation = "int4"  # type: ignore[assignment]


@pytest.mark.gpu
def test_layer_on_a_gpu_keeps_one_copy(device: torch.device, layer: PolarExperts) -> None:
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.to(device)
    for projection in (layer.gate_up_proj, layer.down_proj):
        assert projection.packed is None
        assert projection.tiles is not None
        assert projection.dequantize(torch.float16).shape == (E, projection.out_features, projection.in_features)
    assert all(torch.equal(tensor.cpu(), stored[name]) for name, tensor in layer.state_dict().items())
    fresh = PolarExperts(
        PolarExpertProjection(E, H, 2 * MIDDLE, awq=True, device=device),
        PolarExpertProjection(E, MIDDLE, H, bits=4, device=device),
    )
    fresh.load_state_dict(stored)
    weights, index = torch.rand(3, E, device=device).topk(K)
    x = torch.randn(3, H, device=device).half()
    assert torch.equal(fresh(x, index, weights), layer(x, index, weights))
    layer.cpu()
    assert layer.down_proj.tiles is None
    assert all(torch.equal(tensor, stored[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.gpu
def test_both_take_tiles_once_the_second_is_loaded(device: torch.device, layer: PolarExperts) -> None:
    stored = layer.state_dict()
    with torch.device("meta"):
        empty = PolarExperts(
            PolarExpertProjection(E, H, 2 * MIDDLE, awq=True), PolarExpertProjection(E, MIDDLE, H, bits=4)
        )
    empty.to_empty(device=device)
    empty.load_state_dict(stored)
    assert empty.gate_up_proj.tiles is not None
    assert empty.down_proj.tiles is not None
    assert all(torch.equal(tensor.cpu(), stored[name]) for name, tensor in empty.state_dict().items())


@pytest.mark.gpu
def test_the_activation_decides(device: torch.device, layer: PolarExperts, relative_error) -> None:
    weights, index = torch.rand(9, E, device=device).topk(K)
    x = torch.randn(9, H, device=device)
    layer.to(device)
    exact = layer(x, index, weights)
    assert relative_error(layer(x.half(), index, weights), exact) > 3e-3
    layer.activation = "exact"
    assert relative_error(layer(x.half(), index, weights), exact) < 2e-3


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["rows", "bits", "table"])
def test_both_projections_or_none_take_tiles(device: torch.device, relative_error, case: str) -> None:
    middle, bits = (40 if case == "rows" else MIDDLE), (6 if case == "bits" else 5)
    gate_up = PolarExpertProjection.from_dense(torch.randn(E, 2 * middle, H, device=device))
    down = PolarExpertProjection.from_dense(torch.randn(E, H, middle, device=device), bits)
    layer = PolarExperts(gate_up, down)
    if case == "table":
        assert gate_up.tiles is not None
        layer.load_state_dict(layer.state_dict() | {"down_proj.centroids": down.centroids + 0.01})
    assert gate_up.tiles is None
    assert down.tiles is None
    weights, index = torch.rand(9, E, device=device).topk(K)
    x = torch.randn(9, H, device=device)
    out = layer(x, index, weights)
    parts = [p for q in (gate_up, down) for p in (q.packed, q.norms, q.awq_scales, q.centroids)]
    assert relative_error(out, reference.experts(x.double(), index, weights, *parts)) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 64, 300, 2048])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_qwen_35b(build, relative_error, tokens: int, dtype: torch.dtype, exact: bool) -> None:
    given, stored = build(tokens, dtype, shape=QWEN, top_k=QWEN_K, exact=exact)
    limit = INT8_ERROR if not exact else 2e-3 if dtype == torch.float16 else 1.6e-2
    assert relative_error(ops.tiled_experts(*given), definition(stored)) < limit


@pytest.mark.gpu
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("tokens", [9, 100])
def test_in_a_cuda_graph(build, tokens: int, exact: bool) -> None:
    given, _ = build(tokens, exact=exact)
    ops.tiled_experts(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.tiled_experts(*given)
    fresh, _ = build(tokens)
    for place in range(3):  # another routing through the same graph
        given[place].copy_(fresh[place])
    graph.replay()
    assert torch.equal(out, ops.tiled_experts(*given))


@pytest.mark.gpu
def test_more_tokens_than_fit_at_a_time(build, monkeypatch: pytest.MonkeyPatch) -> None:
    given, _ = build(500)
    whole = ops.tiled_experts(*given)
    monkeypatch.setattr(tiled_experts, "_MOST_PAIRS", 200 * K)
    assert torch.equal(ops.tiled_experts(*given), whole)
