"""GatedDeltaNet by `delta_step` beside transformers' own forward: outputs and both states, token after token."""

import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel, Qwen3_5TextConfig, Qwen3_5TextModel

from model_patch.decode.gated_delta_net import delta_steps, fits
from model_patch.decode.own_forward import own_modules

# key heads, value heads, key dim, value dim, width
SHAPES = [(2, 2, 16, 16, 64), (2, 4, 32, 16, 96), (1, 3, 24, 40, 72)]


def make(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    key_heads, value_heads, key_dim, value_dim, width = shape
    config = Qwen3_5TextConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=key_heads,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=key_dim,
        linear_value_head_dim=value_dim,
    )
    model = Qwen3_5TextModel(config).eval().to(device)
    for layer in own_modules(model, "GatedDeltaNet"):
        nn.init.normal_(layer.conv1d.weight, std=0.5)
        nn.init.normal_(layer.dt_bias)
        nn.init.normal_(layer.norm.weight, mean=1.0, std=0.2)
        nn.init.normal_(layer.in_proj_a.weight, std=0.2)
        nn.init.normal_(layer.in_proj_b.weight, std=0.2)
    return model.to(dtype)


def layer_states(cache: DynamicCache) -> Iterator[torch.Tensor]:
    for layer in cache.layers:
        if hasattr(layer, "recurrent_states"):
            yield layer.conv_states[0]
            yield layer.recurrent_states[0]


def cache_name(layer: nn.Module) -> str:
    """Later versions of transformers renamed it."""
    return "cache" if "cache" in inspect.signature(layer.forward).parameters else "cache_params"


@torch.no_grad()
def run(model: PreTrainedModel, dtype: torch.dtype, rows: int, steps: int, fast: bool) -> list[torch.Tensor]:
    """Outputs of the layer, and its states at the end."""
    generator = torch.Generator().manual_seed(rows)
    layer = own_modules(model, "GatedDeltaNet")[0]
    width = layer.hidden_size
    x = torch.randn(rows, 5 + steps, width, generator=generator).to(model.device, dtype)
    cache = DynamicCache(config=model.config)
    name = cache_name(layer)
    layer(hidden_states=x[:, :5], **{name: cache})
    outputs = []
    for i in range(5, 5 + steps):
        if fast:
            with delta_steps(model):
                outputs.append(layer(hidden_states=x[:, i : i + 1], **{name: cache}))
        else:
            outputs.append(layer(hidden_states=x[:, i : i + 1], **{name: cache}))
    return [*outputs, *layer_states(cache)]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_and_states(device: torch.device, shape: tuple[int, ...], rows: int) -> None:
    model = make(shape, device, torch.float32)
    plain, fast = (run(model, torch.float32, rows, 4, way) for way in (False, True))
    for expected, found in zip(plain, fast, strict=True):
        assert expected.shape == found.shape
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)


def test_projections_that_are_parts_of_one_product(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a PolarGroup are: rows with others' columns between them."""
    model = make(SHAPES[1], device, torch.float32)
    plain = run(model, torch.float32, 3, 2, fast=True)
    layer: Any = own_modules(model, "GatedDeltaNet")[0]

    def part(projection: nn.Module, before: int) -> None:
        multiply = projection.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            y = multiply(x)
            return torch.nn.functional.pad(y, (before, 3), value=torch.nan)[..., before:-3]

        monkeypatch.setattr(projection, "forward", forward)

    part(layer.in_proj_qkv, 0)
    part(layer.in_proj_z, 8)
    for expected, found in zip(plain, run(model, torch.float32, 3, 2, fast=True), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (16, 32, 128, 128, 4096)])
def test_sixteen_bits(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The error against fp32 is below twice that of transformers' own."""
    model = make(shape, device, dtype)
    exact = run(deepcopy(model).float(), torch.float32, 2, 3, fast=False)
    plain, fast = (run(model, dtype, 2, 3, way) for way in (False, True))
    for true, expected, found in zip(exact, plain, fast, strict=True):
        error = (expected.float() - true).norm() / true.norm()
        assert (found.float() - true).norm() / true.norm() < 2 * error + 1e-6


def test_a_nan_stays_in_its_row(device: torch.device) -> None:
    model = make(SHAPES[0], device, torch.float32)
    layer = own_modules(model, "GatedDeltaNet")[0]
    cache = DynamicCache(config=model.config)
    name = cache_name(layer)
    x = torch.randn(2, 6, layer.hidden_size, device=device)
    x[1, 5, 3] = torch.nan
    with torch.no_grad():
        layer(hidden_states=x[:, :5], **{name: cache})
        with delta_steps(model):
            y = layer(hidden_states=x[:, 5:], **{name: cache})
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


def test_forward_is_put_back(device: torch.device) -> None:
    model = make(SHAPES[0], device, torch.float32)
    layer = own_modules(model, "GatedDeltaNet")[0]

    def fail() -> None:
        with delta_steps(model):
            assert "forward" in layer.__dict__
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert "forward" not in layer.__dict__
    layer.forward = own = layer.forward
    with delta_steps(model):
        assert layer.forward is not own
    assert layer.forward is own


def test_other_models_keep_their_forward(device: torch.device) -> None:
    one, other = (make(SHAPES[0], device, torch.float32) for _ in range(2))
    with delta_steps(one):
        assert "forward" not in own_modules(other, "GatedDeltaNet")[0].__dict__


@pytest.mark.parametrize("change", ["activation", "conv bias", "gate bias", "gate kind", "norm kind", "norm dtype"])
def test_layers_that_do_not_fit_keep_their_forward(device: torch.device, change: str) -> None:
    model = make(SHAPES[0], device, torch.float32)
    layer: Any = own_modules(model, "GatedDeltaNet")[0]
    assert fits(layer)
    if change == "activation":
        layer.activation = "gelu"
    elif change == "conv bias":
        layer.conv1d.bias = nn.Parameter(torch.zeros(layer.conv_dim))
    elif change == "gate bias":
        layer.in_proj_a.bias = nn.Parameter(torch.zeros(layer.num_v_heads))
    elif change == "gate kind":
        layer.in_proj_b = nn.Sequential(layer.in_proj_b)
    elif change == "norm kind":
        layer.norm = nn.RMSNorm(layer.head_v_dim)
    else:
        layer.norm.half()
    assert not fits(layer)
    with delta_steps(model):
        assert "forward" not in layer.__dict__


@pytest.mark.parametrize("case", ["several tokens", "no cache", "past is recorded"])
def test_what_is_no_step_goes_to_the_plain_forward(device: torch.device, case: str) -> None:
    model = make(SHAPES[0], device, torch.float32)
    layer = own_modules(model, "GatedDeltaNet")[0]
    x = torch.randn(2, 8, layer.hidden_size, device=device)
    found = []
    for fast in (False, True):
        cache = DynamicCache(config=model.config)
        options = {} if case == "no cache" else {cache_name(layer): cache}
        with torch.no_grad():
            layer(hidden_states=x[:, :5], **options)
            if case == "past is recorded":
                cache.layers[0].record_past = True
            with delta_steps(model) if fast else nullcontext():
                found.append(layer(hidden_states=x[:, 5:] if case == "several tokens" else x[:, 5:6], **options))
    assert torch.equal(*found)
