"""Projections that read the same activation, as one product. On a CPU tile layout is forced."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from model_patch import PolarQuantConfig, group_projections, load_model, patch_model, ungroup_projections
from model_patch.patch import dequantize_model
from polar_kernels import PolarGroup, PolarLinear, PolarModule, ops
from polar_kernels.tiles import is_tileable

Distance = Callable[[torch.Tensor, torch.Tensor], float]
ROUNDING = 2e-5  # relative, of fp32 sums in another order through a whole model
GROUPS = {
    "qwen2_tied_odd": {"group_in": 4},  # two layers, each attention and MLP
    "qwen3": {"group_in": 4},
    "qwen3_5_text": {"group_in": 4},
    "qwen3_5": {"group_in": 4},
}


@pytest.fixture(autouse=True)
def _tiles_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def wants(self: PolarModule) -> bool:
        return self._multiplies() and (self.tiles is not None or is_tileable(self.centroids))

    monkeypatch.setattr(PolarModule, "_wants_tiles", wants)


def patched(zoo: Any, name: str, config: PolarQuantConfig | None = None) -> PreTrainedModel:
    model = load_model(zoo.checkpoint(name), device=zoo.device, dtype=torch.float32)
    patch_model(model, config, awq_scales=zoo.awq_scales(model))
    return model


@pytest.mark.parametrize("name", GROUPS)
@torch.no_grad()
def test_the_model_computes_the_same(zoo: Any, name: str, relative_error: Distance, monkeypatch) -> None:
    model = patched(zoo, name)
    inputs = zoo.inputs(name)
    logits = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    grouped = group_projections(model)
    assert len(grouped) == GROUPS[name]["group_in"]
    products = []
    real = ops.tiled_linear
    monkeypatch.setattr(ops, "tiled_linear", lambda *args: (products.append(args[7]), real(*args))[1])
    assert relative_error(model(**inputs).logits, logits) < ROUNDING
    layers = sum(isinstance(module, PolarLinear) for module in model.modules())
    joined = sum(len(names) for names in grouped.values())
    heads = len(products) - (layers - joined + len(grouped))
    assert heads in (0, 1)  # of a head that is tied to the embedding
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), tokens)


def test_names_say_what_is_grouped(zoo: Any) -> None:
    model = patched(zoo, "qwen3")
    grouped = group_projections(model)
    assert grouped["model.layers.0.self_attn.group_in"] == [
        f"model.layers.0.self_attn.{name}_proj" for name in ("q", "k", "v")
    ]
    assert grouped["model.layers.1.mlp.group_in"] == [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up")]
    assert all(isinstance(model.get_submodule(name), PolarGroup) for name in grouped)
    assert group_projections(model) == grouped


def test_what_is_saved_stays(zoo: Any, tmp_path) -> None:
    model = patched(zoo, "qwen3_5_text")
    model.save_pretrained(tmp_path / "before")
    group_projections(model)
    model.save_pretrained(tmp_path / "grouped")
    files = sorted(path.name for path in (tmp_path / "before").glob("*.safetensors"))
    assert files
    for file in files:
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "grouped" / file).read_bytes()


def test_no_more_memory(zoo: Any) -> None:
    model = patched(zoo, "qwen3")
    group_projections(model)
    tiles = [module.tiles for module in model.modules() if isinstance(module, PolarLinear)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tiles}
    assert sum(storages.values()) == sum(tensor.nbytes for tensor in tiles)


def test_layers_of_other_bits_stay_by_themselves(zoo: Any) -> None:
    model = patched(zoo, "qwen3", PolarQuantConfig(bits_per_layer={"*.layers.0.mlp.up_proj": 4}))
    grouped = group_projections(model)
    assert "model.layers.0.mlp.group_in" not in grouped
    assert "model.layers.1.mlp.group_in" in grouped


@torch.no_grad()
def test_undone(zoo: Any, relative_error: Distance) -> None:
    model = patched(zoo, "qwen3")
    inputs = zoo.inputs("qwen3")
    logits = model(**inputs).logits
    group_projections(model)
    ungroup_projections(model)
    assert not any(isinstance(module, PolarGroup) for module in model.modules())
    assert torch.equal(model(**inputs).logits, logits)
    group_projections(model)
    dequantize_model(model, torch.float32)
    assert not any(isinstance(module, PolarModule | PolarGroup) for module in model.modules())
    assert relative_error(model(**inputs).logits, logits) < ROUNDING
