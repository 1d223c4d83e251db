"""vLLM on one rank: the same numbers as transformers over the same checkpoint, and bad checkpoints refused."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from model_patch.cli.app import app
from model_patch.demo import MODEL

# What is tested -> name and options. vLLM's GatedDeltaNet on a CPU has bf16 only.
EXACT: dict[str, dict[str, Any]] = {
    "qwen3": {"scales": "layer"},  # so that no two projections are one product
    "qwen3_moe": {},
    "single experts": {"name": "qwen3_moe", "single_experts": True},
    "qwen2_tied": {},
    "partly plain": {"name": "qwen3_moe", "exclude": "*.experts.* *.o_proj embed_tokens lm_head"},
}
ROUNDED: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {"scales": "none"},
    "qwen3_5_text_tied": {},
    "qwen3_5_moe": {},  # vision-language, without an image
    "single experts of Qwen3.5": {"name": "qwen3_5_moe", "single_experts": True},
}
LAYER = "model.layers.0.self_attn.o_proj"
Tensors = dict[str, torch.Tensor]


def _without_norms(tensors: Tensors, config: dict[str, Any]) -> None:
    del tensors[f"{LAYER}.norms"]


def _not_a_number(tensors: Tensors, config: dict[str, Any]) -> None:
    tensors[f"{LAYER}.norms"][3, 1] = math.nan


def _future(tensors: Tensors, config: dict[str, Any]) -> None:
    config["quantization_config"]["format_version"] = 2


def _other_scales(tensors: Tensors, config: dict[str, Any]) -> None:
    tensors["model.layers.1.mlp.experts.2.up_proj.awq_scales"][7] *= 2


# What is done to which checkpoint, and what vLLM says then.
SPOILT = {
    _without_norms: ("qwen3", f"{LAYER}.norms is missing"),
    _not_a_number: ("qwen3", f"{LAYER}: norms must be finite and not negative"),
    _future: ("qwen3", "quantization_config.format_version must be 1 for this version, found 2"),
    _other_scales: ("single experts", "2.up_proj.awq_scales must be equal to 0.gate_proj.awq_scales"),
}


@pytest.fixture(scope="module")
def done(engine: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, tuple[Any, Any]]:
    """Name or spoiler -> job and result, all of one process, which takes ten seconds to import vLLM."""
    jobs: dict[Any, Any] = {case: engine.job(**{"name": case} | options) for case, options in EXACT.items()}
    jobs |= {name: engine.job(**{"name": name, "dtype": "bfloat16"} | options) for name, options in ROUNDED.items()}
    root = tmp_path_factory.mktemp("spoilt")
    for spoil, (source, _) in SPOILT.items():
        folder = _spoilt(Path(jobs[source].folder), root / spoil.__name__, spoil)
        jobs[spoil] = type(jobs["qwen3"])(str(folder))
    return dict(zip(jobs, zip(jobs.values(), engine.run(list(jobs.values())), strict=True), strict=True))


def _spoilt(source: Path, out: Path, spoil: Callable[[Tensors, dict[str, Any]], None]) -> Path:
    shutil.copytree(source, out)
    with safe_open(source / "model.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dictionary)
        metadata = file.metadata()
    config = json.loads((source / "config.json").read_text())
    spoil(tensors, config)
    save_file(tensors, out / "model.safetensors", metadata=metadata)
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("name", EXACT)
def test_fp32_gives_transformers_tokens_and_logprobs(engine: Any, done: dict[Any, Any], name: str) -> None:
    engine.check_exact(*done[name])


@pytest.mark.parametrize("name", ROUNDED)
def test_bf16_is_as_near_to_fp32_as_transformers_bf16(engine: Any, done: dict[Any, Any], name: str) -> None:
    engine.check_rounded(*done[name])


@pytest.mark.parametrize("name", [*EXACT, *ROUNDED])
def test_weights_take_what_they_take_on_disk(engine: Any, done: dict[Any, Any], name: str) -> None:
    engine.check_bytes(*done[name])


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_bad_checkpoint_is_refused(done: dict[Any, Any], spoil: Callable[..., None]) -> None:
    error = done[spoil][1].error
    assert error is not None
    assert SPOILT[spoil][1] in error


@pytest.mark.all_of_vllm
def test_what_polar_quantize_writes_and_what_vllm_compiles(engine: Any, tmp_path: Path) -> None:
    quantize = CliRunner().invoke(app, ["quantize", str(MODEL), str(tmp_path / "demo"), "--windows", "4"])
    assert quantize.exit_code == 0, quantize.output
    exact = engine.job("qwen3_moe", compiled=True)
    rounded = [type(exact)(str(tmp_path / "demo"), dtype="bfloat16")]
    rounded += [engine.job(name, dtype="bfloat16", compiled=True) for name in ("qwen3_5_text", "qwen3_5")]
    first, *others = engine.run([exact, *rounded])
    engine.check_exact(exact, first)
    for job, result in zip(rounded, others, strict=True):
        engine.check_rounded(job, result)
