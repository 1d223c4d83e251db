"""Mixtures of experts: both layouts of a source, what is wrong with one, exclusions, and the commands."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from typer.testing import CliRunner

from model_patch import CheckpointError, PolarQuantConfig, UnsupportedModelError, load_model, patch_model
from model_patch.checkpoint.published.convert import convert_checkpoint
from model_patch.checkpoint.reader import Checkpoint
from model_patch.cli.app import app
from model_patch.demo import MODEL
from model_patch.quantize import calibrate, expert_moments, plan_checkpoint, quantize_checkpoint
from model_patch.quantize.awq import search_expert_scales
from model_patch.quantize.calibrate import EXPERT_ROWS, SiteStatistics
from model_patch.quantize.calibrated import calibrate_plan
from model_patch.quantize.moments import collect_moments
from model_patch.verify import verify_checkpoint
from polar_kernels import PolarExpertProjection, PolarExperts

EXPERTS = "model.layers.1.mlp.experts"
PREFIX = {"qwen3_moe": "model.layers", "qwen3_5_moe": "model.language_model.layers"}
MODELS = tuple(PREFIX)


def quantize(source: Path, out: Path) -> Path:
    quantize_checkpoint(plan_checkpoint(source, PolarQuantConfig(), awq=False), out)
    return out


def fused(zoo: Any, name: str, folder: Path) -> Path:
    """The checkpoint with the experts of each layer in two tensors, as Qwen3.5-35B-A3B is published."""
    content, model = zoo.read(zoo.checkpoint(name)), zoo.model(name, torch.bfloat16)
    content.tensors = {key: tensor for key, tensor in content.tensors.items() if ".experts." not in key}
    state = {key: tensor.cpu() for key, tensor in model.state_dict().items() if ".experts." in key}
    assert len(state) == 4
    content.tensors |= state
    return content.write(folder)


def broken(zoo: Any, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    content = zoo.read(zoo.checkpoint("qwen3_moe"))
    change(content.tensors)
    return content.write(folder)


@pytest.mark.parametrize("name", MODELS)
def test_both_layouts_give_the_same_bytes(zoo: Any, name: str, tmp_path: Path) -> None:
    stored = zoo.read(zoo.checkpoint(name)).tensors
    singles = [key for key in stored if key.startswith(f"{PREFIX[name]}.0.mlp.experts.")]
    assert len(singles) == 4 * 3  # or the two would be the same
    from_singles = quantize(zoo.checkpoint(name), tmp_path / "from-singles")
    from_fused = quantize(fused(zoo, name, tmp_path / "fused"), tmp_path / "from-fused")
    made, expected = (zoo.read(folder).tensors for folder in (from_fused, from_singles))
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[key], expected[key]) for key in made)
    assert made[f"{PREFIX[name]}.0.mlp.experts.gate_up_proj.packed"].shape == (4, 256, 80)
    assert made[f"{PREFIX[name]}.0.mlp.experts.down_proj.norms"].shape == (4, 128, 1)
    assert made[f"{PREFIX[name]}.0.mlp.gate.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", MODELS)
def test_fused_plain_checkpoints_load(zoo: Any, name: str, tmp_path: Path) -> None:
    loaded = load_model(fused(zoo, name, tmp_path / "fused"), device=zoo.device, dtype=torch.float32)
    assert torch.equal(zoo.logits(name, loaded), zoo.logits(name, zoo.model(name)))


def test_a_model_that_was_read_expert_by_expert_saves_fused(zoo: Any, tmp_path: Path) -> None:
    model = load_model(zoo.checkpoint("qwen3_moe"), device="cpu")  # as `quantize` below
    patch_model(model)
    model.save_pretrained(tmp_path / "saved")
    expected = (quantize(zoo.checkpoint("qwen3_moe"), tmp_path / "out") / "model.safetensors").read_bytes()
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == expected


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("awq", [False, True])
def test_quantised_experts_one_by_one(zoo: Any, name: str, awq: bool, tmp_path: Path) -> None:
    """Read as the fused ones are, and saved as those: by transformers and layer by layer."""
    folder = zoo.quantized(name, awq)
    single = zoo.read(folder).with_single_experts().write(tmp_path / "single")
    assert f"{PREFIX[name]}.1.mlp.experts.3.up_proj.norms" in zoo.read(single).tensors
    assert torch.equal(zoo.logits(name, zoo.load(name, single)), zoo.logits(name, zoo.load(name, folder)))
    load_model(single, device="cpu").save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    found, expected = (verify_checkpoint(where, zoo.checkpoint(name), zoo.device) for where in (single, folder))
    assert found.layer_errors == expected.layer_errors


def test_quantised_single_experts_that_do_not_fit(zoo: Any, tmp_path: Path) -> None:
    content = zoo.read(zoo.quantized("qwen3_moe", awq=True)).with_single_experts()
    content.tensors.pop(f"{EXPERTS}.2.up_proj.norms")
    content.tensors[f"{EXPERTS}.1.down_proj.packed"] = content.tensors[f"{EXPERTS}.1.down_proj.packed"][1:].clone()
    with pytest.raises(CheckpointError) as caught:
        load_model(content.write(tmp_path / "tensors"), device="cpu")
    assert f"{EXPERTS}.2.up_proj.norms is missing" in str(caught.value)
    assert f"{EXPERTS}.1.down_proj.packed must be torch.uint8" in str(caught.value)


def test_quantised_single_experts_share_their_scales(zoo: Any, tmp_path: Path) -> None:
    content = zoo.read(zoo.quantized("qwen3_moe", awq=True)).with_single_experts()
    content.tensors[f"{EXPERTS}.2.up_proj.awq_scales"][5] *= 2
    folder = content.write(tmp_path / "scales")
    with pytest.raises(CheckpointError, match=r"experts.gate_up_proj.awq_scales must be the same for all experts"):
        load_model(folder, device="cpu")
    with pytest.raises(CheckpointError, match=r"2.up_proj.awq_scales must be equal to .*0.gate_proj.awq_scales"):
        verify_checkpoint(folder, zoo.checkpoint("qwen3_moe"), "cpu")


def test_quantised_single_experts_have_the_same_bits(zoo: Any, tmp_path: Path) -> None:
    content = zoo.read(zoo.quantized("qwen3_moe")).with_single_experts()
    bits = json.loads(content.metadata["bits_per_tensor"])
    bits[f"{EXPERTS}.2.up_proj"] = 4
    content.metadata["bits_per_tensor"] = json.dumps(bits)
    with pytest.raises(CheckpointError, match=f"says 5 and 4 for experts of {EXPERTS}.gate_up_proj"):
        load_model(content.write(tmp_path / "bits"), device="cpu")


def remove(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(name)] and None


def cut(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: tensors[name][:-1].clone()})


def rename(name: str, other: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({other: tensors.pop(name)})


PROBLEMS = {
    "a projection is missing": (remove(f"{EXPERTS}.2.up_proj"), [f"{EXPERTS}.2.up_proj.weight is missing"]),
    "an expert is missing": (
        remove(f"{EXPERTS}.0."),
        [f"{EXPERTS}.0.{leaf}_proj.weight is missing" for leaf in ("gate", "up", "down")],
    ),
    "the last expert is missing": (
        remove(f"{EXPERTS}.3."),
        [
            f"model.safetensors: {EXPERTS}.gate_up_proj must be a float dtype [4, 256, 128], found torch.bfloat16 "
            "[3, 256, 128], put together from the tensors of 3 experts"
        ],
    ),
    "all experts are missing": (remove(f"{EXPERTS}."), [f"{EXPERTS}.gate_up_proj is missing"]),
    "another shape": (
        cut(f"{EXPERTS}.1.gate_proj.weight"),
        [
            f"model.safetensors: {EXPERTS}.1.gate_proj.weight must be torch.bfloat16 [128, 128] as most are, found "
            "torch.bfloat16 [127, 128]"
        ],
    ),
    "another dtype": (
        lambda tensors: tensors.update({f"{EXPERTS}.3.down_proj.weight": torch.zeros(128, 128)}),
        [f"{EXPERTS}.3.down_proj.weight must be torch.bfloat16 [128, 128] as most are, found torch.float32 [128, 128]"],
    ),
    "a number that is no expert's": (
        rename(f"{EXPERTS}.3.down_proj.weight", f"{EXPERTS}.999999999999.down_proj.weight"),
        [f"{EXPERTS}.3.down_proj.weight is missing"],
    ),
    "one dimension": (
        lambda tensors: tensors.update({k: t.flatten() for k, t in tensors.items() if k.startswith(f"{EXPERTS}.")}),
        [f"model.safetensors: {EXPERTS}.0.gate_proj.weight must have two dimensions"],
    ),
    "both layouts": (
        lambda tensors: tensors.update({f"{EXPERTS}.down_proj": torch.zeros(4, 128, 128)}),
        [f"model.safetensors: {EXPERTS}.down_proj is there twice: fused, and expert by expert"],
    ),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("reader", ["load_model", "quantize"])
def test_experts_that_do_not_fit(zoo: Any, problem: str, reader: str, tmp_path: Path) -> None:
    change, expected = PROBLEMS[problem]
    folder = broken(zoo, tmp_path / "bad", change)
    with pytest.raises(CheckpointError) as caught:
        load_model(folder) if reader == "load_model" else quantize(folder, tmp_path / "out")
    assert all(text in str(caught.value) for text in expected)
    assert not (tmp_path / "out").exists()


def test_a_quantised_checkpoint_without_an_expert(zoo: Any, tmp_path: Path) -> None:
    content = zoo.read(zoo.quantized("qwen3_moe"))
    for part in ("packed", "norms"):
        content.tensors[f"{EXPERTS}.down_proj.{part}"] = content.tensors[f"{EXPERTS}.down_proj.{part}"][:-1].clone()
    del content.tensors[f"{EXPERTS}.gate_up_proj.norms"]
    folder = content.write(tmp_path / "bad")
    for load in (load_model, lambda where: zoo.load("qwen3_moe", where)):
        with pytest.raises(CheckpointError) as caught:
            load(folder)
        assert f"{EXPERTS}.gate_up_proj.norms is missing" in str(caught.value)
        assert f"model.safetensors: {EXPERTS}.down_proj.packed must be torch.uint8 [4, 128, 80]" in str(caught.value)


def test_a_bad_norm_names_the_expert(zoo: Any, tmp_path: Path) -> None:
    content = zoo.read(zoo.quantized("qwen3_moe"))
    content.tensors[f"{EXPERTS}.down_proj.norms"][2, 5, 0] = torch.nan
    folder = content.write(tmp_path / "bad")
    found = rf"model\.safetensors: {EXPERTS}\.down_proj\.norms must be .*; found nan at expert 2, row 5, block 0"
    for check in (load_model, verify_checkpoint):
        with pytest.raises(CheckpointError, match=found):
            check(folder)


def test_a_weight_that_cannot_be_quantised_names_the_expert(zoo: Any, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{EXPERTS}.2.down_proj.weight"][3, 1] = torch.inf

    with pytest.raises(Exception, match=r"model\.safetensors: model\.layers\.1\.mlp\.experts\.down_proj: expert 2: "):
        quantize(broken(zoo, tmp_path / "bad", spoil), tmp_path / "out")


def test_excluding_one_projection_excludes_both(zoo: Any, tmp_path: Path) -> None:
    model = zoo.model("qwen3_moe")
    report = patch_model(model, PolarQuantConfig(modules_to_not_convert=["*.layers.1.mlp.experts.down_proj"]))
    excluded = {f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"}
    assert {name for name, reason in report.kept.items() if reason == "excluded"} == excluded
    assert isinstance(model.model.layers[0].mlp.experts, PolarExperts)
    assert not isinstance(model.model.layers[1].mlp.experts, PolarExperts)
    model.save_pretrained(tmp_path / "saved")
    assert set(zoo.read(tmp_path / "saved").config["quantization_config"]["modules_to_not_convert"]) == excluded
    for load in (load_model, lambda where: zoo.load("qwen3_moe", where)):
        assert torch.equal(zoo.logits("qwen3_moe", load(tmp_path / "saved")), zoo.logits("qwen3_moe", model))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_any_experts_implementation(zoo: Any, implementation: str) -> None:
    model = zoo.model("qwen3_5_moe")
    patch_model(model)
    expected = zoo.logits("qwen3_5_moe", model)
    model.set_experts_implementation(implementation)
    assert torch.equal(zoo.logits("qwen3_5_moe", model), expected)


def test_experts_of_another_activation(zoo: Any) -> None:
    model = zoo.model("qwen3_moe")
    model.config.hidden_act = "gelu"
    with pytest.raises(UnsupportedModelError, match=r"hidden_act 'silu' in config\.json, found 'gelu'"):
        patch_model(model)


def test_experts_are_not_quantised_on_the_fly(zoo: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="experts are not quantised on the fly"):
        zoo.load("qwen3_moe", zoo.checkpoint("qwen3_moe"), quantization_config=PolarQuantConfig())


class _Parts(nn.Module):
    """Experts computed one after the other, which keep what each projection reads and gives."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts, self.parts = experts, []

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for expert in range(len(self.experts.gate_up_proj)):
            token, choice = (index == expert).nonzero(as_tuple=True)
            middle = x[token] @ self.experts.gate_up_proj[expert].T
            gate, up = middle.chunk(2, -1)
            read = F.silu(gate) * up
            result = read @ self.experts.down_proj[expert].T
            out = out.index_add(0, token, result * weights[token, choice, None])
            self.parts.append({"in": (x[token], middle), "out": (read, result)})
        return out


def test_moments_of_experts_by_hand(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that saw enough tokens their own, of the others all experts'."""
    model = zoo.model("qwen3_moe")
    windows = torch.randint(0, 500, (1, 32), generator=torch.Generator().manual_seed(3))
    sites = {
        "layers.1.mlp.experts.in": [f"{EXPERTS}.gate_up_proj"],
        "layers.1.mlp.experts.out": [f"{EXPERTS}.down_proj"],
    }
    monkeypatch.setattr(expert_moments, "EXPERT_ROWS", 14)
    found = collect_moments(model, windows, sites)

    experts = _Parts(model.model.layers[1].mlp.experts)
    model.model.layers[1].mlp.experts = experts
    logits = model(windows.to(zoo.device), use_cache=False).logits[0].float()
    draw = torch.Generator(zoo.device).manual_seed(0)
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)[:, 0]
    given = [part[end][1] for part in experts.parts for end in ("in", "out")]
    gradients = torch.autograd.grad(F.cross_entropy(logits, drawn, reduction="sum"), given)
    counts = [len(part["in"][0]) for part in experts.parts]
    rare = [expert for expert, count in enumerate(counts) if count < 14]
    assert 0 < len(rare) < 4
    assert found.rare_experts == {"layers.1.mlp.experts": rare}
    for end, offset in (("in", 0), ("out", 1)):
        own = []
        for part, gradient in zip(experts.parts, gradients[offset::2], strict=True):
            weights = gradient.square().sum(-1)
            x = part[end][0].detach()
            own.append((x * weights.clamp_max(torch.quantile(weights, 0.99))[:, None]).T @ x)
        moments = found.of_site[f"layers.1.mlp.experts.{end}"]
        for expert, expected in enumerate(own):
            expected = sum(own) if expert in rare else expected
            torch.testing.assert_close(moments[expert], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_an_expert_without_tokens_has_the_sites_moments(zoo: Any) -> None:
    model = zoo.model("qwen3_moe")
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[1:3] = model.model.layers[1].mlp.gate.weight[
            0
        ]  # ties, none of which wins
    sites = {"layers.1.mlp.experts.in": [f"{EXPERTS}.gate_up_proj"]}
    found = collect_moments(model, torch.full((1, 40), 7), sites)
    (rare,) = found.rare_experts.values()
    assert len(rare) == 2
    moments = found.of_site["layers.1.mlp.experts.in"]
    assert torch.equal(moments[rare[0]], moments[rare[1]])
    assert all(moments[expert].trace() > 0 for expert in range(4))


def test_moments_of_many_wide_experts_are_shared(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = zoo.model("qwen3_moe"), torch.randint(0, 500, (2, 64))
    monkeypatch.setattr(expert_moments, "EXPERT_ROWS", 1)
    sites = {"layers.1.mlp.experts.in": [f"{EXPERTS}.gate_up_proj"]}
    own = collect_moments(model, windows, sites).of_site["layers.1.mlp.experts.in"]
    assert own.shape == (4, 128, 128)
    monkeypatch.setattr(expert_moments, "_OWN_BYTES", own.nbytes - 1)
    shared = collect_moments(model, windows, sites).of_site["layers.1.mlp.experts.in"]
    torch.testing.assert_close(shared, own.sum(0), rtol=1e-4, atol=1e-5 * float(shared.abs().max()))


def test_feedback(zoo: Any, tiny_moe: Path, prose: Path, tmp_path: Path) -> None:
    """Each expert's outputs for its own tokens are closer than without."""
    options = ("--calibration", prose, "--windows", 1, "--no-awq", "--bits", 3, "--device", "cpu")
    for out, more in (("plain", ()), ("fed", ("--feedback",))):
        args = ["quantize", str(tiny_moe), str(tmp_path / out), *map(str, (*options, *more))]
        result = CliRunner().invoke(app, args)
        assert result.exit_code == 0, result.output
    plan = plan_checkpoint(tiny_moe, PolarQuantConfig(), awq=False)
    moments = calibrate_plan(plan, prose, "cpu", 1, feedback=True).moments
    original, plain, fed = (
        load_model(path, device="cpu", dtype=torch.float32) for path in (tiny_moe, tmp_path / "plain", tmp_path / "fed")
    )
    for name in ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"):
        costs = []
        for model in (plain, fed):
            error = model.get_submodule(name).dequantize(torch.float32) - original.get_parameter(name)
            costs.append(torch.einsum("enk,ekl,enl->e", error, moments[name], error))
        assert (costs[1] < 0.8 * costs[0]).all()


def test_published_layouts_of_experts_are_refused(zoo: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="published layouts of mixtures of experts"):
        convert_checkpoint(zoo.checkpoint("qwen3_moe"), tmp_path / "out")


def test_experts_that_saw_too_few_tokens_are_listed(
    zoo: Any, tiny_moe: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_checkpoint(tiny_moe, PolarQuantConfig(), awq=True)
    assert calibrate_plan(plan, prose, zoo.device, 1).rare_experts == {}
    monkeypatch.setattr(sys.modules[calibrate.__module__], "EXPERT_ROWS", 513)  # more than the tokens there are
    layer = "layers.0.mlp.experts"
    assert calibrate_plan(plan, prose, zoo.device, 1).rare_experts == {layer: [0, 1, 2, 3]}
    options = ("--calibration", prose, "--windows", 1)
    result = CliRunner().invoke(app, ["quantize", str(tiny_moe), str(tmp_path / "out"), *map(str, options)])
    assert f"warning: {layer}: experts 0, 1, 2, 3 saw fewer than" in result.stderr


class _Watched(nn.Module):
    """Experts computed one token at a time, which note what down_proj reads."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts, self.inputs, self.middle, self.index = experts, [], [], []

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self.inputs.append(x)
        self.index.append(index)
        for row, chosen in zip(x, index.tolist(), strict=True):
            for expert in chosen:
                gate, up = (self.experts.gate_up_proj[expert] @ row).chunk(2)
                self.middle.append(F.silu(gate) * up)
        return self.experts(x, index, weights)


def test_statistics_of_experts(zoo: Any) -> None:
    model = zoo.model("qwen3_moe")
    windows = torch.randint(0, 500, (2, 16), generator=torch.Generator().manual_seed(3)).to(zoo.device)
    sites = {"in": [f"{EXPERTS}.gate_up_proj"], "out": [f"{EXPERTS}.down_proj"]}
    found = calibrate(model, windows, sites)
    watched = _Watched(model.model.layers[1].mlp.experts)
    model.model.layers[1].mlp.experts = watched
    with torch.no_grad():
        for window in windows:
            model(window[None])
    inputs, middle = torch.cat(watched.inputs).cpu(), torch.stack(watched.middle).cpu()
    torch.testing.assert_close(found["in"].mean_abs, inputs.abs().mean(0))
    torch.testing.assert_close(found["in"].sample, inputs)
    torch.testing.assert_close(found["out"].mean_abs, middle.abs().mean(0))
    assert found["out"].sample.shape == middle.shape  # in another order
    torch.testing.assert_close(found["out"].sample.sum(0), middle.sum(0), rtol=1e-4, atol=1e-5)
    index = torch.cat(watched.index).cpu()
    for expert in range(4):
        own, places = inputs[(index == expert).any(-1)], index.flatten() == expert
        assert len(own) > 0
        torch.testing.assert_close(found["in"].expert_samples[expert], own[:EXPERT_ROWS])
        torch.testing.assert_close(found["out"].expert_samples[expert], middle[places][:EXPERT_ROWS])
    assert found["in"].rare_experts == [e for e in range(4) if (index == e).sum() < EXPERT_ROWS] != []


def relative_error_of(sample: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> float:
    made = PolarExpertProjection.from_dense(weight[None], 3, awq_scales=scales).dequantize(torch.float32)[0]
    return float(((made - weight) @ sample.T).square().sum() / (weight @ sample.T).square().sum())


def test_scales_are_those_that_suit_the_tokens_of_each_expert() -> None:
    """Experts that saw enough tokens are judged by their own, the last one by the site's."""
    generator = torch.Generator().manual_seed(4)
    loud = torch.ones(128).index_fill(0, torch.arange(6), 30.0)
    site = torch.randn(64, 128, generator=generator) * loud
    quiet = torch.randn(EXPERT_ROWS, 128, generator=generator)
    weight = torch.randn(3, 16, 128, generator=generator)
    chosen = {}
    for name, samples in {"quiet": (quiet, quiet, quiet), "rare": (quiet, quiet[:-1], quiet[:-1])}.items():
        statistics = SiteStatistics(site.abs().mean(0), site, samples)
        judged = [site if expert in statistics.rare_experts else quiet for expert in range(3)]
        scales, chosen[name] = search_expert_scales(statistics, weight, 3)
        found = [sum(map(relative_error_of, judged, weight, [s] * 3)) for s in (scales, torch.ones(128).half())]
        assert found[0] <= found[1] * (1 + 1e-5)
    assert chosen["quiet"] < 0.1  # the loud channels are none of theirs
    assert chosen["rare"] > 0.2


@pytest.fixture(scope="module")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE of one layer with the tokenizer of the embedded model."""
    folder = tmp_path_factory.mktemp("moe") / "plain"
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "num_hidden_layers": 1, "vocab_size": 4096, "head_dim": 32, "num_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **heads, **experts)).bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder)
    return folder


def polar(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_commands_take_a_mixture_of_experts(tiny_moe: Path, prose: Path, tmp_path: Path) -> None:
    out, plain = tmp_path / "q5", tmp_path / "plain"
    polar("quantize", tiny_moe, out, "--calibration", prose, "--windows", 1)
    layer = "model.layers.0.mlp.experts.gate_up_proj"
    assert Checkpoint.open(out).tensors[f"{layer}.awq_scales"].shape == (128,)
    assert f'"{layer}"' in polar("inspect", out, "--json")
    assert f'"{layer}"' in polar("inspect", tiny_moe, "--json")
    assert f'"{layer}"' in polar("verify", out, "--against", tiny_moe, "--json")
    assert "kl_divergence" in polar("ppl", out, "--text", prose, "--against", tiny_moe, "--json")
    assert polar("generate", out, "The kernel", "--max-new-tokens", 3)
    polar("dequantize", out, plain, "--dtype", "float32")
    logits = [_logits(load_model(folder, device="cpu", dtype=torch.float32)) for folder in (out, plain)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def _logits(model: PreTrainedModel) -> torch.Tensor:
    return model(torch.arange(1, 12)[None]).logits
