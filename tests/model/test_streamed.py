"""Calibration layer by layer: the same scales and moments, with one layer in memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from model_patch import ConfigError, PolarQuantConfig, UnsupportedModelError, demo
from model_patch.cli.app import app
from model_patch.quantize import calibrate_plan, plan_checkpoint, streamed
from model_patch.quantize.streamed import fits, forgetting_activations, load_streamed


def layers_of(model: Any) -> Iterator[torch.Tensor]:
    for layer in model.get_decoder().layers:
        yield from layer.parameters()


@pytest.mark.parametrize("batch", [1, 2])
def test_it_finds_the_same(device: torch.device, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    plan = plan_checkpoint(demo.MODEL, PolarQuantConfig(), awq=True)
    arguments = (plan, demo.CALIBRATION_TEXT, device, 2)
    whole = calibrate_plan(*arguments, feedback=True)
    monkeypatch.setattr("model_patch.quantize.calibrated.batch_size", lambda model, window: batch)
    told = []
    found = calibrate_plan(
        *arguments, feedback=True, streamed=True, progress=lambda done, total, what: told.append((done, total))
    )
    total = 4 + len(plan.layers.sites())
    assert told[-1] == (total, total)
    assert found.awq_scales.keys() == whole.awq_scales.keys()
    # On a GPU, sums in another order may tip a near tie between an exponent and the next.
    tolerance = 2e-3 if device.type == "cpu" else 0.1
    for name, scales in whole.awq_scales.items():
        torch.testing.assert_close(found.awq_scales[name], scales, rtol=tolerance, atol=0)
    assert found.moments.keys() == whole.moments.keys()
    for name, moments in whole.moments.items():
        assert (found.moments[name] - moments).norm() < 1e-3 * moments.norm()


@pytest.mark.parametrize("name", ["qwen3_5", "qwen2_tied_odd", "qwen3_5_text"])
def test_only_the_layer_that_runs_is_in_memory(zoo: Any, name: str) -> None:
    model = load_streamed(zoo.checkpoint(name), zoo.device, torch.float32)
    layers = model.get_decoder().layers
    held = []

    def look(module: torch.nn.Module, args: Any, out: Any) -> None:
        held.append([any(p.device.type != "meta" for p in layer.parameters()) for layer in layers])

    for layer in layers:
        layer.mlp.down_proj.register_forward_hook(look)
    assert all(parameter.is_meta for parameter in layers_of(model))
    ids = torch.arange(3, 19, device=zoo.device).view(2, 8)
    with torch.no_grad():
        logits = model(ids).logits
    plain = zoo.model(name)
    torch.testing.assert_close(logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    # down_proj's own weight is gone again when it has run; no layer but its own may hold any.
    assert len(held) == len(layers)
    assert all(not any(row[:i] + row[i + 1 :]) for i, row in enumerate(held))
    assert all(parameter.is_meta for parameter in layers_of(model))


def test_running_backwards_leaves_the_model_as_it_was(zoo: Any) -> None:
    model = load_streamed(zoo.checkpoint("qwen3"), zoo.device, torch.float32)
    attention = model.get_decoder().layers[0].self_attn
    attention.attention_dropout = 0.5
    with forgetting_activations(model):
        assert model.training
        assert model.is_gradient_checkpointing
        assert attention.attention_dropout == 0
    assert not model.training
    assert not model.is_gradient_checkpointing
    assert attention.attention_dropout == 0.5


def test_whether_a_model_fits(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fits(demo.MODEL, device)
    free = 12 * 2**20  # the embedded model has 11 MB in bf16
    monkeypatch.setattr(streamed.os, "sysconf", lambda name: free if name == "SC_AVPHYS_PAGES" else 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * free))
    assert not fits(demo.MODEL, device)


@pytest.mark.parametrize(
    ("options", "expected"),
    [((), False), (("--layer-by-layer",), True), (("small",), True), (("small", "--whole"), False)],
)
def test_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], expected: bool) -> None:
    """By default where the model does not fit."""
    asked = []

    def calibrate(*args: Any, streamed: bool, **kwargs: Any) -> None:
        asked.append(streamed)
        raise KeyboardInterrupt

    monkeypatch.setattr("model_patch.cli.quantize.calibrate_plan", calibrate)
    if "small" in options:
        monkeypatch.setattr("model_patch.cli.quantize_options.fits", lambda source, device: False)
    arguments = ["quantize", str(demo.MODEL), str(tmp_path / "out"), "--device", "cpu"]
    CliRunner().invoke(app, [*arguments, *(o for o in options if o != "small")])
    assert asked == [expected]


def test_a_target_takes_the_model_whole(tmp_path: Path) -> None:
    arguments = ["quantize", str(demo.MODEL), str(tmp_path / "out"), "--target-bits", "4.5", "--layer-by-layer"]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ConfigError)
    assert "leave out --layer-by-layer" in str(result.exception)


@pytest.mark.parametrize("options", [{"awq": True}, {"awq": False}])
def test_experts_are_refused(zoo: Any, options: dict[str, bool]) -> None:
    plan = plan_checkpoint(zoo.checkpoint("qwen3_moe"), PolarQuantConfig(), **options)
    with pytest.raises(UnsupportedModelError, match="--whole"):
        calibrate_plan(plan, demo.CALIBRATION_TEXT, zoo.device, 1, streamed=True)
