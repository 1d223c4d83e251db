"""`polar bench vllm --engine`, but for vLLM: what it is asked for, and what becomes of what it found."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from polar_bench import report, vllm_engine
from polar_bench.random_model import model_config
from polar_bench.vllm_engine import EngineError, EngineMeasurement, Load, engine_config, measurements
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from model_patch.cli.app import app
from model_patch.demo import MODEL
from model_patch.errors import ConfigError, UnsupportedModelError
from model_patch.load import load_model

ROW = EngineMeasurement("polar 5-bit", 8, 5_000_000_000, 0.02, 1600.0, 10.0, 2.0, 60.0)


def test_qwen3_8b_has_the_shape_of_the_model() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config("qwen3-8b"))
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(8.19e9, rel=2e-3)


def test_text_only_models_get_a_tower_where_vllm_wants_one() -> None:
    config = engine_config(model_config("qwen3.5-9b"))
    assert (config.architectures, config.vision_config.out_hidden_size) == (["Qwen3_5ForConditionalGeneration"], 4096)
    assert config.text_config.to_diff_dict().get("layer_types") == model_config("qwen3.5-9b").layer_types
    assert not config.tie_word_embeddings
    assert engine_config(model_config("qwen3.5-4b")).tie_word_embeddings
    assert engine_config(model_config("qwen3-8b")).architectures == ["Qwen3ForCausalLM"]
    with pytest.raises(UnsupportedModelError, match="found model_type 'qwen3_5_moe_text'"):
        engine_config(model_config("qwen3.5-35b-a3b"))


def _found(*seconds: list[float]) -> dict[str, Any]:
    return {"start_seconds": 60.0, "points": [{"requests": 8, "steps": 256, "seconds": list(seconds)}]}


def test_decoding_is_what_more_tokens_take() -> None:
    found = _found([1.0, 2.0], [1.0, 3.0], [1.0, 2.6])
    (plain,) = measurements("bfloat16", 10, found, {8: None}, {})
    assert (plain.tokens_per_second, plain.ratio) == (8 * 256 / 1.6, 1.0)
    (ours,) = measurements("polar", 10, found, {8: 0.02}, {8: 640.0})
    assert (ours.tokens_per_second, ours.ratio, ours.error) == (1280.0, 2.0, 0.02)


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_wrong_tokens_have_no_time(error: float) -> None:
    (wrong,) = measurements("polar", 10, _found([1.0, 2.0], [1.0, 3.0]), {8: error}, {8: 640.0})
    assert (wrong.tokens_per_second, wrong.ratio) == (None, None)
    assert vllm_engine.table([wrong])[0][2:5] == ["-", "-", "-"]


def test_the_table() -> None:
    assert vllm_engine.table([ROW]) == [
        ["polar 5-bit", "8", "1600 +- 10", "2.00", "5.00", "5.00 GB", "2.0%", "60 s"],
    ]


def test_the_document_has_a_section_of_each_kind(tmp_path: Path) -> None:
    result = report.describe() | {"model": "qwen3-8b", "rows": [asdict(ROW)]}
    report.write_json(result, tmp_path, f"vllm-engine-{report.gpu_name(result)}-qwen3-8b")
    report.document(tmp_path, tmp_path / "document.md")
    text = (tmp_path / "document.md").read_text()
    assert "## vLLM, qwen3-8b, CPU" in text or torch.cuda.is_available()
    assert "| polar 5-bit | 8 | 1600 +- 10 | 2.00 |" in text
    assert "plug-in's layers" not in text


@pytest.mark.parametrize("name", [str(MODEL), "qwen3"])
def test_log_probabilities_are_compared_with_transformers(tmp_path: Path, name: str) -> None:
    config = model_config(str(MODEL)) if name != "qwen3" else _small_qwen3()
    device = torch.device("cpu")
    shape = engine_config(config)
    nbytes = vllm_engine.write_random(shape, 5, device, tmp_path)
    assert not hasattr(shape, "quantization_config")
    assert nbytes < vllm_engine.plain_bytes(shape) / 2
    model = load_model(tmp_path, device=device, dtype=torch.bfloat16)
    ids = torch.randint(0, config.vocab_size, (2, 12))
    with torch.no_grad():
        scores = model(input_ids=ids).logits.float().log_softmax(-1)
    logprobs = scores[:, 7:-1].gather(-1, ids[:, 8:, None])[..., 0]
    point = {"requests": 2, "prompts": ids[:, :8].tolist(), "tokens": ids[:, 8:].tolist()}
    right = point | {"logprobs": logprobs.tolist()}
    wrong = point | {"requests": 3, "logprobs": (logprobs + 2).tolist()}
    errors = vllm_engine.compare(tmp_path, {"points": [right, wrong]}, device)
    assert errors[2] is not None
    assert errors[2] < 0.01
    assert errors[3] is not None
    assert errors[3] > 0.3


def _small_qwen3() -> Any:
    config = model_config("qwen3-8b")
    config.update({"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 512})
    config.layer_types = config.layer_types[:1]
    return config


def test_an_engine_that_fails_says_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vllm.py").write_text("raise ImportError('this vLLM is broken')")
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 256, "vocab_size": 512}')
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}")
    with pytest.raises(EngineError, match=r"ended with 1 over .*(\n.*)+this vLLM is broken"):
        vllm_engine.run_engine(tmp_path, Load(), dummy=True)


@pytest.mark.skipif("vllm" in sys.modules, reason="vLLM is here")
def test_without_vllm_the_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["bench", "vllm", "--engine"])
    assert result.exit_code == 1
    assert "pip install vllm" in str(result.exception)


def test_quick_goes_with_the_engine() -> None:
    result = CliRunner().invoke(app, ["bench", "vllm", "--quick"])
    assert isinstance(result.exception, ConfigError)
    assert "--quick goes with --engine" in str(result.exception)
