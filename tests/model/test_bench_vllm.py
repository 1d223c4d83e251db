"""`polar bench vllm`: the layers it drives are those of the model, and multiply as the plug-in does."""

import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from polar_bench import report, vllm_layers
from polar_bench.random_model import model_config
from polar_bench.vllm_layers import Layer, layers_of, load_method, plug_in_calls
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from model_patch import PolarQuantConfig
from model_patch.architectures import Kind, kind_of
from model_patch.cli.app import app
from model_patch.patch import plan_model


@pytest.mark.parametrize("name", ["qwen3.5-9b", "qwen3.5-27b"])
def test_the_layers_are_all_that_a_step_multiplies_by(name: str) -> None:
    config = model_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    quantised = [n for n in plan_model(model, PolarQuantConfig()).bits if kind_of(n) is not Kind.EMBEDDING]
    expected = sum(model.get_parameter(f"{name}.weight").numel() for name in quantised)
    assert sum(sum(layer.rows) * layer.in_features for layer in layers_of(config)) == expected


def test_a_layer_multiplies_by_its_weight(device: torch.device, relative_error) -> None:
    layers = [Layer("qkv_proj", (64, 32, 32), 256), Layer("o_proj", (256,), 128)]
    calls, weights, nbytes = plug_in_calls(layers, 5, device)
    assert nbytes == (128 * 256 + 256 * 128) * 5.125 / 8
    for layer, call, weight in zip(layers, calls, weights, strict=True):
        x = torch.randn(3, layer.in_features, device=device)
        assert weight().shape == (sum(layer.rows), layer.in_features)
        assert relative_error(call(x), x @ weight().T) < 1e-5


def test_the_stand_ins_are_gone_afterwards() -> None:
    before = {name for name in sys.modules if name.partition(".")[0] == "vllm"}
    method, _ = load_method()
    assert method.__name__ == "PolarLinearMethod"
    assert {name for name in sys.modules if name.partition(".")[0] == "vllm"} == before


def test_the_table_leaves_out_the_time_of_what_is_wrong() -> None:
    good = vllm_layers.StepMeasurement("polar", 8, 5_000_000_000, 0.008, 2000.0, 0.01, 2.5)
    bad = vllm_layers.StepMeasurement("polar", 8, 5_000_000_000, 0.5, None, None, None)
    assert vllm_layers.table([good, bad]) == [
        ["polar", "8", "2000", "2.50", "4000", "2500", "5.00 GB", "0.80%"],
        ["polar", "8", "-", "-", "-", "-", "5.00 GB", "50.00%"],
    ]


def test_the_document_has_what_a_run_wrote(tmp_path: Path) -> None:
    rows = [asdict(vllm_layers.StepMeasurement("polar", 8, 5_000_000_000, 0.008, 2000.0, 0.01, 2.5))]
    result = report.describe() | {"model": "qwen3.5-9b", "rows": rows}
    report.write_json(result, tmp_path, f"vllm-{report.gpu_name(result)}")
    report.document(tmp_path, tmp_path / "document.md")
    text = (tmp_path / "document.md").read_text()
    assert "## The vLLM plug-in's layers, CPU" in text
    assert "| polar | 8 | 2000 | 2.50 | 4000 | 2500 | 5.00 GB | 0.80% |" in text


def test_another_architecture_is_refused() -> None:
    result = CliRunner().invoke(app, ["bench", "vllm", "--config", "qwen3.5-35b-a3b"])
    assert result.exit_code == 1
    assert "knows dense Qwen3.5, found model_type 'qwen3_5_moe_text'" in str(result.exception)


@pytest.mark.gpu
def test_a_step_is_timed_and_right(device: torch.device) -> None:
    layers = [Layer("gate_up_proj", (512, 512), 256), Layer("down_proj", (256,), 512)]
    plain, quantised = vllm_layers.run(layers, rows=(8,))
    assert (plain.ratio, plain.requests, quantised.requests) == (1.0, 8, 8)
    assert quantised.microseconds is not None
    assert quantised.ratio == pytest.approx(plain.microseconds / quantised.microseconds)
