"""Tiny random models of every architecture, plain and quantised, and a way to spoil their checkpoints."""

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from single_experts import split_experts
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3VLConfig,
)

from model_patch import PolarQuantConfig, patch_model
from model_patch.architectures import Kind, kind_of, weight_name
from model_patch.demo import EVALUATION_TEXT, MODEL

VOCABULARY, IMAGE_TOKEN = 512, 500
VISION_LANGUAGE = ("qwen3_5", "qwen3_vl_tied", "qwen3_5_moe")
EXPERTS = ("qwen3_moe", "qwen3_5_moe")

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,  # large enough for the tokens of greedy decoding to be far from ties
    "tie_word_embeddings": False,
}
_ODD = {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 3, "num_key_value_heads": 1}
_GATED_DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 32,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_interleaved": True}
_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 128,
    "patch_size": 4,
    "num_position_embeddings": 16,
}
_MEDIA_TOKENS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 501,
    "vision_start_token_id": 502,
    "vision_end_token_id": 503,
}


def _qwen3_5(config_class: type[PreTrainedConfig] = Qwen3_5Config, **more: Any) -> PreTrainedConfig:
    rope = _ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2]}
    text = _DECODER | _GATED_DELTA_NET | {"rope_parameters": rope} | more
    return config_class(text_config=text, vision_config=_VISION, **_MEDIA_TOKENS)


def _qwen3_vl() -> PreTrainedConfig:
    text = _DECODER | {"rope_parameters": _ROPE | {"mrope_section": [6, 5, 5]}, "tie_word_embeddings": True}
    vision = _VISION | {"deepstack_visual_indexes": [0]}
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **_MEDIA_TOKENS)


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen2_tied_odd": lambda: Qwen2Config(**_DECODER | _ODD | {"tie_word_embeddings": True}),
    "qwen3": lambda: Qwen3Config(**_DECODER),
    "qwen3_tied": lambda: Qwen3Config(**_DECODER | {"hidden_size": 256, "tie_word_embeddings": True}),
    "qwen3_5_text": lambda: Qwen3_5TextConfig(**_DECODER | _GATED_DELTA_NET),
    "qwen3_5": _qwen3_5,
    "qwen3_vl_tied": _qwen3_vl,
    "qwen3_moe": lambda: Qwen3MoeConfig(**_DECODER | _EXPERTS),
    "qwen3_5_moe": lambda: _qwen3_5(Qwen3_5MoeConfig, **_EXPERTS),
}


@dataclass
class Content:
    """What a single-file checkpoint holds, to be changed and written elsewhere."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    config: dict[str, Any]

    def with_single_experts(self) -> "Content":
        """The same of a quantised checkpoint, its experts stored one by one."""
        tensors, metadata = split_experts(self.tensors, self.metadata)
        return replace(self, tensors=tensors, metadata=metadata)

    def write(self, folder: Path) -> Path:
        folder.mkdir()
        save_file(self.tensors, folder / "model.safetensors", metadata=self.metadata)
        (folder / "config.json").write_text(json.dumps(self.config))
        return folder


@dataclass
class Zoo:
    """The tiny models by name, each made once; `checkpoint` and `quantized` hold folders that tests only read."""

    device: torch.device
    root: Path
    names: tuple[str, ...] = tuple(CONFIGS)
    _masters: dict[str, PreTrainedModel] = field(default_factory=dict)
    _folders: dict[str, Path] = field(default_factory=dict)

    def auto_class(self, name: str) -> type:
        return AutoModelForImageTextToText if name in VISION_LANGUAGE else AutoModelForCausalLM

    def model(self, name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """A fresh unpatched model on the device; its weights are bf16 numbers in any dtype."""
        if name not in self._masters:
            self._masters[name] = self._master(name)
        model = deepcopy(self._masters[name]).to(self.device)
        return model if dtype == torch.float32 else model.to(dtype)  # which rounds rotary frequencies too

    def checkpoint(self, name: str) -> Path:
        """The model in bf16, as save_pretrained writes it."""
        if name not in self._folders:
            self._folders[name] = self.root / name
            self.model(name, torch.bfloat16).save_pretrained(self._folders[name])
        return self._folders[name]

    def quantized(self, name: str, awq: bool = False) -> Path:
        """The bf16 model patched at 5 bits and saved."""
        key = f"{name}-polar{'-awq' if awq else ''}"
        if key not in self._folders:
            model = self.load(name, self.checkpoint(name), torch.bfloat16)
            patch_model(model, awq_scales=self.awq_scales(model) if awq else None)
            self._folders[key] = self.root / key
            model.save_pretrained(self._folders[key])
        return self._folders[key]

    def awq_scales(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Scales from 0.5 to 2 for every linear layer that `patch_model` quantises, one vector per input site."""
        from model_patch.patch import plan_model

        generator = torch.Generator().manual_seed(1)
        sites = plan_model(model, PolarQuantConfig()).sites()
        widths = {site: model.get_parameter(weight_name(names[0])).shape[-1] for site, names in sites.items()}
        drawn = {site: torch.rand(width, generator=generator).mul(2).sub(1).exp2() for site, width in widths.items()}
        return {name: drawn[site] for site, names in sites.items() for name in names}

    def load(
        self, name: str, folder: Path, dtype: torch.dtype | str = torch.float32, **options: Any
    ) -> PreTrainedModel:
        """The folder through transformers' own from_pretrained, on the device."""
        return self.auto_class(name).from_pretrained(folder, dtype=dtype, device_map={"": self.device}, **options)

    def inputs(self, name: str, length: int = 13) -> dict[str, torch.Tensor]:
        """Token ids [2, length] on the device; for vision-language models the second row holds an image too."""
        generator = torch.Generator().manual_seed(2)
        ids = torch.randint(0, IMAGE_TOKEN, (2, length), generator=generator)
        if self.auto_class(name) is AutoModelForCausalLM:
            return {"input_ids": ids.to(self.device)}
        ids[1, 2:6] = IMAGE_TOKEN
        inputs = {
            "input_ids": ids,
            "mm_token_type_ids": (ids == IMAGE_TOKEN).int(),
            "pixel_values": torch.randn(16, 3 * 2 * 4 * 4, generator=generator),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
        }
        return {key: value.to(self.device) for key, value in inputs.items()}

    @torch.no_grad()
    def logits(self, name: str, model: PreTrainedModel) -> torch.Tensor:
        inputs = self.inputs(name)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        return model(**inputs).logits

    @torch.no_grad()
    def tokens(self, name: str, model: PreTrainedModel, **options: Any) -> list[list[int]]:
        """Greedy continuation by 8 tokens of the text in `inputs`."""
        ids = self.inputs(name)["input_ids"][:1]
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False, **options)
        return out[:, ids.shape[1] :].tolist()

    def read(self, folder: Path) -> Content:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dictionary)
            metadata = dict(file.metadata())
        return Content(tensors, metadata, json.loads((folder / "config.json").read_text()))

    def _master(self, name: str) -> PreTrainedModel:
        torch.manual_seed(list(CONFIGS).index(name))
        model = self.auto_class(name).from_config(CONFIGS[name](), dtype=torch.float32).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.dim() == 1 and not key.endswith(("A_log", "dt_bias")):
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)  # biases and norms that show when lost
                parameter.copy_(parameter.bfloat16())
        return model


@pytest.fixture(scope="session")
def zoo(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(device, tmp_path_factory.mktemp("zoo"))


@pytest.fixture(params=CONFIGS)
def architecture(request: pytest.FixtureRequest) -> str:
    """Each architecture in turn."""
    return request.param


@pytest.fixture(params=[name for name in CONFIGS if name not in EXPERTS])
def dense(request: pytest.FixtureRequest) -> str:
    """Each architecture without experts in turn."""
    return request.param


@pytest.fixture(scope="session")
def relative_error() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Frobenius norm of the difference over that of the expected value."""

    def measure(actual: torch.Tensor, expected: torch.Tensor) -> float:
        return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()

    return measure


@pytest.fixture(scope="session")
def layer_types() -> Callable[[torch.nn.Module], dict[str, str]]:
    """Name -> class name, of every module that holds or reads a weight, and of plain experts."""

    def describe(model: torch.nn.Module) -> dict[str, str]:
        types = {name: type(module).__name__ for name, module in model.named_modules()}
        kinds = ("Linear", "Embedding", "PolarLinear", "PolarEmbedding", "TiedPolarHead", "PolarExpertProjection")
        experts = {name: "Parameter" for name, _ in model.named_parameters() if kind_of(name) is Kind.EXPERTS}
        return {name: kind for name, kind in types.items() if kind in kinds} | experts

    return describe


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of one layer with the tokenizer of the embedded model; tests only read it."""
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 4096, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    Qwen3ForCausalLM(Qwen3Config(**shape, **heads)).bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder)
    return folder


@pytest.fixture(scope="session")
def prose(tiny: Path) -> Path:
    """Some 1300 tokens of text."""
    path = tiny.parent / "prose.txt"
    path.write_text(EVALUATION_TEXT.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    return path
