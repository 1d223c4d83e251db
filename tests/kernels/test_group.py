"""Layers that read the same input, multiplied as one. On a CPU tile layout is forced; its operators work there too."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from polar_kernels import ArgumentError, PolarGroup, PolarLinear, PolarModule, lloyd_max_levels, ops
from polar_kernels.tiles import is_tileable

K, SIZES = 200, (64, 32, 37)
Make = Callable[..., list[PolarLinear]]


@pytest.fixture(autouse=True)
def _tiles_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def wants(self: PolarModule) -> bool:
        return self._multiplies() and (self.tiles is not None or is_tileable(self.centroids))

    monkeypatch.setattr(PolarModule, "_wants_tiles", wants)


@pytest.fixture
def make(device: torch.device) -> Make:
    def build(sizes=SIZES, *, bias: bool = True, awq: bool = True, bits: int = 5) -> list[PolarLinear]:
        scales = torch.rand(K) + 0.5 if awq else None
        linears = [nn.Linear(K, size, bias=bias, device=device) for size in sizes]
        return [PolarLinear.from_linear(linear, bits, awq_scales=scales) for linear in linears]

    return build


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Out features of each product that is made."""
    made: list[int] = []
    real = ops.tiled_linear

    def counted(*args):
        made.append(args[7])
        return real(*args)

    monkeypatch.setattr(ops, "tiled_linear", counted)
    return made


class Block(nn.Module):
    """A module with three members and their group, as a model would have it."""

    def __init__(self, layers: list[PolarLinear]) -> None:
        super().__init__()
        self.q, self.k, self.v = layers
        self.group = PolarGroup(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [4, 5])
@pytest.mark.parametrize("lead", [(), (1,), (2, 7)])
def test_outputs_are_the_members_own(device, make, relative_error, calls, lead, bits: int, bias: bool) -> None:
    layers = make(bias=bias, bits=bits)
    x = torch.randn(*lead, K, device=device).half()
    alone = [layer(x) for layer in layers]
    group = PolarGroup(layers)
    calls.clear()
    together = group(x)
    assert calls == [sum(SIZES)]
    for one, other in zip(alone, together, strict=True):
        assert one.shape == other.shape
        assert relative_error(other, one) < 1e-3


@pytest.mark.parametrize("activation", ["int8", "exact"])
def test_members_share_a_product(device, make, relative_error, calls, activation: str) -> None:
    layers = make()
    for layer in layers:
        layer.activation = activation
    x, other = torch.randn(2, 3, K, device=device).half().unbind()
    expected = [[layer(one) for layer in layers] for one in (x, other)]
    block = Block(layers)
    calls.clear()
    for one, results in zip((x, other, x), (*expected, expected[0]), strict=True):
        assert relative_error(block(one), torch.cat(results, -1)) < 1e-3
    assert calls == [sum(SIZES)] * 3
    assert block.group._last is None


def test_members_called_with_different_inputs(device, make, relative_error) -> None:
    layers = make()
    inputs = torch.randn(3, 2, K, device=device).half()
    expected = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    PolarGroup(layers)
    for layer, x, y in zip(layers, inputs, expected, strict=True):
        assert relative_error(layer(x), y) < 1e-3


def test_tiles_are_slices_of_one_tensor(make) -> None:
    layers = make()
    before = [layer.polar_weight for layer in layers]
    PolarGroup(layers)
    assert len({layer.tiles.untyped_storage().data_ptr() for layer in layers}) == 1
    assert layers[0].tiles.untyped_storage().nbytes() == sum(layer.tiles.nbytes for layer in layers)
    for layer, weight in zip(layers, before, strict=True):
        assert layer.tiles.is_contiguous()
        assert torch.equal(layer.polar_weight.packed, weight.packed)
        assert torch.equal(layer.polar_weight.norms, weight.norms)


def test_state_dict_is_that_of_the_members(make) -> None:
    layers = make()
    own = {f"{name}.{key}" for name, layer in zip("qkv", layers, strict=True) for key in layer.state_dict()}
    assert set(Block(layers).state_dict()) == own


def test_a_loaded_state_dict_is_what_is_multiplied(device, make, relative_error) -> None:
    block, source = Block(make()), Block(make())
    x = torch.randn(3, K, device=device).half()
    block(x)
    block.load_state_dict(source.state_dict())
    assert block.group.is_merged
    assert relative_error(block(x), source(x)) < 1e-3


@pytest.mark.parametrize("awq", [False, True])
def test_a_member_loaded_by_itself_leaves_the_others_right(device, make, relative_error, awq: bool) -> None:
    block, source = Block(make(awq=awq)), make(awq=awq)[1]  # with other scales, where there are some
    x = torch.randn(3, K, device=device).half()
    q = block.q(x)
    block.k.load_state_dict(source.state_dict())
    assert not block.group.is_merged
    for _ in range(2):
        assert relative_error(block.k(x), source(x)) < 1e-3
        assert relative_error(block.q(x), q) < 1e-3
        block.group.settle()
        assert block.group.is_merged == (not awq)


@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.bfloat16(), copy.deepcopy])
def test_moves_and_copies_stay_groups(device, make, relative_error, move) -> None:
    block = Block(make())
    x = torch.randn(3, K, device=device).half()
    y = block(x)
    moved = move(block)
    assert moved.group.is_merged
    assert len({layer.tiles.untyped_storage().data_ptr() for layer in moved.group.members}) == 1
    assert relative_error(moved(x), y) < 2e-3


def test_without_tiles_each_member_multiplies(device, make, relative_error, monkeypatch) -> None:
    block = Block(make())
    x = torch.randn(3, K, device=device).half()
    y = block(x)
    monkeypatch.setattr(PolarModule, "_wants_tiles", lambda self: False)
    block.half()
    assert not block.group.is_merged
    assert block.q.tiles is None
    assert relative_error(block(x), y) < 2e-2  # on a GPU y was made of int8 activations
    assert relative_error(torch.cat(block.group(x), -1), block(x)) < 1e-3


@torch.no_grad()
def test_compiled_without_a_break(device, make, relative_error) -> None:
    torch.compiler.reset()
    block = Block(make())
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for rows in (3, 3, 5):
        x = torch.randn(rows, K, device=device).half()
        assert relative_error(compiled(x), block(x)) < 1e-3
    assert block.group._last is None
    torch.compiler.reset()


def test_gradients(device, make, relative_error) -> None:
    block = Block(make())
    x = torch.randn(3, K, device=device, requires_grad=True)
    grad = torch.randn(3, sum(SIZES), device=device)
    block(x).backward(grad)
    together, bias = x.grad, block.k.bias.grad
    x.grad = block.k.bias.grad = None
    block.group.dissolve()
    block(x).backward(grad)
    assert relative_error(together, x.grad) < 1e-4
    assert torch.allclose(bias, block.k.bias.grad)


def test_dissolved(device, make, calls) -> None:
    layers = make()
    group = PolarGroup(layers)
    group.dissolve()
    layers[1](torch.randn(3, K, device=device).half())
    assert calls == [SIZES[1]]
    PolarGroup(layers)


def test_layers_that_are_no_group(device, make) -> None:
    layers = make()
    other_bits, no_bias, other_scales = make(bits=4), make(bias=False), make()
    wider = PolarLinear.from_linear(nn.Linear(K + 8, 32, device=device))
    for members, message in (
        (layers[:1], "two layers or more, found 1"),
        ([layers[0], wider], "200 and 208 in features"),
        ([layers[0], other_bits[1]], "5 and 4 bits"),
        ([layers[0], no_bias[1]], "all have a bias, or none"),
        ([layers[0], other_scales[1]], "the same awq_scales"),
        ([layers[2], layers[0]], "multiples of 32, found 37"),
    ):
        with pytest.raises(ArgumentError, match=message):
            PolarGroup(members)
    crooked = PolarLinear.from_linear(nn.Linear(K, 32, device=device), centroids=lloyd_max_levels(5) + 0.01)
    with pytest.raises(ArgumentError, match="the same centroids"):
        PolarGroup([make(awq=False)[0], crooked])
    PolarGroup(layers)
    with pytest.raises(ArgumentError, match="in a group already"):
        PolarGroup(layers)


def test_repr(make) -> None:
    assert repr(PolarGroup(make())) == "PolarGroup(3 layers, out_features=[64, 32, 37])"
