"""Decoder layers by `layer_steps` beside transformers' own forward, token after token."""

from contextlib import nullcontext
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from model_patch import patch_model
from model_patch.decode import layer_step
from model_patch.decode.gated_delta_net import delta_steps
from model_patch.decode.layer_step import LayerStep, layer_steps
from model_patch.decode.own_forward import own_modules
from model_patch.decode.step_products import norm_of
from model_patch.groups import group_projections
from polar_kernels import PolarLinear
from polar_kernels.module import PolarModule

EXPERTS = ["qwen3_moe", "qwen3_5_moe"]
ARCHITECTURES = ["qwen3", "qwen3_5_text", *EXPERTS]


@pytest.fixture(autouse=True)
def _runs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: tile layout and its kernels' assembly all the same, carried out by numpy."""
    if not torch.cuda.is_available():
        from emulator import emulate

        emulate(monkeypatch)
        monkeypatch.setattr(PolarModule, "_wants_tiles", PolarModule._multiplies)


@torch.no_grad()
def decode(model: Any, rows: int, fast: bool) -> torch.Tensor:
    """Logits of a token after a prompt of two."""
    ids = torch.randint(64, (rows, 3), generator=torch.Generator().manual_seed(rows)).to(model.device)
    out = model(ids[:, :2], use_cache=True)
    name = "cache" if "cache" in out else "past_key_values"
    with delta_steps(model), layer_steps(model) if fast else nullcontext():
        return model(ids[:, 2:], use_cache=True, **{name: out[name]}).logits


def quantized(zoo: Any, name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    model = zoo.model(name, dtype)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            nn.init.normal_(module.weight, mean=0.5, std=0.2)
    patch_model(model, awq_scales=zoo.awq_scales(model))
    group_projections(model)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("qwen3", 2),
        ("qwen3_5_text", 1),
        *(pytest.param(name, rows, marks=pytest.mark.gpu) for name in ARCHITECTURES for rows in (1, 3, 16)),
    ],
)
def test_logits(zoo: Any, relative_error: Any, monkeypatch: pytest.MonkeyPatch, name: str, rows: int) -> None:
    """The error against fp32 is that of the plain path in int8 or, on a CPU, where that one is exact, of its size."""
    model = quantized(zoo, name)
    fused = Mock(wraps=layer_step.multiply_normed)
    monkeypatch.setattr(layer_step, "multiply_normed", fused)
    plain, fast = (decode(model, rows, way) for way in (False, True))
    sites = 1 if name in EXPERTS else 2
    assert fused.call_count == sites * len(own_modules(model, "DecoderLayer"))
    exact = decode(model.to(torch.float32), rows, False)
    bound = 1.5 * relative_error(plain, exact) if model.device.type == "cuda" else 0.06
    assert 0 < relative_error(fast, exact) < bound


def test_layers_that_fit(zoo: Any) -> None:
    model = quantized(zoo, "qwen3_5_text")
    layers = own_modules(model, "DecoderLayer")
    assert len(layers) == model.config.num_hidden_layers
    assert all(LayerStep.of(layer) is not None for layer in layers)
    own = [layer.forward for layer in layers]
    with layer_steps(model):
        assert all("forward" in layer.__dict__ for layer in layers)
    assert [layer.forward for layer in layers] == own
    assert all(
        LayerStep.of(layer) is None for layer in own_modules(zoo.model("qwen3_5_text", torch.bfloat16), "DecoderLayer")
    )


@torch.no_grad()
def test_exact_layers_and_longer_inputs_keep_their_own_forward(zoo: Any) -> None:
    model = quantized(zoo, "qwen3")
    ids = torch.arange(6, device=model.device)[None]
    expected = model(ids).logits
    with layer_steps(model):
        assert torch.equal(model(ids).logits, expected)
    for module in model.modules():
        if isinstance(module, PolarModule):
            module.activation = "exact"
    assert torch.equal(decode(model, 2, False), decode(model, 2, True))


def test_what_is_taken_for_a_norm(zoo: Any) -> None:
    centered = [
        norm_of(own_modules(zoo.model(name, torch.bfloat16), "DecoderLayer")[0].input_layernorm)
        for name in ARCHITECTURES
    ]
    assert [norm.centered for norm in centered if norm] == [False, True, False, True]
    assert norm_of(nn.LayerNorm(64, dtype=torch.bfloat16)) is None
    assert norm_of(PolarLinear(64, 64)) is None
    assert norm_of(None) is None
