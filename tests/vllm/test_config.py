"""Which of vLLM's layers are served by what, and what is refused before a tensor is read."""

import importlib.metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version

from model_patch import CheckpointError, ConfigError, UnsupportedModelError
from model_patch.checkpoint.reader import read_config

MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
ATTENTION = "model.layers.0.self_attn"


def _config(folder: Path) -> Any:
    """The config as vLLM makes it of a checkpoint's."""
    from model_patch.vllm.config import VllmPolarConfig

    config = VllmPolarConfig.from_config(read_config(folder)["quantization_config"])
    config.maybe_update_config(str(folder))
    config.packed_modules_mapping = MERGED
    return config


def _layer(kind: str) -> Any:
    """A layer of vLLM's that is not initialised: its class is all that is asked for."""
    from vllm.model_executor.layers import linear, vocab_parallel_embedding

    module = linear if hasattr(linear, kind) else vocab_parallel_embedding
    cls = getattr(module, kind)
    return cls.__new__(cls)


def _method(config: Any, kind: str, prefix: str) -> str:
    return type(config.get_quant_method(_layer(kind), prefix)).__name__


def test_vllm_finds_the_plug_in_and_may_load_it_twice() -> None:
    (found,) = [e for e in importlib.metadata.entry_points(group="vllm.general_plugins") if e.name == "polarquant"]
    register = found.load()
    register()
    register()
    from vllm.model_executor.layers.quantization import get_quantization_config

    from model_patch.vllm.config import VllmPolarConfig

    assert get_quantization_config("polarquant") is VllmPolarConfig


def test_layers_are_served_by_what_the_checkpoint_says(engine: Any) -> None:
    config = _config(engine.quantized.folder("qwen3"))
    assert _method(config, "QKVParallelLinear", f"{ATTENTION}.qkv_proj") == "PolarLinearMethod"
    assert _method(config, "RowParallelLinear", f"{ATTENTION}.o_proj") == "PolarLinearMethod"
    assert _method(config, "ParallelLMHead", "lm_head") == "PolarLinearMethod"
    assert _method(config, "VocabParallelEmbedding", "") == "PolarEmbeddingMethod"
    assert _method(config, "ReplicatedLinear", "visual.merger.linear_fc1") == "UnquantizedLinearMethod"
    assert _method(config, "ReplicatedLinear", "model.layers.0.mlp.gate") == "UnquantizedLinearMethod"


def test_a_tied_head_is_the_embedding(engine: Any) -> None:
    config = _config(engine.quantized.folder("qwen3_5_text_tied"))
    assert _method(config, "ParallelLMHead", "lm_head") == "TiedHeadMethod"
    assert config.get_quant_method(_layer("VocabParallelEmbedding"), "model.embed_tokens").serves_head


def test_layers_merged_by_vllm_must_have_the_same_bits(engine: Any) -> None:
    config = _config(engine.quantized.folder("qwen3"))
    config.bits["layers.0.self_attn.k_proj"] = 4
    with pytest.raises(ConfigError, match=rf"same bits; found {ATTENTION}.q_proj: 5, {ATTENTION}.k_proj: 4"):
        config.get_quant_method(_layer("QKVParallelLinear"), f"{ATTENTION}.qkv_proj")


def test_a_layer_that_the_checkpoint_does_not_have_is_refused(engine: Any) -> None:
    config = _config(engine.quantized.folder("qwen3_moe"))
    with pytest.raises(CheckpointError, match=r"vLLM builds a layer model.layers.0.mlp.shared_expert.down_proj"):
        config.get_quant_method(_layer("RowParallelLinear"), "model.layers.0.mlp.shared_expert.down_proj")


def test_an_excluded_layer_stays_plain(engine: Any) -> None:
    config = _config(engine.quantized.folder("qwen3"))
    del config.bits["layers.0.self_attn.o_proj"]
    config.stated.modules_to_not_convert.append(f"{ATTENTION}.o_proj")
    assert _method(config, "RowParallelLinear", f"{ATTENTION}.o_proj") == "UnquantizedLinearMethod"


def test_an_old_vllm_is_refused(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_patch.vllm.versions.installed", lambda: Version("0.25.1"))
    with pytest.raises(UnsupportedModelError, match=r"vLLM 0\.25\.1 is too old .* install vllm>=0\.26"):
        _config(engine.quantized.folder("qwen3"))


@pytest.mark.parametrize(
    ("in_features", "own", "said"),
    [(384, 192, r"one of \[1\]"), (1536, 192, r"one of \[1, 2, 3, 4, 6\]"), (512, 64, r"one of \[1, 2, 4\]")],
)
def test_a_split_within_a_block_names_those_that_are_not(in_features: int, own: int, said: str) -> None:
    from model_patch.vllm.parameters import check_split

    with pytest.raises(UnsupportedModelError, match=rf"down: {in_features} in_features .* {own} each.*{said}"):
        check_split("down", in_features, own)


@pytest.mark.parametrize(("in_features", "own"), [(512, 256), (320, 320), (1536, 384)])
def test_a_split_between_blocks_passes(in_features: int, own: int) -> None:
    from model_patch.vllm.parameters import check_split

    check_split("down", in_features, own)


def test_experts_that_are_distributed_are_refused(engine: Any) -> None:
    from model_patch.vllm.experts import PolarExpertsMethod

    config = _config(engine.quantized.folder("qwen3_moe"))
    weight = config._weight(["model.layers.0.mlp.experts.down_proj"])
    parallel = SimpleNamespace(use_ep=True, tp_size=1)
    layer = SimpleNamespace(moe_config=SimpleNamespace(moe_parallel_config=parallel), layer_name="layers.0.mlp.experts")
    with pytest.raises(UnsupportedModelError, match="leave out --enable-expert-parallel"):
        PolarExpertsMethod(None, weight, weight).create_weights(layer, 4, 256, 256, torch.float32)


def test_single_experts_share_scales_across_calls_of_the_loader(engine: Any) -> None:
    """vLLM calls it once a run of a layer's tensors, and shards may break one."""
    from model_patch.vllm.experts import PolarExpertsMethod

    config = _config(engine.quantized.folder("qwen3_moe"))
    weight = config._weight(["model.layers.0.mlp.experts.down_proj"])
    layer: Any = torch.nn.Module()
    parallel = SimpleNamespace(use_ep=False, tp_size=1, tp_rank=0)
    layer.moe_config, layer.layer_name = SimpleNamespace(moe_parallel_config=parallel), "layers.0.mlp.experts"
    layer.activation, layer.apply_router_weight_on_input = SimpleNamespace(value="silu"), False
    PolarExpertsMethod(None, weight, weight).create_weights(layer, 4, 256, 256, torch.float32)
    scales = torch.full((256,), 2.0).half()
    assert list(layer.load_weights([("0.gate_proj.awq_scales", scales)])) == ["gate_up_proj.awq_scales"]
    assert torch.equal(layer.gate_up_proj.awq_scales[0], scales)
    with pytest.raises(CheckpointError, match=r"1.up_proj.awq_scales must be equal to 0.gate_proj.awq_scales"):
        list(layer.load_weights([("1.up_proj.awq_scales", 2 * scales)]))
