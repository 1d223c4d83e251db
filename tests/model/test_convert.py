"""Published layouts, written here bit by bit, converted and compared with the weights they were written from."""

import json
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from model_patch import CheckpointError, OutputError, load_model
from model_patch.checkpoint.published import convert_checkpoint
from model_patch.cli.convert import convert
from model_patch.demo import MODEL
from model_patch.patch import set_module
from polar_kernels import (
    PolarEmbedding,
    PolarLinear,
    PolarWeight,
    lloyd_max_levels,
    published_levels,
    quantize_weight,
    reference,
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

    def copy(self) -> "Source":
        """Another source of the same tensors."""
        return Source(dict(self.tensors), deepcopy(self.config), dict(self.weights))

    def write(self, folder: Path) -> Path:
        folder.mkdir()
        tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in self.tensors.items()}
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
    """Codes [N, Kp], read from the format's LSB-first rows a bit at a time."""
    digits = np.unpackbits(weight.packed.numpy(), axis=-1, bitorder="little")
    return digits.reshape(weight.out_features, -1, weight.bits) @ (1 << np.arange(weight.bits))


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
            vocab_size=256,
            hidden_size=256,
            intermediate_size=256,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=96,
            tie_word_embeddings=tied,
            dtype="float32",
        )
        return Qwen3ForCausalLM(config).eval()

    return build


@pytest.fixture(scope="module")
def make_source(plain: Callable[[bool], Qwen3ForCausalLM]) -> Callable[..., Source]:
    """Builds a source without its quantised tensors, and the weights to encode.

    bits: of each layer, by its name. table: of levels, by bits. keep: names of layers left plain.
    """

    @cache
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

    return lambda *args, **kwargs: build(*args, **kwargs).copy()


@pytest.fixture
def in_memory(plain: Callable[[bool], Qwen3ForCausalLM]) -> Callable[[dict[str, PolarWeight]], torch.nn.Module]:
    """An untied model with the given weights put in its layers."""

    def build(weights: dict[str, PolarWeight]) -> torch.nn.Module:
        model = plain(False)
        for name, weight in weights.items():
            layer = PolarLinear.from_weight(weight)
            if name == EMBEDDING:
                layer = PolarEmbedding.from_weight(weight, dtype=torch.float32)
            set_module(model, name, layer)
        return model

    return build


def mixed_bits(name: str) -> int:
    return {"down_proj": 4, "gate_proj": 3, "up_proj": 3, "lm_head": 6}.get(name.rpartition(".")[2], 5)


def check_same(out: Path, weights: dict[str, PolarWeight], *, rtol: float = 5e-7) -> None:
    """The codes, norms and scales on disk are those of `weights`, bit for bit; rtol: of the levels."""
    with safe_open(out / "model.safetensors", framework="pt") as file:
        tables = json.loads(file.metadata()["centroids"])
        for name, weight in weights.items():
            assert torch.equal(file.get_tensor(f"{name}.packed"), weight.packed), name
            assert torch.equal(file.get_tensor(f"{name}.norms"), weight.norms), name
            if weight.awq_scales is not None:
                assert torch.equal(file.get_tensor(f"{name}.awq_scales"), weight.awq_scales), name
            torch.testing.assert_close(torch.tensor(tables[str(weight.bits)]), weight.centroids, rtol=rtol, atol=0)


def check_loads(out: Path, expected: torch.nn.Module, *, exact: bool = True) -> None:
    """The converted checkpoint gives the logits of the model patched in memory."""
    ids = torch.arange(0, 256, 37)[None]
    with torch.no_grad():
        logits, wanted = load_model(out, device="cpu")(ids).logits, expected(ids).logits
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(logits, wanted, **tolerance)


@pytest.mark.parametrize("order", ["lsb", "msb"])
@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("table", [lloyd_max_levels, published_levels])
def test_eoq(tmp_path, make_source, in_memory, order, stated, table) -> None:
    source = add_eoq(make_source(5, table, awq=True), order)
    if stated:
        source.metadata["bit_order"] = order
    report = convert_checkpoint(source.write(tmp_path / "in"), tmp_path / "out")
    assert (report.layout, report.bit_order) == ("EOQ v3", order)
    assert report.layers == dict.fromkeys(source.weights, 5)
    assert ("as stated" if stated else "told from the codes") in report.decided
    assert all(f"{name} 0." in report.decided for name in ("lsb", "msb"))
    check_same(tmp_path / "out", source.weights)
    check_loads(tmp_path / "out", in_memory(source.weights))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("order", ["lsb", "msb"])
def test_eoq_at_every_width(tmp_path, make_source, bits, order) -> None:
    """At 2 and 4 bits the order must be stated; at 8 there is none."""
    source = add_eoq(make_source(bits), order, flat=False)
    if bits in (2, 4):
        source.metadata["bit_order"] = order
    report = convert_checkpoint(source.write(tmp_path / "in"), tmp_path / "out")
    assert report.bit_order == (order if bits != 8 else "lsb")
    check_same(tmp_path / "out", source.weights)


@pytest.mark.parametrize("order", ["lsb", "msb"])
def test_eoq_of_several_widths(tmp_path, make_source, in_memory, order) -> None:
    source = add_eoq(make_source(mixed_bits, keep=(Q_PROJ,)), order)
    report = convert_checkpoint(source.write(tmp_path / "in"), tmp_path / "out")
    assert report.bit_order == order
    check_same(tmp_path / "out", source.weights)
    check_loads(tmp_path / "out", in_memory(source.weights))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["bits"] == 5
    assert config["modules_to_not_convert"] == [Q_PROJ]
    assert config["bits_per_layer"][DOWN] == 4


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("table", [lloyd_max_levels, published_levels])
def test_polar_engine(tmp_path, make_source, in_memory, pack, scaled, table) -> None:
    source = add_polar_engine(make_source(mixed_bits, table), pack=pack, scaled=scaled)
    source.config["quantization_config"] = {"quant_method": "polarengine", "bits": 5}
    report = convert_checkpoint(source.write(tmp_path / "in"), tmp_path / "out")
    assert report.layout == ("polar_engine_v5" if pack else "polar_engine_v4")
    assert report.bit_order == ("lsb" if pack else None)
    check_same(tmp_path / "out", source.weights)
    check_loads(tmp_path / "out", in_memory(source.weights), exact=not scaled)
    assert not (tmp_path / "out" / "polar_config.json").exists()


@pytest.mark.parametrize("bits", [2, 3, 7, 8])
def test_polar_engine_bytes_and_nibbles(tmp_path, make_source, bits) -> None:
    """Codes of 8 bits wrap in int8; those of 2 and 3 leave nibbles part empty."""
    source = add_polar_engine(make_source(bits), scaled=False)
    convert_checkpoint(source.write(tmp_path / "in"), tmp_path / "out")
    check_same(tmp_path / "out", source.weights)


@pytest.mark.parametrize(("table", "name"), [(lloyd_max_levels, "converged"), (published_levels, "published")])
@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
def test_hlwq(tmp_path, make_source, table, name, bits) -> None:
    """From 4 bits on the codes tell which table was used; below, the two are one."""
    source = add_hlwq(make_source(bits, table))
    report = convert_checkpoint(source.write(tmp_path / "in"), tmp_path / "out")
    assert (report.layout, report.bit_order) == ("HLWQ", "msb")
    assert (f"is the {name}" in report.decided) if bits > 3 else ("do not tell" in report.decided)
    check_same(tmp_path / "out", source.weights, rtol=5e-7 if bits > 3 else 1e-4)


def test_hlwq_loads(tmp_path, make_source, in_memory) -> None:
    source = add_hlwq(make_source(mixed_bits, published_levels))
    convert_checkpoint(source.write(tmp_path / "in"), tmp_path / "out")
    check_loads(tmp_path / "out", in_memory(source.weights))


def test_few_codes_take_the_published_table(tmp_path, make_source) -> None:
    """One small layer of 4 bits among others that say nothing about its table."""
    source = add_hlwq(make_source(lambda name: 4 if name.endswith("0.self_attn.k_proj") else 5))
    report = convert_checkpoint(source.write(tmp_path / "in"), tmp_path / "out")
    assert "The 4-bit table is the published generator's one, taken because" in report.decided
    assert "The 5-bit table is the converged" in report.decided


def test_missing_scales_become_ones(tmp_path, make_source) -> None:
    source = add_eoq(make_source(awq=True), "lsb")
    del source.tensors[f"{Q_PROJ}.awq_scales"]
    source.tensors[f"{EMBEDDING}.awq_scales"] = torch.ones(256, dtype=torch.float16)
    report = convert_checkpoint(source.write(tmp_path / "in"), tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor(f"{Q_PROJ}.awq_scales"), torch.ones(256).half())
        assert f"{EMBEDDING}.awq_scales" not in file.keys()  # noqa: SIM118 - not a mapping
    assert any(Q_PROJ in warning and "same activation" in warning for warning in report.warnings)
    load_model(tmp_path / "out", device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wider_norms_are_rounded(tmp_path, make_source, dtype) -> None:
    source = add_eoq(make_source(), "lsb")
    norms = source.weights[Q_PROJ].norms.to(dtype)
    source.tensors[f"{Q_PROJ}.norms"] = norms
    report = convert_checkpoint(source.write(tmp_path / "in"), tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor(f"{Q_PROJ}.norms"), norms.half())
    assert any(f"{Q_PROJ}.norms" in warning for warning in report.warnings)


@pytest.mark.parametrize("copy", [True, False])
def test_tied_embedding_is_stored_once(tmp_path, make_source, copy) -> None:
    source = make_source(tied=True)
    if copy:
        source.weights["lm_head"] = source.weights[EMBEDDING]
    report = convert_checkpoint(add_eoq(source, "msb").write(tmp_path / "in"), tmp_path / "out")
    assert "lm_head" not in report.layers
    check_same(tmp_path / "out", {EMBEDDING: source.weights[EMBEDDING]})
    model = load_model(tmp_path / "out", device="cpu")
    assert model.lm_head.embedding is model.model.embed_tokens


def test_bits_for_all_layers(tmp_path, make_source) -> None:
    """`bits_per_tensor` may be one number, or absent beside a single table."""
    for folder, bits in (("number", 5), ("absent", None)):
        source = add_eoq(make_source(), "lsb", bits=bits)
        if bits is None:
            del source.metadata["bits_per_tensor"]
        report = convert_checkpoint(source.write(tmp_path / folder), tmp_path / f"{folder}-out")
        assert set(report.layers.values()) == {5}


def test_order_asked_for(tmp_path, make_source) -> None:
    source = add_eoq(make_source(4), "msb")
    with pytest.raises(CheckpointError, match=r"packed.*2, 4 and 8 bits.*--bit-order"):
        convert_checkpoint(source.write(tmp_path / "in"), tmp_path / "out")
    report = convert_checkpoint(tmp_path / "in", tmp_path / "out", bit_order="msb")
    assert report.bit_order == "msb"
    check_same(tmp_path / "out", source.weights)


def test_codes_that_are_not_normal_warn_where_the_order_is_stated(tmp_path, make_source) -> None:
    source = add_eoq(make_source(5), "lsb")
    source.metadata["bit_order"] = "lsb"
    for name in source.weights:
        packed = source.tensors[f"{name}.packed"]
        source.tensors[f"{name}.packed"] = torch.randint(0, 256, packed.shape, dtype=torch.uint8)
    report = convert_checkpoint(source.write(tmp_path / "in"), tmp_path / "out")
    assert any("do not follow" in warning for warning in report.warnings)


def test_shards_and_progress(tmp_path, make_source) -> None:
    source = add_eoq(make_source(), "msb")
    seen: list[tuple[int, int, str]] = []
    convert_checkpoint(
        source.write(tmp_path / "in"),
        tmp_path / "out",
        max_shard_size="100KB",
        progress=lambda *step: seen.append(step),
    )
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert [done for done, _, _ in seen] == list(range(1, len(source.weights) + 1))
    assert {total for _, total, _ in seen} == {len(source.weights)}
    load_model(tmp_path / "out", device="cpu")


# Mutations of a valid source: what is done to it, and what the message must say.
def set_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Source], None]:
    def mutate(source: Source) -> None:
        source.tensors[name] = change(source.tensors[name].clone())

    return mutate


def put(name: str, index: Any, value: float) -> Callable[[Source], None]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[index] = value
        return tensor

    return set_tensor(name, change)


def drop(name: str) -> Callable[[Source], None]:
    def mutate(source: Source) -> None:
        del source.tensors[name]

    return mutate


def add(name: str, tensor: torch.Tensor) -> Callable[[Source], None]:
    return lambda source: source.tensors.update({name: tensor})


def metadata(key: str, value: Any) -> Callable[[Source], None]:
    return lambda source: source.metadata.update({key: value if isinstance(value, str) else json.dumps(value)})


def entry(layer: str, **values: Any) -> Callable[[Source], None]:
    return lambda source: source.polar_config["layers"][layer].update(values)


def rename(old: str, new: str) -> Callable[[Source], None]:
    def mutate(source: Source) -> None:
        for name in [name for name in source.tensors if name.startswith(old + ".")]:
            source.tensors[name.replace(old, new)] = source.tensors.pop(name)
        source.metadata["bits_per_tensor"] = "5"

    return mutate


LEVELS = lloyd_max_levels(5).tolist()
PACKED, NORMS, SCALES = f"{Q_PROJ}.packed", f"{Q_PROJ}.norms", f"{Q_PROJ}.awq_scales"
EOQ_MUTATIONS = {
    "packed too short": (set_tensor(PACKED, lambda t: t[:-5]), [PACKED, "5 bytes too short"]),
    "packed too long": (set_tensor(PACKED, lambda t: torch.cat([t, t[:5]])), [PACKED, "5 bytes too long"]),
    "packed of another dtype": (set_tensor(PACKED, lambda t: t.short()), [PACKED, "int16"]),
    "packed transposed": (set_tensor(PACKED, lambda t: t.reshape(160, -1)), [PACKED, "[192, 160]", "[160, 192]"]),
    "too few norms": (set_tensor(NORMS, lambda t: t[:-1]), [NORMS, "[384]", "[383]"]),
    "integer norms": (set_tensor(NORMS, lambda t: t.int()), [NORMS, "int32"]),
    "norm NaN": (put(NORMS, 5, math.nan), [NORMS, "nan at row 2, block 1"]),
    "norm infinite": (put(NORMS, 4, math.inf), [NORMS, "inf at row 2, block 0"]),
    "norm negative": (put(NORMS, 383, -1), [NORMS, "-1.0 at row 191, block 1"]),
    "norm past fp16": (
        set_tensor(NORMS, lambda t: t.float().index_fill(0, torch.tensor([3]), 1e5)),
        [NORMS, "65504", "row 1, block 1"],
    ),
    "norms below fp16": (set_tensor(NORMS, lambda t: t.float() * 1e-9), [NORMS, "large enough"]),
    "scales of another length": (set_tensor(SCALES, lambda t: t[:-1]), [SCALES, "[256]", "[255]"]),
    "scale 0": (put(SCALES, 3, 0), [SCALES, "0.0 at [3]"]),
    "scale negative": (put(SCALES, 3, -1), [SCALES, "-1.0 at [3]"]),
    "scale NaN": (put(SCALES, 3, math.nan), [SCALES, "nan at [3]"]),
    "embedding with scales": (
        add(f"{EMBEDDING}.awq_scales", torch.full((256,), 2.0).half()),
        [f"{EMBEDDING}.awq_scales", "all ones"],
    ),
    "no norms": (drop(NORMS), [PACKED, f"{NORMS}, another part of this layer, is missing"]),
    "no codes": (drop(PACKED), [NORMS, f"{PACKED}, another part of this layer, is missing"]),
    "plain weight as well": (add(f"{Q_PROJ}.weight", torch.zeros(192, 256)), [f"{Q_PROJ}.weight", "plain"]),
    "plain tensor missing": (drop("model.norm.weight"), ["model.norm.weight is missing"]),
    "plain tensor of another shape": (add("model.norm.weight", torch.ones(255)), ["model.norm.weight", "[255]"]),
    "tensor left over": (add("model.extra", torch.ones(1)), ["model.extra is left over"]),
    "layer not in the model": (rename(Q_PROJ, "model.layers.7.self_attn.q_proj"), ["layers.7", "no linear layer"]),
    "no tables": (lambda source: source.metadata.pop("centroids") and None, ["'centroids'"]),
    "table not JSON": (metadata("centroids", "{"), ["'centroids' is not valid JSON"]),
    "table of another length": (metadata("centroids", LEVELS[:-1]), ["'centroids'", "31 values"]),
    "table unsorted": (metadata("centroids", LEVELS[::-1]), ["'centroids'", "increasing"]),
    "table with a duplicate": (metadata("centroids", LEVELS[:1] + LEVELS[:-1]), ["'centroids'", "increasing"]),
    "table with NaN": (metadata("centroids", [math.nan, *LEVELS[1:]]), ["'centroids'", "finite"]),
    "table of strings": (metadata("centroids", ["a"] * 32), ["'centroids'", "numbers"]),
    "table of huge numbers": (metadata("centroids", [*LEVELS[:-1], 10**400]), ["'centroids'"]),
    "table of other bits": (metadata("centroids", {"4": lloyd_max_levels(4).tolist()}), [PACKED, "no table of 5"]),
    "bits missing": (metadata("bits_per_tensor", {EMBEDDING: 5}), [PACKED, "found null"]),
    "bits out of range": (metadata("bits_per_tensor", 9), [PACKED, "found 9"]),
    "bits a bool": (metadata("bits_per_tensor", True), [PACKED, "found true"]),
    "unknown order": (metadata("bit_order", "middle"), ["'bit_order'", "'middle'"]),
    "wrong order stated": (metadata("bit_order", "msb"), [".packed", "expected codes packed msb", "packed lsb"]),
    "order asked for contradicts": (metadata("bit_order", "lsb"), ["msb was asked for"]),
}
ORDER_ASKED = {"order asked for contradicts": "msb"}


def refused(source: Source, tmp_path: Path, says: list[str], **options: Any) -> CheckpointError:
    folder = source.write(tmp_path / "in")
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(folder, tmp_path / "out", **options)
    message = str(caught.value)
    assert str(folder) in message
    for text in says:
        assert text in message
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    return caught.value


@pytest.mark.parametrize("what", EOQ_MUTATIONS)
def test_eoq_refused(tmp_path, make_source, what) -> None:
    source, (mutate, says) = add_eoq(make_source(awq=True), "lsb"), EOQ_MUTATIONS[what]
    mutate(source)
    refused(source, tmp_path, says, bit_order=ORDER_ASKED.get(what))


@pytest.mark.parametrize("value", [math.nan, "x"])
def test_all_header_problems_are_listed(tmp_path, make_source, value) -> None:
    source = add_eoq(make_source(), "lsb")
    set_tensor(PACKED, lambda t: t[:-5])(source)
    set_tensor(f"{O_PROJ}.norms", lambda t: t[:-1])(source)
    source.metadata["centroids"] = json.dumps([value, *LEVELS[1:]])
    error = refused(source, tmp_path, [PACKED, f"{O_PROJ}.norms", "'centroids'"])
    assert len(error.problems) == 3


CODES, TABLE = f"{Q_PROJ}.codes", f"{Q_PROJ}.ct_scaled"
ENGINE_MUTATIONS = {
    "code outside the table": (put(CODES, (7, 9), 32), [CODES, "0..31", "32 at row 7, column 9"]),
    "code negative": (put(CODES, (7, 9), -3), [CODES, "-3 at row 7, column 9"]),
    "nibble outside the table": (put(f"{GATE}.codes", (1, 70), 0x80), [f"{GATE}.codes", "8 at row 1, column 198"]),
    "codes too narrow": (set_tensor(CODES, lambda t: t[:, :-1]), [CODES, "192 bytes too short"]),
    "no norms": (drop(f"{Q_PROJ}.norms"), [CODES, f"{Q_PROJ}.norms"]),
    "no table": (drop(TABLE), [CODES, ".ct_scaled", "neither"]),
    "two tables": (add(f"{Q_PROJ}.ct", lloyd_max_levels(5)), [CODES, f"{Q_PROJ}.ct"]),
    "table of another length": (set_tensor(TABLE, lambda t: t[:-1]), [TABLE, "[31]"]),
    "table unsorted": (set_tensor(TABLE, lambda t: t.flip(0)), [TABLE, "increasing"]),
    "table of its own": (set_tensor(TABLE, lambda t: t * 1.001), [TABLE, Q_PROJ, EMBEDDING, "different tables"]),
    "block size 64": (entry(Q_PROJ, block_size=64), [CODES, "block_size must be 128, found 64"]),
    "another in_features": (entry(Q_PROJ, in_features=255), [CODES, "in_features must be 256, found 255"]),
    "bits out of range": (entry(Q_PROJ, bits=9), [CODES, "found 9"]),
    "bits a float": (entry(Q_PROJ, bits=5.0), [CODES, "found 5.0"]),
    "nibbles of 5 bits": (entry(Q_PROJ, packed=True), [CODES, "nibbles"]),
    "q5 of 3 bits": (entry(GATE, packed=False, packed_q5=True), [f"{GATE}.codes", "packed_q5 is for 5 bits"]),
    "flag not a bool": (entry(Q_PROJ, packed="no"), [CODES, "'no'"]),
    "layer not described": (lambda source: source.polar_config["layers"].pop(Q_PROJ) and None, [CODES, "bits"]),
    "layer without tensors": (
        lambda source: source.polar_config["layers"].update({"model.layers.7.mlp.up_proj": {"bits": 5}}),
        ["layers.7.mlp.up_proj", "no codes"],
    ),
    "layers no object": (lambda source: source.polar_config.update(layers=[]), ["polar_config.json", "'layers'"]),
    "unknown version": (lambda source: source.polar_config.update(format="polar_engine_v6"), ["polar_engine_v6"]),
    "no polar_config.json": (lambda source: setattr(source, "polar_config", None), ["polar_config.json", "read"]),
}


@pytest.mark.parametrize("what", ENGINE_MUTATIONS)
def test_polar_engine_refused(tmp_path, make_source, what) -> None:
    source = add_polar_engine(make_source(mixed_bits))
    weight = source.weights[Q_PROJ]
    source.tensors[CODES] = torch.tensor(codes_of(weight)).to(torch.int8)  # the others are packed
    source.polar_config["layers"][Q_PROJ]["packed_q5"] = False
    mutate, says = ENGINE_MUTATIONS[what]
    mutate(source)
    refused(source, tmp_path, says)


HLWQ_PACKED, META = f"{Q_PROJ}.weight__packed", f"{Q_PROJ}.weight__meta"
HLWQ_MUTATIONS = {
    "packed too short": (set_tensor(HLWQ_PACKED, lambda t: t[:-5]), [HLWQ_PACKED, "49152 codes", "30715 bytes"]),
    "too few norms": (set_tensor(f"{Q_PROJ}.weight__norms", lambda t: t[:-1]), [f"{Q_PROJ}.weight__norms"]),
    "block size 64": (put(META, 2, 64), [META, "[192, 2, 128, 49152, 256]", "[192, 2, 64, 49152, 256]"]),
    "another number of rows": (put(META, 0, 191), [META, "[191, 2"]),
    "meta of four": (set_tensor(META, lambda t: t[:-1]), [META, "[5]", "[4]"]),
    "no meta": (drop(META), [HLWQ_PACKED, META]),
}


@pytest.mark.parametrize("what", HLWQ_MUTATIONS)
def test_hlwq_refused(tmp_path, make_source, what) -> None:
    source, (mutate, says) = add_hlwq(make_source()), HLWQ_MUTATIONS[what]
    mutate(source)
    refused(source, tmp_path, says)


def test_hlwq_of_the_other_order_is_refused(tmp_path, make_source) -> None:
    refused(add_hlwq(make_source(), "lsb"), tmp_path, [".weight__packed", "expected codes packed msb"])


def test_order_that_cannot_be_told_is_refused(tmp_path, make_source) -> None:
    """Random bytes follow N(0, 1) in neither order."""
    source = add_eoq(make_source(), "lsb")
    for name in source.weights:
        packed = source.tensors[f"{name}.packed"]
        source.tensors[f"{name}.packed"] = torch.randint(0, 256, packed.shape, dtype=torch.uint8)
    refused(source, tmp_path, [".packed and 8 others", "neither"])


def test_orders_too_close_to_call_are_refused(tmp_path, make_source) -> None:
    """Half of the layers packed one way, half the other."""
    source = make_source(3)
    names = list(source.weights)
    halves = [Source({}, {}, {name: source.weights[name] for name in names[start::2]}) for start in (0, 1)]
    source.tensors |= add_eoq(halves[0], "lsb").tensors | add_eoq(halves[1], "msb").tensors
    source.metadata = halves[0].metadata | {"bits_per_tensor": "3"}
    refused(source, tmp_path, [".packed", "too close to call"])


def source_of_gates(*others: str) -> Source:
    """The model of the demo with its GatedDeltaNet gates quantised, as some publishers do, and the layers `others`."""
    with safe_open(MODEL / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    names = [n.removesuffix(".weight") for n in tensors if n.endswith((".in_proj_a.weight", ".in_proj_b.weight"))]
    weights = {name: quantize_weight(tensors.pop(f"{name}.weight").float()) for name in [*names, *others]}
    return add_eoq(Source(tensors, json.loads((MODEL / "config.json").read_text()), weights), "lsb")


def test_layers_the_format_keeps_become_plain(tmp_path) -> None:
    source = source_of_gates("lm_head")
    report = convert_checkpoint(source.write(tmp_path / "in"), tmp_path / "out")
    assert report.layers == {"lm_head": 5}
    assert any("6 layers were made plain" in warning and "gates" in warning for warning in report.warnings)
    model = load_model(tmp_path / "out", device="cpu")
    for name in source.weights.keys() - {"lm_head"}:
        weight = source.weights[name]
        parts = (weight.packed, weight.norms, weight.awq_scales, weight.centroids)
        dense = reference.dequantize(*parts, weight.in_features, torch.bfloat16)
        assert torch.equal(model.get_submodule(name).weight, dense)


def test_a_source_of_kept_layers_alone_is_refused(tmp_path) -> None:
    refused(source_of_gates(), tmp_path, ["in_proj_a", "gates"])


@pytest.mark.parametrize("change", ["other codes", "plain embedding"])
def test_tied_head_of_its_own_is_refused(tmp_path, make_source, change) -> None:
    source = make_source(tied=True)
    source.weights["lm_head"] = source.weights[EMBEDDING]
    add_eoq(source, "lsb")
    if change == "other codes":
        put("lm_head.packed", 0, 0)(source)
    else:
        source.tensors[f"{EMBEDDING}.weight"] = torch.zeros(256, 256)
        for part in ("packed", "norms"):
            del source.tensors[f"{EMBEDDING}.{part}"]
        source.metadata["bits_per_tensor"] = "5"
    refused(source, tmp_path, ["lm_head.packed", "tie_word_embeddings"])


def test_what_is_not_published_is_refused(tmp_path, make_source) -> None:
    source = make_source()
    for name, weight in source.weights.items():
        source.tensors[f"{name}.weight"] = torch.zeros(weight.out_features, weight.in_features)
    refused(source, tmp_path, ["unknown layout", "found none"])


def test_mixed_layouts_are_refused(tmp_path, make_source) -> None:
    source = add_hlwq(add_eoq(make_source(), "lsb"))
    refused(source, tmp_path, ["unknown layout", "*.weight__packed, *.packed"])


def test_own_format_is_refused(tmp_path, make_source) -> None:
    convert_checkpoint(add_eoq(make_source(), "lsb").write(tmp_path / "in"), tmp_path / "once")
    with pytest.raises(CheckpointError, match="in the format already"):
        convert_checkpoint(tmp_path / "once", tmp_path / "twice")


def test_existing_output_is_refused(tmp_path, make_source) -> None:
    folder = add_eoq(make_source(), "lsb").write(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(OutputError, match="not empty"):
        convert_checkpoint(folder, tmp_path / "out")
    convert_checkpoint(folder, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "precious").exists()


def test_command(tmp_path, make_source) -> None:
    app = typer.Typer()
    app.command()(convert)
    folder = add_eoq(make_source(), "msb").write(tmp_path / "in")
    result = CliRunner().invoke(app, [str(folder), str(tmp_path / "a")])
    assert result.exit_code == 0, result.output
    assert "EOQ v3: 9 layers (9 of 5 bits)" in result.stdout
    result = CliRunner().invoke(app, [str(folder), str(tmp_path / "b"), "--json", "--bit-order", "msb"])
    assert json.loads(result.stdout)["bit_order"] == "msb"
    assert json.loads(result.stdout) == json.loads(result.stdout) | {"layout": "EOQ v3", "out": str(tmp_path / "b")}
