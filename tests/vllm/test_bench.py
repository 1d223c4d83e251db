"""`polar bench vllm --engine` over a tiny Qwen3.5: the engine runs, and its tokens are those of transformers."""

import json
from pathlib import Path

import pytest
import torch
from polar_bench import vllm_engine
from transformers import Qwen3_5TextConfig
from typer.testing import CliRunner

from model_patch.cli.app import app


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Qwen3_5TextConfig:
    for name, value in {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}.items():
        monkeypatch.setenv(name, value)
    sizes = {"vocab_size": 500, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128, "max_position_embeddings": 256}
    linear = {"linear_key_head_dim": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    kinds = {"linear_value_head_dim": 64, "layer_types": ["linear_attention", "full_attention"]}
    return Qwen3_5TextConfig(**sizes, **heads, **linear, **kinds, tie_word_embeddings=False)


@pytest.mark.all_of_vllm
def test_the_engine_computes_what_transformers_does(config: Qwen3_5TextConfig, tmp_path: Path) -> None:
    device = torch.device("cpu")
    vllm_engine.write_random(vllm_engine.engine_config(config), 5, device, tmp_path)
    result = vllm_engine.run_engine(tmp_path, vllm_engine.QUICK)
    assert [len(point["seconds"]) for point in result["points"]] == [2, 2]
    errors = vllm_engine.compare(tmp_path, result, device)
    assert set(errors) == {1, 4}
    assert all(error is not None and error < 0.1 for error in errors.values())


@pytest.mark.all_of_vllm
def test_the_command_measures_both(config: Qwen3_5TextConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path / "tiny")
    command = ["bench", "vllm", "--engine", "--quick", "--config", str(tmp_path / "tiny"), "--out", str(tmp_path)]
    result = CliRunner().invoke(app, [*command, "--document", str(tmp_path / "document.md")])
    assert result.exit_code == 0, result.exception
    rows = json.loads((tmp_path / "vllm-engine-cpu-tiny.json").read_text())["rows"]
    found = [(row["provider"], row["requests"]) for row in rows]
    assert found == [(provider, count) for provider in ("bfloat16", "polar 5-bit") for count in (1, 4)]
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert "## vLLM, " in (tmp_path / "document.md").read_text()
