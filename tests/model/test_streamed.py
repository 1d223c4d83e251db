"""Calibration layer by layer: the same scales and moments, with one layer in memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from model_patch import ConfigError, PolarQuantConfig, demo, load_model
from model_patch.checkpoint.reader import Checkpoint
from model_patch.cli.app import app
from model_patch.load import meta_model
from model_patch.quantize import calibrate_plan, layerwise, plan_checkpoint, streamed
from model_patch.quantize.layerwise import LayerwiseRun
from model_patch.quantize.moments import collect_moments
from model_patch.quantize.streamed import fits, load_streamed


def layers_of(model: Any) -> Iterator[torch.Tensor]:
    for layer in model.get_decoder().layers:
        yield from layer.parameters()


@pytest.mark.parametrize("name", ["qwen3_5_text", "qwen3_5_moe", "qwen3_vl_tied", "qwen2_tied_odd"])
def test_it_finds_the_same(zoo: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As with the model in memory, byte for byte."""
    source = zoo.checkpoint(name)
    batch = torch.randint(0, 500, (3, 32))
    monkeypatch.setattr("model_patch.quantize.calibrated.calibration_batch", lambda *_: batch)
    plan = plan_checkpoint(source, PolarQuantConfig(), awq=True)
    arguments = (plan, demo.CALIBRATION_TEXT, zoo.device, 3)
    whole = calibrate_plan(*arguments, feedback=True)
    told = []
    found = calibrate_plan(
        *arguments, feedback=True, streamed=True, progress=lambda done, total, what: told.append((done, total))
    )
    layers = meta_model(source).config.get_text_config().num_hidden_layers
    total = 3 * 3 * layers + len(plan.layers.sites())
    assert told[-1] == (total, total)
    assert found.rare_experts == whole.rare_experts
    for kind in ("awq_scales", "moments"):
        expected = getattr(whole, kind)
        assert getattr(found, kind).keys() == expected.keys() != set()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in getattr(found, kind).items())


def test_a_layer_is_read_once_each_way(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no other is in memory meanwhile, whatever the number of batches."""
    source = zoo.checkpoint("qwen3")
    monkeypatch.setattr(layerwise, "_TOKENS", 16)  # two batches of two windows
    model, checkpoint = load_streamed(source, zoo.device, torch.float32), Checkpoint.open(source)
    read, held = [], []
    reading = checkpoint.read
    monkeypatch.setattr(checkpoint, "read", lambda name, device: (read.append(name), reading(name, device))[1])
    layers = model.get_decoder().layers
    for layer in layers:
        layer.mlp.down_proj.register_forward_hook(
            lambda *_: held.append([any(p.device.type != "meta" for p in other.parameters()) for other in layers])
        )
    sites = {"down": ["model.layers.1.mlp.down_proj"]}
    collect_moments(model, torch.randint(0, 500, (4, 8)), sites, checkpoint=checkpoint)
    first, second = [True, False], [False, True]
    assert held == [first, first, second, second, second, second, first, first]
    assert {name: read.count(name) for name in read} == {n: 2 for n in checkpoint.tensors if ".layers." in n}
    assert all(parameter.is_meta for parameter in layers_of(model))


@pytest.mark.parametrize("on_disk", [False, True])
def test_layer_by_layer_is_the_model(zoo: Any, dense: str, on_disk: bool) -> None:
    """What each layer and the head read is what they read when transformers runs it all."""
    source = zoo.checkpoint(dense)
    load = load_streamed if on_disk else lambda s, d, t: load_model(s, device=d, dtype=t)
    model, plain = load(source, zoo.device, torch.float32), zoo.model(dense)
    windows = torch.randint(0, 500, (3, 16), generator=torch.Generator().manual_seed(3))
    read: dict[str, list[torch.Tensor]] = {"found": [], "expected": []}
    for key, watched in (("found", model), ("expected", plain)):
        modules = [layer.mlp.down_proj for layer in watched.get_decoder().layers] + [watched.get_output_embeddings()]
        for module in modules:
            module.register_forward_pre_hook(lambda _, args, key=key: read[key].append(args[0].detach()))
    LayerwiseRun(model, windows, Checkpoint.open(source)).forward(lambda _: None)
    with torch.no_grad():
        plain(windows.to(zoo.device), use_cache=False, logits_to_keep=1)
    assert len(read["found"]) == len(read["expected"])
    for found, expected in zip(read["found"], read["expected"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not any("forward" in vars(layer) for layer in model.get_decoder().layers)


def test_whether_a_model_fits(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fits(demo.MODEL, device)
    free = 12 * 2**20  # the embedded model has 11 MB in bf16
    monkeypatch.setattr(streamed, "free_memory", lambda device: free)
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
