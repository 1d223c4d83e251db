"""`patch_model`: which modules change, what the changed model computes, what it holds, and what is refused."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from model_patch import ConfigError, PatchReport, PolarQuantConfig, UnsupportedModelError, load_model, patch_model
from model_patch.architectures import weight_name
from polar_kernels import ArgumentError, PolarEmbedding, PolarLinear, PolarModule, QuantizationError, TiedPolarHead

TIED = ("qwen2_tied_odd", "qwen3_tied", "qwen3_vl_tied")
ROUNDING = (
    1e-5  # relative, of fp32 sums in another order through a whole model; 5 bits change logits 2000 times as much
)
DENSE = (nn.Linear, nn.Embedding)
Distance = Callable[[torch.Tensor, torch.Tensor], float]


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def polar_modules(model: nn.Module) -> dict[str, PolarModule]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PolarModule)}


def erase(model: nn.Module) -> None:
    """Zero all that the quantised layers hold, in whatever layout."""
    for module in polar_modules(model).values():
        for tensor in module.buffers():
            tensor.zero_()


def dense_twin(zoo: Any, architecture: str, patched: PreTrainedModel) -> PreTrainedModel:
    """The unpatched model with each weight that `patched` quantised replaced by its dequantised values."""
    twin = zoo.model(architecture)
    for name, module in polar_modules(patched).items():
        twin.get_parameter(weight_name(name)).data.copy_(module.dequantize(torch.float32))
    return twin


def decoder_of(model: PreTrainedModel) -> str:
    return "model.language_model" if hasattr(model.model, "language_model") else "model"


def test_layer_types_of_a_hybrid_model(zoo: Any, layer_types: Callable[[nn.Module], dict[str, str]]) -> None:
    model = zoo.model("qwen3_5_text")
    before = layer_types(model)
    assert set(before.values()) == {"Linear", "Embedding"}
    patch_model(model)
    assert layer_types(model) == {
        "model.embed_tokens": "PolarEmbedding",
        "model.layers.0.linear_attn.in_proj_qkv": "PolarLinear",
        "model.layers.0.linear_attn.in_proj_z": "PolarLinear",
        "model.layers.0.linear_attn.in_proj_a": "Linear",
        "model.layers.0.linear_attn.in_proj_b": "Linear",
        "model.layers.0.linear_attn.out_proj": "PolarLinear",
        "model.layers.1.self_attn.q_proj": "PolarLinear",
        "model.layers.1.self_attn.k_proj": "PolarLinear",
        "model.layers.1.self_attn.v_proj": "PolarLinear",
        "model.layers.1.self_attn.o_proj": "PolarLinear",
        **{f"model.layers.{i}.mlp.{leaf}_proj": "PolarLinear" for i in (0, 1) for leaf in ("gate", "up", "down")},
        "lm_head": "PolarLinear",
    }


def test_every_projection_is_replaced_and_the_report_says_so(
    zoo: Any, architecture: str, layer_types: Callable[[nn.Module], dict[str, str]]
) -> None:
    model = zoo.model(architecture)
    before = layer_types(model)
    report = patch_model(model)
    after = layer_types(model)
    assert after.keys() == before.keys()
    head = {"lm_head"} if architecture in TIED else set()
    assert {name for name in before if after[name] != before[name]} == set(report.replaced) | head
    assert {name for name, kind in after.items() if kind == "TiedPolarHead"} == head
    assert report.tied_head == ("lm_head" if head else None)
    assert set(report.kept) == {name for name, kind in after.items() if kind in ("Linear", "Embedding")}
    assert set(report.replaced.values()) == {5}
    assert f"{decoder_of(model)}.embed_tokens" in report.replaced
    assert all(reason for reason in report.kept.values())


def test_report_counts_bytes_and_prints_them(zoo: Any, architecture: str) -> None:
    model = zoo.model(architecture, torch.bfloat16)
    dense = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    report = patch_model(model, PolarQuantConfig(4))
    state = model.state_dict()
    stored = sum(tensor.nbytes for key, tensor in state.items() if key.endswith((".packed", ".norms")))
    assert report.bytes_before == sum(dense[weight_name(name)] for name in report.replaced)
    assert report.bytes_after == stored
    text = str(report)
    assert text.startswith(f"{len(report.replaced)} layers quantised, {report.bytes_before / 1e6:.1f} MB -> ")
    assert f"{len(report.kept)} kept" in text
    assert text.endswith("lm_head shares the embedding") == (architecture in TIED)


def test_str_of_a_report() -> None:
    report = PatchReport({"a": 5, "b": 4}, {"c": "excluded"}, "lm_head", 12_340_000, 4_560_000)
    assert str(report) == "2 layers quantised, 12.3 MB -> 4.6 MB; 1 kept; lm_head shares the embedding"


@pytest.mark.parametrize("bits", [5, 3])
def test_logits_are_those_of_the_dequantised_weights(
    zoo: Any, architecture: str, bits: int, relative_error: Distance
) -> None:
    model = zoo.model(architecture)
    original = zoo.logits(architecture, model)
    patch_model(model, PolarQuantConfig(bits))
    logits = zoo.logits(architecture, model)
    expected = zoo.logits(architecture, dense_twin(zoo, architecture, model))
    assert relative_error(logits, expected) < ROUNDING
    assert relative_error(original, expected) > 0.02  # or the comparison would show nothing


def test_logits_with_awq_scales(zoo: Any, architecture: str, relative_error: Distance) -> None:
    model = zoo.model(architecture)
    scales = zoo.awq_scales(model)
    patch_model(model, awq_scales=scales)
    for name, scale in scales.items():
        assert torch.equal(model.get_submodule(name).awq_scales.cpu(), scale.half())
    expected = zoo.logits(architecture, dense_twin(zoo, architecture, model))
    assert relative_error(zoo.logits(architecture, model), expected) < ROUNDING


def test_mixed_bits_and_exclusions(zoo: Any, relative_error: Distance) -> None:
    model = zoo.model("qwen3_5_text")
    report = patch_model(model, PolarQuantConfig(4, {"*.mlp.*": 2, "lm_head": 8}, ["embed_tokens", "*.in_proj_z"]))
    bits = {name: module.bits for name, module in polar_modules(model).items()}
    assert bits == report.replaced
    assert set(bits.values()) == {2, 4, 8}
    assert bits["lm_head"] == 8
    assert report.kept["model.embed_tokens"] == report.kept["model.layers.0.linear_attn.in_proj_z"] == "excluded"
    assert type(model.model.embed_tokens) is nn.Embedding
    expected = zoo.logits("qwen3_5_text", dense_twin(zoo, "qwen3_5_text", model))
    assert relative_error(zoo.logits("qwen3_5_text", model), expected) < ROUNDING


def test_what_is_kept_is_the_same_object_with_the_same_values(zoo: Any, architecture: str) -> None:
    model = zoo.model(architecture)
    before = dict(model.named_modules())
    values = {name: tensor.clone() for name, tensor in tensors(model).items()}
    report = patch_model(model)
    after = dict(model.named_modules())
    changed = {*report.replaced, report.tied_head}
    kept = {name: module for name, module in before.items() if name not in changed and ".experts" not in name}
    assert all(after[name] is module for name, module in kept.items())
    dense = {weight_name(name) for name in changed if name is not None}
    kept = {name: value for name, value in values.items() if name not in dense}
    assert len(kept) > len(report.replaced) / 2  # norms at least
    now = tensors(model)
    assert all(torch.equal(now[name], value) for name, value in kept.items())


@pytest.mark.parametrize("vision_language", ["qwen3_5", "qwen3_vl_tied"])
def test_the_vision_tower_holds_no_quantised_layer(zoo: Any, vision_language: str) -> None:
    model = zoo.model(vision_language)
    report = patch_model(model)
    assert not polar_modules(model.model.visual)
    towers = [name for name, reason in report.kept.items() if reason == "vision tower"]
    assert towers == [n for n in report.kept if n.startswith("model.visual.")] != []


def test_biases_are_kept(zoo: Any) -> None:
    model = zoo.model("qwen2_tied_odd")
    attention = model.model.layers[1].self_attn
    biases = {leaf: getattr(attention, leaf).bias.clone() for leaf in ("q_proj", "k_proj", "v_proj")}
    assert all(bias.abs().min() > 0 for bias in biases.values())
    patch_model(model)
    assert all(torch.equal(getattr(attention, leaf).bias, bias) for leaf, bias in biases.items())
    assert attention.o_proj.bias is None


def test_training_mode_and_gradient_flags_survive(zoo: Any) -> None:
    model = zoo.model("qwen3").train()
    patch_model(model)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_awq_scales_for_some_layers_give_the_others_ones(zoo: Any) -> None:
    model = zoo.model("qwen3_5_text")
    chosen = "model.layers.1.mlp.down_proj"
    scale = torch.linspace(0.5, 2, 256)
    patch_model(model, awq_scales={chosen: scale})
    linear = {name: m for name, m in polar_modules(model).items() if isinstance(m, PolarLinear)}
    for name, module in linear.items():
        expected = scale.half() if name == chosen else torch.ones(module.in_features).half()
        assert torch.equal(module.awq_scales.cpu(), expected)
    assert model.model.embed_tokens.awq_scales is None
    assert model.config.quantization_config.awq is True


def test_layers_of_a_site_do_not_share_one_scale_tensor(zoo: Any) -> None:
    """safetensors refuses tensors that share memory."""
    model = zoo.model("qwen3")
    patch_model(model, awq_scales=zoo.awq_scales(model))
    pointers = [tensor.data_ptr() for name, tensor in model.state_dict().items() if name.endswith("awq_scales")]
    assert len(set(pointers)) == len(pointers) == 2 * 7 + 1


def test_awq_scales_of_a_wrong_shape_name_the_layer(zoo: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^model\.layers\.0\.mlp\.up_proj: .*\[128\], found \[256\]"):
        patch_model(zoo.model("qwen3"), awq_scales={"model.layers.0.mlp.up_proj": torch.ones(256)})


def test_no_tensor_is_as_large_as_an_unpacked_weight(zoo: Any, architecture: str) -> None:
    model = load_model(zoo.quantized(architecture), device=zoo.device, dtype=torch.bfloat16)
    modules = polar_modules(model)
    for name, module in modules.items():
        dense = module.dequantize(torch.bfloat16).nbytes
        assert max(tensor.nbytes for tensor in tensors(module).values()) < dense / 2, name
    unquantised = load_model(zoo.checkpoint(architecture), device=zoo.device, dtype=torch.bfloat16)
    plain = sum(tensor.nbytes for tensor in tensors(unquantised).values())
    dense = sum(module.dequantize(torch.bfloat16).nbytes for module in modules.values())
    stored = sum(tensor.nbytes for module in modules.values() for tensor in module.buffers())
    padding = 1.33 if architecture == "qwen2_tied_odd" else 1  # 192 columns are stored as 256
    assert stored < 0.33 * padding * dense  # 5 bits and a norm of 16 for 128 weights are 0.32 of 16 bits
    assert sum(tensor.nbytes for tensor in tensors(model).values()) == plain - dense + stored


def test_the_tied_pair_is_one_set_of_tensors(zoo: Any) -> None:
    model = zoo.model("qwen3_tied")
    patch_model(model)
    assert isinstance(model.lm_head, TiedPolarHead)
    assert isinstance(model.model.embed_tokens, PolarEmbedding)
    assert model.lm_head.embedding is model.model.embed_tokens
    assert not [name for name in model.state_dict() if name.startswith("lm_head")]


@pytest.mark.parametrize("excluded", ["lm_head", "embed_tokens"])
def test_an_excluded_tied_pair_stays_tied(zoo: Any, excluded: str, relative_error: Distance) -> None:
    model = zoo.model("qwen3_tied")
    report = patch_model(model, PolarQuantConfig(modules_to_not_convert=[excluded]))
    assert report.tied_head is None
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = zoo.logits("qwen3_tied", dense_twin(zoo, "qwen3_tied", model))
    assert relative_error(zoo.logits("qwen3_tied", model), expected) < ROUNDING


def test_a_deep_copy_is_a_model_of_its_own(zoo: Any, architecture: str) -> None:
    model = zoo.model(architecture)
    patch_model(model)
    logits = zoo.logits(architecture, model)
    copied = deepcopy(model)
    shared = {t.data_ptr() for t in tensors(model).values() if t.numel()} & {
        t.data_ptr() for t in tensors(copied).values() if t.numel()
    }
    assert not shared
    erase(model)
    assert torch.equal(zoo.logits(architecture, copied), logits)
    assert not torch.equal(zoo.logits(architecture, model), logits)


def test_a_deep_copy_saves_itself(zoo: Any, tmp_path: Any) -> None:
    model = zoo.model("qwen3_tied")
    patch_model(model)
    copied = deepcopy(model)
    erase(model)
    copied.save_pretrained(tmp_path / "copy")
    loaded = load_model(tmp_path / "copy", device=zoo.device)
    assert torch.equal(zoo.logits("qwen3_tied", loaded), zoo.logits("qwen3_tied", copied))


def test_dequantize_gives_plain_layers_and_the_same_logits(
    zoo: Any, architecture: str, relative_error: Distance, layer_types: Callable[[nn.Module], dict[str, str]]
) -> None:
    model = zoo.model(architecture)
    types = layer_types(model)
    patch_model(model)
    logits = zoo.logits(architecture, model)
    model.dequantize()
    assert layer_types(model) == types
    assert relative_error(zoo.logits(architecture, model), logits) < ROUNDING
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (architecture in TIED)


@pytest.mark.parametrize("name", ["qwen2_tied_odd", "qwen3_5"])
def test_a_dequantised_model_saves_as_a_plain_one(zoo: Any, tmp_path: Any, name: str) -> None:
    model = zoo.model(name)
    patch_model(model)
    model.dequantize()
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in zoo.read(tmp_path / "plain").config
    loaded = load_model(tmp_path / "plain", device=zoo.device)
    assert not polar_modules(loaded)
    assert torch.equal(zoo.logits(name, loaded), zoo.logits(name, model))


def test_dequantised_biases_survive(zoo: Any) -> None:
    model = zoo.model("qwen2_tied_odd")
    bias = model.model.layers[0].self_attn.q_proj.bias.clone()
    patch_model(model)
    model.dequantize()
    assert torch.equal(model.model.layers[0].self_attn.q_proj.bias, bias)


def test_patching_twice_is_refused(zoo: Any) -> None:
    model = zoo.model("qwen3")
    patch_model(model)
    modules = polar_modules(model)
    with pytest.raises(UnsupportedModelError, match="quantised already"):
        patch_model(model)
    assert all(model.get_submodule(name) is module for name, module in modules.items())


def test_a_loaded_quantised_model_is_not_patched_again(zoo: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="quantised already"):
        patch_model(load_model(zoo.quantized("qwen3"), device=zoo.device))


def test_an_unknown_architecture_is_refused_and_untouched() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModelError, match=r"'llama' is not supported; known are .*qwen3_5 \(Qwen3.5\)"):
        patch_model(model)
    assert not polar_modules(model)


def test_a_module_without_a_config_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="architecture None"):
        patch_model(nn.Sequential(nn.Linear(128, 128)))  # type: ignore[arg-type]


def test_nothing_left_to_quantise_is_refused(zoo: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="no layer to quantise"):
        patch_model(zoo.model("qwen3"), PolarQuantConfig(modules_to_not_convert=["*"]))


def test_a_pattern_that_matches_nothing_leaves_the_model_untouched(zoo: Any) -> None:
    model = zoo.model("qwen3")
    with pytest.raises(ConfigError, match="no_such"):
        patch_model(model, PolarQuantConfig(modules_to_not_convert=["no_such"]))
    assert not polar_modules(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", ["model.layers.1.self_attn.v_proj", "model.embed_tokens"])
def test_a_weight_that_is_not_finite_names_its_layer_and_place(zoo: Any, layer: str, value: float) -> None:
    model = zoo.model("qwen3")
    model.get_submodule(layer).weight.data[3, 7] = value
    with pytest.raises(QuantizationError, match=rf"^{layer}: .*\[3, 7\] = {value}"):
        patch_model(model)
