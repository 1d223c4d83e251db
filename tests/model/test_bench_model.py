"""Whole models with random weights, and the runner that times them."""

import json
from dataclasses import asdict
from typing import Any

import pytest
import torch
from polar_bench import model_phases, models, report
from polar_bench.random_model import CONFIGS, model_config, random_model
from polar_bench.step_profile import Kernel, KindOfWork, kinds_of_work
from transformers import AutoModelForCausalLM, Qwen3_5MoeTextConfig
from typer.testing import CliRunner

from model_patch.cli.app import app
from model_patch.demo import MODEL
from model_patch.errors import ConfigError, UnsupportedModelError
from polar_kernels import PolarLinear, PolarModule


@pytest.mark.parametrize(
    ("name", "billions"),
    [("qwen3.5-4b", 4.21), ("qwen3.5-9b", 8.95), ("qwen3.5-27b", 26.9), ("qwen3.5-35b-a3b", 34.66)],
)
def test_the_known_shapes_are_those_of_the_models(name: str, billions: float) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(billions * 1e9, rel=2e-3)


def test_the_default_shape() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config("qwen3.5-9b"))
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


@pytest.fixture
def small_moe() -> Qwen3_5MoeTextConfig:
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 512, "head_dim": 32, "num_experts": 8}
    heads = {"num_attention_heads": 4, "layer_types": ["linear_attention", "full_attention"]}
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
    return Qwen3_5MoeTextConfig(**sizes, **heads, **experts)


@pytest.mark.parametrize("bits", [5, None])
def test_a_random_mixture_of_experts(device: torch.device, small_moe: Qwen3_5MoeTextConfig, bits: int | None) -> None:
    model = random_model(small_moe, bits, device, torch.float32)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    with torch.no_grad():
        assert model(torch.randint(0, 512, (2, 16), device=device)).logits.isfinite().all()
    experts = sum(models.weight_bytes(layer.mlp.experts) for layer in model.model.layers)
    embedding = models.weight_bytes(model.get_input_embeddings())
    for batch, left_out in ((1, 6 / 8), (2, (6 / 8) ** 2)):
        read = models.weight_bytes(model) - embedding - left_out * experts
        assert models.read_bytes(model, batch) == pytest.approx(read, abs=2)


@pytest.mark.parametrize("bits", [5, None])
def test_a_tied_head_stays_tied(device: torch.device, bits: int | None) -> None:
    untied = random_model(model_config(str(MODEL)), bits, device)
    config = model_config(str(MODEL))
    config.tie_word_embeddings = True
    model = random_model(config, bits, device)
    head = models.weight_bytes(untied) - models.weight_bytes(model)
    table = config.vocab_size * config.hidden_size * (5 / 8 + 2 / 128 if bits else 2)
    assert head == pytest.approx(table, rel=0.02)
    assert models.read_bytes(model) == models.weight_bytes(model)
    assert models.weight_bytes(untied) - models.read_bytes(untied) == pytest.approx(table, rel=0.02)


@pytest.fixture
def _few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (models, model_phases):
        monkeypatch.setattr(module, "STEPS", 2)
        monkeypatch.setattr(module, "LONG_STEPS", 3)
    monkeypatch.setattr(models, "_PLAIN_STEPS", 2)


@pytest.mark.usefixtures("_few_tokens")
def test_rows_of_a_run(device: torch.device) -> None:
    makes = models.providers(model_config(str(MODEL)), 5, device, torch.float32)
    told = []
    sizes = {"prefill": (16, 32), "contexts": (8,), "batches": (1, 2), "runs": 2, "load": True}
    rows, works = models.run("tiny", makes, **sizes, progress=lambda done, total, what: told.append((done, total)))
    assert told == [(i + 1, 25) for i in range(25)]
    prompts, decoding = [("prefill", n, 1) for n in (8, 16, 32)], [("decode", 8, 1), ("decode", 8, 2)]
    accelerated = [("generate", 8, 1), *prompts, ("first token", 8, 1), *decoding]
    points = [*prompts, *decoding, ("load", 0, 0), *accelerated, *prompts, *decoding, *accelerated]
    assert [(row.phase, row.context, row.batch) for row in rows] == points
    plain = {"polar 5-bit", "float32"}
    assert {row.provider for row in rows} == plain | {f"{name}, accelerated" for name in plain}
    loaded = rows[5]
    assert (loaded.tokens_per_second, loaded.deviation) == (None, None)
    assert loaded.load_seconds > 0
    assert all(row.tokens_per_second > 0 for row in rows if row is not loaded)
    quantized, fast, dense = rows[0], rows[6], rows[-1]
    assert quantized.weight_bytes < dense.weight_bytes / 5
    assert fast.weight_bytes == quantized.weight_bytes
    assert fast.load_seconds > quantized.load_seconds
    assert all((row.peak_bytes is None) == (device.type == "cpu") for row in rows)
    assert works == []
    assert models.table([loaded])[0][2:6] == ["-", "-", "-", "-"]


@pytest.mark.usefixtures("_few_tokens")
def test_what_cannot_be_measured_is_left_out(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that accelerate does not take, and one that does not fit."""

    def refuse(model: object, **sizes: int) -> None:
        raise UnsupportedModelError("transformers' experts wait for the CPU")

    def too_large() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(models, "accelerate", refuse)
    makes = models.providers(model_config(str(MODEL)), 5, device, torch.float32) | {"float32": too_large}
    with pytest.warns(UserWarning, match="is left out") as warned:
        rows, _ = models.run("tiny", makes, prefill=(16,), contexts=(8,), batches=(1,), runs=2)
    assert [str(warning.message) for warning in warned] == [
        "polar 5-bit, accelerated, is left out: transformers' experts wait for the CPU",
        "float32 is left out: CUDA out of memory.",
    ]
    assert {row.provider for row in rows} == {"polar 5-bit"}


@pytest.mark.usefixtures("_few_tokens")
def test_a_batch_that_does_not_fit_is_left_out(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = models.measure_phase

    def measure_some(model: object, phase: str, context: int, batch: int, *rest: Any) -> object:
        if phase == "decode" and batch == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return measure(model, phase, context, batch, *rest)

    monkeypatch.setattr(models, "measure_phase", measure_some)
    makes = models.providers(model_config(str(MODEL)), 5, device, torch.float32, plain=False)
    assert list(makes) == ["polar 5-bit"]
    with pytest.warns(UserWarning, match="polar 5-bit: decode 8 x 2 is left out: CUDA out of memory"):
        rows, _ = models.run("tiny", makes, prefill=(16,), contexts=(8,), batches=(1, 2), runs=2)
    assert [row.batch for row in rows if row.phase == "decode"] == [1, 1]


def test_decoding_is_timed_without_the_prompt(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose prompts take a second and whose tokens take 10 ms."""

    def generate(model: None, ids: torch.Tensor, tokens: int, clock: model_phases._Clock | None = None) -> float:
        if clock is not None:
            clock.times = [0.0, *(1 + 0.01 * token for token in range(tokens))]
        return 1 + 0.01 * tokens

    monkeypatch.setattr(model_phases, "_generate", generate)
    assert model_phases._decode(None, torch.zeros(3, 8), steps=5) == pytest.approx(300)
    assert model_phases._first_token(None, torch.zeros(3, 8)) == pytest.approx(24 / 1.01)
    assert model_phases._long(None, torch.zeros(1, 8)) == pytest.approx(512 / 6.12)


def test_kinds_of_a_step() -> None:
    names = [
        "_quantize_kernel",
        "_int8_matmul_kernel",
        "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0",
        "_attend_kernel",
        "_expert_pairs_kernel",
        "_delta_kernel",
        "triton_poi_fused_mul_silu_tiled_linear_0",
        "_int8_matmul_kernel",
        "void at::native::vectorized_elementwise_kernel<4, at::native::(anonymous namespace)::fill>",
    ]
    kernels = [Kernel(name, 10.0 * i, 10.0 * i + i + 1) for i, name in enumerate(names)]
    rows = kinds_of_work([kernels, kernels[::-1]], "polar", 4)
    assert {row.kind: (row.microseconds, row.kernels) for row in rows} == {
        "rotation": (1, 1),
        "matmuls": (2, 1),
        "norms": (3, 1),
        "attention": (4, 1),
        "experts": (5, 1),
        "GatedDeltaNet": (6, 1),
        "elementwise": (7 + 9, 2),
        "head": (8, 1),
        "gaps": (sum(10 - i - 1 for i in range(8)), 0),
    }
    assert [row.microseconds for row in rows] == sorted((row.microseconds for row in rows), reverse=True)
    assert {(row.provider, row.batch) for row in rows} == {("polar", 4)}


@pytest.mark.gpu
def test_a_profile_accounts_for_the_step(device: torch.device) -> None:
    makes = models.providers(model_config(str(MODEL)), 5, device, torch.bfloat16)
    one = dict(list(makes.items())[:1])
    _, works = models.run("tiny", one, prefill=(), contexts=(8,), batches=(2,), profile=True)
    assert {work.batch for work in works} == {1, 2}
    for batch in (1, 2):
        counted = {work.kind: work.kernels for work in works if work.batch == batch}
        assert counted["head"] == 1
        assert {"rotation", "matmuls", "attention", "norms", "gaps"} <= counted.keys()


@torch.no_grad()
def test_providers_of_a_checkpoint(zoo: Any, device: torch.device, relative_error: Any) -> None:
    """A quantised one is dequantised, a plain one quantised."""
    ids = torch.arange(8, device=device)[None]
    for folder, bound in ((zoo.quantized("qwen3_5_text"), 0.03), (zoo.checkpoint("qwen3_5_text"), 0.4)):
        makes = models.checkpoint_providers(str(folder), 5, device, torch.float32)
        assert list(makes) == ["polar 5-bit", "float32"]
        quantized, plain = (make() for make in makes.values())
        assert any(isinstance(module, PolarModule) for module in quantized.modules())
        assert not any(isinstance(module, PolarModule) for module in plain.modules())
        assert relative_error(quantized(ids).logits, plain(ids).logits) < bound
    assert list(models.checkpoint_providers(str(folder), 4, device, torch.float32, plain=False)) == ["polar 4-bit"]


def test_a_model_and_a_config_are_not_taken_together() -> None:
    result = CliRunner().invoke(app, ["bench", "model", str(MODEL), "--config", "qwen3.5-9b"])
    assert isinstance(result.exception, ConfigError)
    assert "either MODEL or --config" in str(result.exception)


@pytest.mark.usefixtures("_few_tokens")
@pytest.mark.parametrize("named", [[str(MODEL), "--no-plain"], [str(MODEL), "--random"]])
def test_command(tmp_path, named: list[str]) -> None:
    args = ["bench", "model", *named, "--quick", "--dtype", "float32", "--device", "cpu", "--json"]
    result = CliRunner().invoke(app, [*args, "--out", str(tmp_path), "--document", str(tmp_path / "benchmarks.md")])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["gpu"]
    assert {"polar", "torch", "transformers"} <= printed["versions"].keys()
    assert {row["phase"] for row in printed["rows"]} == {"prefill", "decode", "first token", "generate"}
    (written,) = tmp_path.glob("model-*.json")
    assert written.with_suffix(".png").stat().st_size > 10_000
    assert json.loads(written.read_text()) == printed
    text = (tmp_path / "benchmarks.md").read_text()
    assert f"### {MODEL}" in text
    assert f"![accelerated decoding]({written.stem}.png)" in text
    assert ("Random weights" in text) == ("--random" in named)
    assert "| polar 5-bit, accelerated | decode | 128 | 1 |" in text


def test_the_document_has_the_profile(tmp_path) -> None:
    works = [KindOfWork("polar", batch, kind, 10.0 * batch, 2) for batch in (1, 16) for kind in ("head", "gaps")]
    row = {"model": "m", "provider": "polar", "phase": "decode", "context": 8, "batch": 1, "tokens_per_second": 250.0}
    row |= {"deviation": 1.0, "weight_bytes": 6e9, "read_bytes": 4e9, "peak_bytes": None, "load_seconds": 3.0}
    described = {"gpu": "Some GPU", "versions": {"torch": "2"}, "cuda": "13", "commit": "c", "date": "d"}
    result = described | {"rows": [row], "profile": [{"model": "m"} | asdict(work) for work in works]}
    report.document(report.write_json(result, tmp_path, "model-some").parent, tmp_path / "benchmarks.md")
    text = (tmp_path / "benchmarks.md").read_text()
    assert "| polar | decode | 8 | 1 | 250.0 +- 1.0 | 1000 | 6.00 GB | - | 3.0 s |" in text
    assert "| head | 10 (2) | 160 (2) |" in text


def test_a_profile_needs_a_gpu() -> None:
    result = CliRunner().invoke(app, ["bench", "model", "--profile", "--device", "cpu"])
    assert isinstance(result.exception, ConfigError)
    assert "needs a CUDA GPU" in str(result.exception)


def test_a_config_that_is_none(tmp_path) -> None:
    with pytest.raises(ConfigError, match=f"is none of {', '.join(CONFIGS)}, and no checkpoint's"):
        model_config(str(tmp_path / "nothing"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UnsupportedModelError, match="gpt2"):
        model_config(str(tmp_path))
