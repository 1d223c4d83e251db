"""Published layouts, written here bit by bit, converted and compared with the weights they were written from."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from model_patch import CheckpointError, OutputError, load_model
from model_patch.checkpoint.published import ConvertReport, convert_checkpoint
from model_patch.patch import PolarModule, set_module
from polar_kernels import (
    PolarEmbedding,
    PolarLinear,
    PolarWeight,
    lloyd_max_levels,
    published_levels,
    quantize_weight,
    unpack_codes,
)

EMBEDDING = "model.embed_tokens"
Q_PROJ, O_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"
GATE, DOWN = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"


@dataclass
class Source:
    """A checkpoint about to be written: what tests mutate."""

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    weights: dict[str, PolarWeight]
    metadata: dict[str, str] = field(default_factory=dict)
    polar_config: dict[str, Any] | None = None

    def write(self, folder: Path) -> Path:
        folder.mkdir()
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata=self.metadata or None)
        (folder / "config.json").write_text(json.dumps(self.config))
        if self.polar_config is not None:
            (folder / "polar_config.json").write_text(json.dumps(self.polar_config))
        return folder


def bit_stream(codes: np.ndarray, bits: int, order: str) -> torch.Tensor:
    """Codes [N, K] as a stream, written a bit at a time: [N, K * bits / 8]."""
    significance = range(bits) if order == "lsb" else range(bits - 1, -1, -1)
    rows = np.stack([(codes >> bit) & 1 for bit in significance], -1).reshape(codes.shape[0], -1)
    packed = np.packbits(rows.astype(np.uint8), axis=-1, bitorder="little" if order == "lsb" else "big")
    return torch.from_numpy(packed)


def half_block_nibbles(codes: np.ndarray) -> torch.Tensor:
    """Codes [N, K] as nibbles [N, K / 2], the first half of a block of 128 low, the second half high."""
    out = np.empty((codes.shape[0], codes.shape[1] // 2), np.uint8)
    for column in range(out.shape[1]):
        first = column // 64 * 128 + column % 64
        out[:, column] = codes[:, first] + 16 * codes[:, first + 64]
    return torch.from_numpy(out)


def codes_of(weight: PolarWeight) -> np.ndarray:
    return unpack_codes(weight.packed, weight.bits).numpy().astype(np.int64)


def add_eoq(source: Source, order: str, *, flat: bool = True, bits: Any = None) -> Source:
    for name, weight in source.weights.items():
        packed = bit_stream(codes_of(weight), weight.bits, order)
        source.tensors[f"{name}.packed"] = packed.flatten() if flat else packed
        source.tensors[f"{name}.norms"] = weight.norms.flatten() if flat else weight.norms
        if weight.awq_scales is not None:
            source.tensors[f"{name}.awq_scales"] = weight.awq_scales
    tables = {str(weight.bits): weight.centroids.tolist() for weight in source.weights.values()}
    source.metadata = {
        "centroids": json.dumps(tables if len(tables) > 1 or not flat else next(iter(tables.values()))),
        "bits_per_tensor": json.dumps(bits or {name: weight.bits for name, weight in source.weights.items()}),
    }
    return source


def add_polar_engine(source: Source, *, pack: bool = True, scaled: bool = True) -> Source:
    layers = {}
    for name, weight in source.weights.items():
        codes, nibbles, q5 = codes_of(weight), pack and weight.bits <= 4, pack and weight.bits == 5
        stored = half_block_nibbles(codes) if nibbles else bit_stream(codes, 5, "lsb") if q5 else torch.tensor(codes)
        source.tensors[f"{name}.codes"] = stored if nibbles or q5 else stored.to(torch.uint8).view(torch.int8)
        source.tensors[f"{name}.norms"] = weight.norms
        table = weight.centroids / math.sqrt(128) if scaled else weight.centroids
        source.tensors[f"{name}.ct_scaled" if scaled else f"{name}.ct"] = table.clone()
        layers[name] = {
            "bits": weight.bits,
            "block_size": 128,
            "in_features": weight.in_features,
            "out_features": weight.out_features,
            "in_features_padded": codes.shape[1],
            "packed": nibbles,
            **({"packed_q5": True} if q5 else {}),
        }
    version = "polar_engine_v5" if any("packed_q5" in entry for entry in layers.values()) else "polar_engine_v4"
    source.polar_config = {"format": version, "block_size": 128, "layers": layers}
    return source


def add_hlwq(source: Source, order: str = "msb") -> Source:
    for name, weight in source.weights.items():
        codes = codes_of(weight)
        source.tensors[f"{name}.weight__packed"] = bit_stream(codes, weight.bits, order).flatten()
        source.tensors[f"{name}.weight__norms"] = weight.norms
        meta = [weight.out_features, codes.shape[1] // 128, 128, codes.size, weight.in_features]
        source.tensors[f"{name}.weight__meta"] = torch.tensor(meta)
    return source


@pytest.fixture(scope="module")
def plain() -> Callable[[bool], Qwen3ForCausalLM]:
    """Small random models, tied or not; K of o_proj is 192, which is padded to 256."""

    def build(tied: bool) -> Qwen3ForCausalLM:
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=512,
            hidden_size=256,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=96,
            tie_word_embeddings=tied,
            dtype="float32",
        )
        return Qwen3ForCausalLM(config).eval()

    return build


@pytest.fixture
def make_source(plain: Callable[[bool], Qwen3ForCausalLM]) -> Callable[..., Source]:
    """Builds a source without its quantised tensors, and the weights to encode.

    bits: of each layer, by its name. table: of levels, by bits. keep: names of layers left plain.
    """

    def build(
        bits: int | Callable[[str], int] = 5,
        table: Callable[[int], torch.Tensor] = lloyd_max_levels,
        *,
        awq: bool = False,
        tied: bool = False,
        keep: tuple[str, ...] = (),
    ) -> Source:
        model = plain(tied)
        state = {name: tensor for name, tensor in model.state_dict().items() if not (tied and "lm_head" in name)}
        weights = {}
        for name in [key.removesuffix(".weight") for key, tensor in state.items() if tensor.dim() == 2]:
            if name in keep:
                continue
            weight = state.pop(f"{name}.weight")
            layer_bits = bits if isinstance(bits, int) else bits(name)
            scales = torch.rand(weight.shape[1]) + 0.5 if awq and name != EMBEDDING else None
            weights[name] = quantize_weight(weight, layer_bits, awq_scales=scales, centroids=table(layer_bits))
        config = model.config.to_dict() | {"architectures": ["Qwen3ForCausalLM"]}
        return Source(state, config, weights)

    return build


@pytest.fixture
def in_memory(plain: Callable[[bool], Qwen3ForCausalLM]) -> Callable[[dict[str, PolarWeight]], torch.nn.Module]:
    """An untied model with the given weights put in its layers."""

    def build(weights: dict[str, PolarWeight]) -> torch.nn.Module:
        model = plain(False)
        for name, weight in weights.items():
            kind = PolarEmbedding if name == EMBEDDING else PolarLinear
            set_module(model, name, kind.from_polar_weight(weight))
        return model

    return build


def mixed_bits(name: str) -> int:
    return {"down_proj": 4, "gate_proj": 3, "up_proj": 3, "lm_head": 6}.get(name.rpartition(".")[2], 5)


def check_same(out: Path, weights: dict[str, PolarWeight]) -> None:
    """The codes, norms and scales on disk are those of `weights`, bit for bit."""
    with safe_open(out / "model.safetensors", framework="pt") as file:
        tables = json.loads(file.metadata()["centroids"])
        for name, weight in weights.items():
            assert torch.equal(file.get_tensor(f"{name}.packed"), weight.packed), name
            assert torch.equal(file.get_tensor(f"{name}.norms"), weight.norms), name
            if weight.awq_scales is not None:
                assert torch.equal(file.get_tensor(f"{name}.awq_scales"), weight.awq_scales), name
            torch.testing.assert_close(torch.tensor(tables[str(weight.bits)]), weight.centroids, rtol=5e-7, atol=0)
