"""Whole models with random weights, and the runner that times them."""

import json

import pytest
import torch
from polar_bench import models
from polar_bench.random_model import model_config, random_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from model_patch.cli.app import app
from model_patch.demo import MODEL
from model_patch.errors import ConfigError, UnsupportedModelError
from polar_kernels import PolarLinear, PolarModule


def test_the_known_shape_is_that_of_the_model() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config("qwen3.5-9b"))
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(8.95e9, rel=1e-3)
    assert model.get_submodule("model.layers.0.mlp.gate_proj").weight.shape == (12288, 4096)


@pytest.mark.parametrize("bits", [3, 5, None])
def test_a_random_model_is_whole_and_computes(device: torch.device, bits: int | None) -> None:
    config = model_config(str(MODEL))
    model = random_model(config, bits, device, torch.float32)
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(tensor.is_meta for tensor in tensors)
    assert {tensor.device.type for tensor in tensors} == {device.type}
    with torch.no_grad():
        logits = model(torch.randint(0, config.vocab_size, (2, 16), device=device)).logits
    assert logits.isfinite().all()
    assert logits.std() > 0.01
    layers = [module for module in model.modules() if isinstance(module, PolarModule)]
    assert bool(layers) == (bits is not None)
    if bits is not None:
        assert {layer.bits for layer in layers} == {bits}
        weights = min(m.in_features * m.out_features for m in layers if isinstance(m, PolarLinear))
        assert all(tensor.numel() < weights for tensor in model.parameters())


def test_norms_are_those_of_trained_weights(device: torch.device) -> None:
    model = random_model(model_config(str(MODEL)), 5, device)
    dense = model.get_submodule("model.layers.0.mlp.gate_proj").dequantize(torch.float32)
    assert 0.01 < dense.std() < 0.04


def test_storages_are_counted_once(device: torch.device) -> None:
    model = torch.nn.Linear(10, 10, bias=False, device=device)
    model.register_buffer("view", model.weight.data[:3])
    assert models.weight_bytes(model) == 400


def test_rows_of_a_run(device: torch.device) -> None:
    makes = models.providers(model_config(str(MODEL)), 5, device, torch.float32)
    told = []
    sizes = {"prefill": (16, 32), "contexts": (8,), "batches": (1, 2)}
    rows = models.run("tiny", makes, **sizes, progress=lambda done, total, what: told.append((done, total)))
    assert told == [(i + 1, 12) for i in range(12)]
    assert [(row.phase, row.context, row.batch) for row in rows[:4]] == [
        ("prefill", 16, 1),
        ("prefill", 32, 1),
        ("decode", 8, 1),
        ("decode", 8, 2),
    ]
    assert {row.provider for row in rows} == {"polar 5-bit", "polar 5-bit, grouped", "float32"}
    assert all(row.tokens_per_second > 0 for row in rows)
    quantized, plain = rows[0], rows[-1]
    assert quantized.weight_bytes < plain.weight_bytes / 5
    assert (quantized.peak_bytes is None) == (device.type == "cpu")


def test_command(tmp_path) -> None:
    args = ["bench", "model", "--config", str(MODEL), "--quick", "--dtype", "float32", "--device", "cpu", "--json"]
    result = CliRunner().invoke(app, [*args, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["gpu"]
    assert {"polar", "torch", "transformers"} <= printed["versions"].keys()
    assert {row["phase"] for row in printed["rows"]} == {"prefill", "decode"}
    (written,) = tmp_path.glob("model-*.json")
    assert json.loads(written.read_text()) == printed


def test_a_config_that_is_none(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"is none of qwen3\.5-9b, and no checkpoint's"):
        model_config(str(tmp_path / "nothing"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UnsupportedModelError, match="gpt2"):
        model_config(str(tmp_path))
