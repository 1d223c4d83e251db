"""Which layers are quantised, by their names, and what a config makes of them."""

import json
from typing import Any

import pytest
import torch
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from model_patch import ConfigError, PolarError, PolarQuantConfig, UnsupportedModelError
from model_patch.architectures import (
    SUPPORTED,
    Kind,
    canonical,
    check_model_type,
    is_vision_language,
    keep_reason,
    names_of_kind,
    role_of,
)
from polar_kernels.hadamard import BLOCK_SIZE

LAYER = "model.language_model.layers.0"
ATTENTION = [f"{LAYER}.self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")]
MLP = [f"{LAYER}.mlp.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")]
EMBEDDING, HEAD = "model.language_model.embed_tokens", "lm_head"
NAMES = [EMBEDDING, *ATTENTION, *MLP, "model.visual.merger.linear_fc1", HEAD]


@pytest.mark.parametrize("prefix", ["", "model.", "model.language_model.", "language_model.model.", "language_model."])
def test_canonical_drops_every_known_prefix(prefix: str) -> None:
    assert canonical(f"{prefix}layers.7.mlp.up_proj.weight") == "layers.7.mlp.up_proj.weight"


def test_canonical_keeps_the_names_of_the_other_parts() -> None:
    assert canonical("lm_head.weight") == "lm_head.weight"
    assert canonical("mtp.layers.0.mlp.up_proj") == "mtp.layers.0.mlp.up_proj"
    assert canonical("model.visual.blocks.0.mlp.linear_fc1") == "visual.blocks.0.mlp.linear_fc1"


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
@pytest.mark.parametrize(
    ("name", "kind", "site"),
    [
        ("embed_tokens", Kind.EMBEDDING, None),
        ("layers.3.self_attn.q_proj", Kind.LINEAR, "layers.3.self_attn.in"),
        ("layers.3.self_attn.k_proj", Kind.LINEAR, "layers.3.self_attn.in"),
        ("layers.3.self_attn.v_proj", Kind.LINEAR, "layers.3.self_attn.in"),
        ("layers.3.self_attn.o_proj", Kind.LINEAR, "layers.3.self_attn.out"),
        ("layers.30.linear_attn.in_proj_qkv", Kind.LINEAR, "layers.30.linear_attn.in"),
        ("layers.30.linear_attn.in_proj_z", Kind.LINEAR, "layers.30.linear_attn.in"),
        ("layers.30.linear_attn.out_proj", Kind.LINEAR, "layers.30.linear_attn.out"),
        ("layers.0.mlp.gate_proj", Kind.LINEAR, "layers.0.mlp.in"),
        ("layers.0.mlp.up_proj", Kind.LINEAR, "layers.0.mlp.in"),
        ("layers.0.mlp.down_proj", Kind.LINEAR, "layers.0.mlp.out"),
        ("layers.0.mlp.shared_expert.up_proj", Kind.LINEAR, "layers.0.mlp.shared_expert.in"),
        ("layers.0.mlp.shared_expert.down_proj", Kind.LINEAR, "layers.0.mlp.shared_expert.out"),
        ("layers.0.mlp.experts.gate_up_proj", Kind.EXPERTS, "layers.0.mlp.experts.in"),
        ("layers.0.mlp.experts.down_proj", Kind.EXPERTS, "layers.0.mlp.experts.out"),
    ],
)
def test_role_of_quantised_modules(prefix: str, name: str, kind: Kind, site: str | None) -> None:
    role = role_of(prefix + name)
    assert role is not None
    assert (role.kind, role.site) == (kind, site)


def test_the_head_is_a_site_of_its_own() -> None:
    role = role_of("lm_head")
    assert role is not None
    assert (role.kind, role.site) == (Kind.HEAD, "lm_head")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.visual.blocks.0.attn.qkv", "vision tower"),
        ("model.visual.blocks.0.mlp.linear_fc1", "vision tower"),
        ("model.visual.merger.linear_fc2", "vision tower"),
        ("model.visual.pos_embed", "vision tower"),
        ("mtp.fc", "multi-token prediction head"),
        ("mtp.layers.0.self_attn.q_proj", "multi-token prediction head"),
        ("mtp.layers.0.mlp.down_proj", "multi-token prediction head"),
        ("model.layers.0.linear_attn.in_proj_a", "decay and beta gates of GatedDeltaNet"),
        ("model.language_model.layers.0.linear_attn.in_proj_b", "decay and beta gates of GatedDeltaNet"),
        ("model.layers.0.linear_attn.conv1d", "short convolution"),
        ("model.layers.0.mlp.shared_expert_gate", "gate of the shared expert"),
        ("model.layers.0.mlp.gate", "not a projection of the decoder"),
        ("model.layers.0.self_attn.qkv_proj", "not a projection of the decoder"),
        ("model.layers.0.cross_attn.q_proj", "not a projection of the decoder"),
        ("model.layers.0.mlp.experts.3.up_proj", "not a projection of the decoder"),
    ],
)
def test_what_has_no_role_is_kept_with_a_reason(name: str, reason: str) -> None:
    assert role_of(name) is None
    assert keep_reason(name) == reason


def test_qwen3_5_9b() -> None:
    """The structure that transformers gives the real model, against the counts and sizes of the design."""
    config = Qwen3_5Config()
    with torch.device("meta"):
        model = Qwen3_5ForConditionalGeneration(config)
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    plan = PolarQuantConfig().plan(modules, tied=config.tie_word_embeddings)
    assert len(plan.bits) == 200 + 2
    reasons = list(plan.kept.values())
    assert {reason: reasons.count(reason) for reason in reasons} == {
        "vision tower": 110 + 1,  # and its position embedding
        "decay and beta gates of GatedDeltaNet": 48,
    }
    assert {len(names) for site, names in plan.sites().items() if site.endswith("self_attn.in")} == {3}
    assert {len(names) for site, names in plan.sites().items() if site.endswith("linear_attn.in")} == {2}
    shapes = [modules[name].weight.shape for name in plan.bits]
    assert all(columns % BLOCK_SIZE == 0 for _, columns in shapes)
    quantized = sum(rows * columns * 5 // 8 + rows * columns // BLOCK_SIZE * 2 for rows, columns in shapes)
    assert quantized == pytest.approx(5.731e9, rel=1e-3)


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_supported_model_types(model_type: str) -> None:
    assert check_model_type(model_type) == model_type
    assert is_vision_language(model_type) == (model_type in ("qwen3_5", "qwen3_5_moe") or model_type.endswith("vl"))


@pytest.mark.parametrize("model_type", ["llama", "qwen3_vl_moe", "Qwen3", None, 3])
def test_unsupported_model_types_are_refused_with_the_known_ones(model_type: object) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        check_model_type(model_type)
    assert repr(model_type) in str(caught.value)
    assert all(known in str(caught.value) for known in SUPPORTED)


def test_plan_covers_each_name_once_in_order() -> None:
    plan = PolarQuantConfig().plan(NAMES, tied=False)
    assert list(plan.bits) == [EMBEDDING, *ATTENTION, *MLP, HEAD]
    assert set(plan.bits.values()) == {5}
    assert plan.kept == {"model.visual.merger.linear_fc1": "vision tower"}
    assert plan.tied_head is None


def test_sites_group_what_reads_the_same_activation() -> None:
    linear_attention = [f"model.layers.1.linear_attn.{leaf}" for leaf in ("in_proj_qkv", "in_proj_z", "out_proj")]
    assert PolarQuantConfig().plan([*NAMES, *linear_attention], tied=False).sites() == {
        "layers.0.self_attn.in": ATTENTION[:3],
        "layers.0.self_attn.out": ATTENTION[3:],
        "layers.0.mlp.in": MLP[:2],
        "layers.0.mlp.out": MLP[2:],
        "layers.1.linear_attn.in": linear_attention[:2],
        "layers.1.linear_attn.out": linear_attention[2:],
        "lm_head": [HEAD],
    }


def test_sites_hold_only_what_is_quantised() -> None:
    plan = PolarQuantConfig(modules_to_not_convert=["*.k_proj", "lm_head"]).plan(NAMES, tied=False)
    assert plan.sites()["layers.0.self_attn.in"] == [ATTENTION[0], ATTENTION[2]]
    assert "lm_head" not in plan.sites()


@pytest.mark.parametrize(
    ("patterns", "excluded"),
    [
        (["lm_head"], [HEAD]),
        (["embed_tokens"], [EMBEDDING]),
        (["model.layers.0.mlp.up_proj"], [MLP[1]]),
        (["*.mlp.*"], MLP),
        (["*.layers.0.mlp.*"], MLP),  # of the whole name, whose prefix the pattern's `*` stands for
        (["layers.0.self_attn.[qk]_proj", "lm_*"], [*ATTENTION[:2], HEAD]),
        (["model.*"], [EMBEDDING, *ATTENTION, *MLP]),  # the head is beside the model
        (["model.language_model.lm_head"], [HEAD]),
    ],
)
def test_excluded_patterns(patterns: list[str], excluded: list[str]) -> None:
    plan = PolarQuantConfig(modules_to_not_convert=patterns).plan(NAMES, tied=False)
    assert [name for name, reason in plan.kept.items() if reason == "excluded"] == excluded
    assert set(plan.bits) == set(NAMES) - set(plan.kept)


def test_the_last_match_decides_the_bits() -> None:
    config = PolarQuantConfig(4, {"*.mlp.*": 3, "*.down_proj": 8, "lm_head": 6})
    plan = config.plan(NAMES, tied=False)
    assert [plan.bits[name] for name in (*MLP, HEAD, ATTENTION[0], EMBEDDING)] == [3, 3, 8, 6, 4, 4]
    assert PolarQuantConfig(4, {"*.down_proj": 8, "*.mlp.*": 3}).bits_for(MLP[2]) == 3


@pytest.mark.parametrize(
    "config",
    [
        PolarQuantConfig(modules_to_not_convert=["lm_head", "*.q_prj"]),
        PolarQuantConfig(bits_per_layer={"lm_head": 8, "*.q_prj": 4}),
        PolarQuantConfig(modules_to_not_convert=["*.q_prj"], bits_per_layer={"visual.*": 4}),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(config: PolarQuantConfig) -> None:
    with pytest.raises(ConfigError, match=r"\*\.q_prj") as caught:
        config.plan(NAMES, tied=False)
    assert "lm_head" not in str(caught.value)
    assert ("visual.*" in str(caught.value)) == ("visual.*" in config.bits_per_layer)


def test_a_tied_head_is_not_quantised_a_second_time() -> None:
    plan = PolarQuantConfig().plan(NAMES, tied=True)
    assert plan.tied_head == HEAD
    assert HEAD not in plan.bits
    assert HEAD not in plan.kept
    assert plan.bits[EMBEDDING] == 5
    assert "lm_head" not in plan.sites()


@pytest.mark.parametrize(("excluded", "follows"), [(HEAD, EMBEDDING), (EMBEDDING, HEAD)])
def test_excluding_either_of_a_tied_pair_excludes_both(excluded: str, follows: str) -> None:
    plan = PolarQuantConfig(modules_to_not_convert=[excluded]).plan(NAMES, tied=True)
    assert plan.tied_head is None
    assert list(plan.bits) == [*ATTENTION, *MLP]
    assert plan.kept[excluded] == "excluded"
    assert plan.kept[follows] == "tied to a weight that is excluded"


def test_untied_embedding_and_head_are_excluded_apart() -> None:
    plan = PolarQuantConfig(modules_to_not_convert=["embed_tokens"]).plan(NAMES, tied=False)
    assert HEAD in plan.bits
    assert EMBEDDING not in plan.bits


def test_names_of_kind() -> None:
    assert names_of_kind(NAMES, Kind.LINEAR) == [*ATTENTION, *MLP]
    assert names_of_kind(NAMES, Kind.HEAD) == [HEAD]
    assert names_of_kind(NAMES, Kind.EMBEDDING) == [EMBEDDING]


def test_resolved_config_names_what_its_patterns_chose_and_plans_the_same() -> None:
    config = PolarQuantConfig(5, {"*.mlp.*": 3, "*.down_proj": 5}, ["*.[kv]_proj"])
    plan = config.plan(NAMES, tied=False)
    resolved = config.resolved(plan, awq=True)
    assert resolved.bits_per_layer == {MLP[0]: 3, MLP[1]: 3}
    assert resolved.modules_to_not_convert == ATTENTION[1:3]
    assert resolved.awq is True
    assert resolved.plan(NAMES, tied=False) == plan


def test_resolved_config_of_a_tied_pair_plans_the_same() -> None:
    config = PolarQuantConfig(modules_to_not_convert=["embed_tokens"])
    plan = config.plan(NAMES, tied=True)
    again = config.resolved(plan, awq=False).plan(NAMES, tied=True)
    assert (again.bits, set(again.kept), again.tied_head) == (plan.bits, set(plan.kept), None)


def test_config_round_trip_through_json() -> None:
    config = PolarQuantConfig(6, {"*.mlp.*": 3}, ["lm_head"], awq=True)
    written = json.loads(json.dumps(config.to_dict()))
    assert written == {
        "quant_method": "polarquant",
        "format_version": 1,
        "bits": 6,
        "bits_per_layer": {"*.mlp.*": 3},
        "block_size": 128,
        "bit_order": "lsb",
        "awq": True,
        "modules_to_not_convert": ["lm_head"],
    }
    assert PolarQuantConfig(**written).to_dict() == written
    assert PolarQuantConfig.from_dict(written).to_dict() == written


def test_to_dict_is_a_copy() -> None:
    config = PolarQuantConfig(5, {"lm_head": 3}, ["embed_tokens"])
    written = config.to_dict()
    written["bits_per_layer"]["lm_head"] = 99
    written["modules_to_not_convert"].clear()
    assert config.to_dict() == PolarQuantConfig(5, {"lm_head": 3}, ["embed_tokens"]).to_dict()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("grouping", 3),
        ("quant_method", "polar"),
        ("format_version", 2),
        ("format_version", True),
        ("format_version", 1.0),
        ("block_size", 64),
        ("bit_order", "msb"),
        ("bits", 1),
        ("bits", 9),
        ("bits", True),
        ("bits", 5.0),
        ("bits", "5"),
        ("bits", None),
        ("bits_per_layer", {"lm_head": 1}),
        ("bits_per_layer", {"lm_head": False}),
        ("bits_per_layer", {"lm_head": 4.0}),
        ("bits_per_layer", {3: 4}),
        ("bits_per_layer", ["lm_head"]),
        ("modules_to_not_convert", "lm_head"),
        ("modules_to_not_convert", ["lm_head", 3]),
        ("modules_to_not_convert", {"lm_head"}),
        ("awq", 1),
        ("awq", None),
        ("awq", "yes"),
    ],
)
def test_config_errors_name_the_key_and_what_was_found(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        PolarQuantConfig(**{key: value})
    assert key in str(caught.value)
    inner = next(iter(value.values())) if isinstance(value, dict) and "lm_head" in value else value
    assert repr(inner) in str(caught.value) or key == "grouping"
    assert isinstance(caught.value, PolarError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("bits", [2, 8])
def test_all_of_the_range_of_bits_is_valid(bits: int) -> None:
    assert PolarQuantConfig(bits, {"lm_head": bits}).to_dict()["bits"] == bits
