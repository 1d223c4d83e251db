"""A valid tiny quantised checkpoint, spoilt in one way at a time; sources that cannot be quantised; outputs that fail.

Whatever reads the checkpoint must refuse it with the project's own error, naming file and tensor, and never go on with
random or wrong weights.
"""

import errno
import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from model_patch.architectures import SUPPORTED
from model_patch.checkpoint import writer
from model_patch.checkpoint.dequantize import dequantize_checkpoint
from model_patch.checkpoint.reader import INDEX_NAME, SINGLE_NAME
from model_patch.cli.app import app
from model_patch.config import PolarQuantConfig
from model_patch.errors import CheckpointError, ConfigError, OutputError, UnsupportedModelError
from model_patch.load import load_model
from model_patch.quantize import QuantizePlan, plan_checkpoint, quantize_checkpoint, write_absmax
from polar_kernels import PolarError
from polar_kernels.errors import ArgumentError, QuantizationError

LAYER = "model.layers.0"
Q, K, DOWN = f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.k_proj", f"{LAYER}.mlp.down_proj"
EMBEDDING, NORM = "model.embed_tokens", f"{LAYER}.input_layernorm.weight"
PARTS = ("packed", "norms", "awq_scales")


class Stored:
    """A copy of a checkpoint folder, to be spoilt in place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def weight_map(self) -> dict[str, str]:
        return json.loads((self.folder / INDEX_NAME).read_text())["weight_map"]

    def read(self, file: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        with safe_open(self.folder / file, framework="pt") as shard:
            return {name: shard.get_tensor(name) for name in shard.keys()}, shard.metadata()  # noqa: SIM118

    def write(self, file: str, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
        """Write a shard and make the index agree with it."""
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self.folder / file, metadata)
        weight_map = {name: place for name, place in self.weight_map.items() if place != file}
        content = {"metadata": {}, "weight_map": weight_map | dict.fromkeys(tensors, file)}
        (self.folder / INDEX_NAME).write_text(json.dumps(content))

    def set(self, **changes: torch.Tensor | None) -> None:
        """Put tensors in place of those of the same name, or beside q_proj; None removes."""
        first = self.weight_map[f"{Q}.packed"]
        for name, tensor in changes.items():
            file = self.weight_map.get(name, first)
            tensors, metadata = self.read(file)
            if tensor is None:
                del tensors[name]
            else:
                tensors[name] = tensor
            self.write(file, tensors, metadata)

    def change(self, name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.set(**{name: function(self.read(self.weight_map[name])[0][name])})

    def poke(self, name: str, place: tuple[int, ...], value: float) -> None:
        tensors, metadata = self.read(self.weight_map[name])
        tensors[name][place] = value
        self.write(self.weight_map[name], tensors, metadata)

    def metadata(self, **changes: str | None) -> None:
        for file in sorted(set(self.weight_map.values())):
            tensors, metadata = self.read(file)
            kept = {key: value for key, value in (metadata | changes).items() if value is not None}
            self.write(file, tensors, kept)

    def table(self, bits: str, levels: object) -> None:
        _, metadata = self.read(next(iter(self.weight_map.values())))
        centroids = json.loads(metadata["centroids"]) | {bits: levels}
        self.metadata(centroids=json.dumps({key: value for key, value in centroids.items() if value is not None}))

    def config(self, **changes: object) -> None:
        path = self.folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def quantization(self, **changes: object) -> None:
        stated = json.loads((self.folder / "config.json").read_text())["quantization_config"]
        self.config(quantization_config=stated | changes)


@dataclass(frozen=True)
class Spoilt:
    """One row of the table: what is done, which error it gives and what its message names.

    {name} in `named` stands for the shard that held the tensor `name` before.
    """

    spoil: Callable[[Stored], object]
    named: tuple[str, ...]
    error: type[PolarError] = CheckpointError


def _plain_source(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 256, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    Qwen3ForCausalLM(Qwen3Config(**shape, **heads, **changes)).bfloat16().save_pretrained(folder)
    return folder


def _scales(plan: QuantizePlan) -> dict[str, torch.Tensor]:
    """One AWQ vector around 1 per input site."""
    found = {}
    for names in plan.layers.sites().values():
        columns = plan.source.tensors[f"{plan.names[names[0]]}.weight"].shape[1]
        found |= dict.fromkeys(names, torch.rand(columns, generator=torch.Generator().manual_seed(1)) + 0.5)
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain bf16 checkpoint; tests only read it."""
    return _plain_source(tmp_path_factory.mktemp("bad-inputs") / "plain")


@pytest.fixture(scope="module")
def quantized(source: Path) -> Path:
    """The source at 5 bits with AWQ, in several shards; tests only read it."""
    plan = plan_checkpoint(source, PolarQuantConfig(5), awq=True)
    out = source.parent / "quantized"
    quantize_checkpoint(plan, out, awq_scales=_scales(plan), max_shard_size="40KB")
    return out


@pytest.fixture
def stored(quantized: Path, tmp_path: Path) -> Stored:
    """A copy to spoil."""
    shutil.copytree(quantized, tmp_path / "spoilt")
    return Stored(tmp_path / "spoilt")


def _verify(folder: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(folder), "--device", "cpu"])
    if result.exception is not None:
        assert result.exit_code == 1
        assert result.stdout == ""
        raise result.exception


def _from_pretrained(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


READERS: dict[str, Callable[[Path], object]] = {
    "load_model": load_model,
    "verify": _verify,
    "from_pretrained": _from_pretrained,
}


def _refusal(stored: Stored, row: Spoilt, reader: str) -> None:
    shards = stored.weight_map
    row.spoil(stored)
    with pytest.raises(row.error) as caught:
        READERS[reader](stored.folder)
    assert type(caught.value) is row.error
    for name in row.named:
        expected = shards[name[1:-1]] if name.startswith("{model") else name
        assert expected in str(caught.value)


# Tensors and their headers -------------------------------------------------------------------------------------------


def _longer(tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
    return torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)


def _shorter(tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
    return tensor.narrow(dim, 0, tensor.shape[dim] - 1)


def _make_plain(stored: Stored, weight: torch.Tensor) -> None:
    stored.set(**{f"{Q}.{part}": None for part in PARTS}, **{f"{Q}.weight": weight})


def _changed(name: str, function: Callable[[torch.Tensor], torch.Tensor], *found: str) -> Spoilt:
    """A tensor of another dtype or shape; `found` is in the message too."""
    return Spoilt(lambda stored: stored.change(name, function), (f"{{{name}}}", name, "must be", *found))


def _left_over(name: str) -> Spoilt:
    spoil = lambda stored: stored.set(**{name: torch.ones(2)})  # noqa: E731
    return Spoilt(spoil, (f"{{{Q}.packed}}", f"{name} is left over"))


PLAIN = torch.zeros(128, 128, dtype=torch.bfloat16)

HEADERS: dict[str, Spoilt] = {
    # 8: missing or left over
    "norm missing": Spoilt(lambda s: s.set(**{NORM: None}), ("spoilt", f"{NORM} is missing")),
    "several missing": Spoilt(
        lambda s: s.set(**{NORM: None, "model.norm.weight": None}),
        (f"{NORM} is missing", "model.norm.weight is missing"),
    ),
    "missing and left over": Spoilt(
        lambda s: s.set(**{NORM: None, "extra.weight": torch.ones(2), "more.weight": torch.ones(2)}),
        (f"{NORM} is missing", "extra.weight is left over", "more.weight is left over"),
    ),
    "a layer too many": _left_over("model.layers.1.mlp.up_proj.packed"),
    "bias": _left_over(f"{Q}.bias"),
    "name path-like": _left_over("../../etc/passwd"),
    "name with control characters": _left_over("a\x00\x1b[31m\n"),
    "name over 4 KiB": _left_over("x" * 5000),
    "centroids as a tensor": _left_over(f"{Q}.centroids"),
    "the same tensor under two prefixes": Spoilt(
        lambda s: s.set(**{"model.language_model.norm.weight": torch.ones(128)}),
        ("model.language_model.norm.weight", "are the same tensor of the model"),
    ),
    # 10: quantised or not
    "plain where quantised": Spoilt(
        lambda s: _make_plain(s, PLAIN), (f"{Q}.packed is missing", "has a plain weight", f"{Q}.weight is left over")
    ),
    "quantised where plain": Spoilt(
        lambda s: s.quantization(modules_to_not_convert=[Q]),
        (f"{Q}.weight is missing", "has packed codes", f"{Q}.packed is left over"),
    ),
    "plain beside quantised": _left_over(f"{Q}.weight"),
    "packed absent": Spoilt(lambda s: s.set(**{f"{Q}.packed": None}), (f"{Q}.packed is missing",)),
    "norms absent": Spoilt(lambda s: s.set(**{f"{Q}.norms": None}), (f"{Q}.norms is missing",)),
    "scales absent": Spoilt(lambda s: s.set(**{f"{Q}.awq_scales": None}), (f"{Q}.awq_scales is missing",)),
    "scales of the embedding": _left_over(f"{EMBEDDING}.awq_scales"),
    "scales without awq": Spoilt(
        lambda s: s.quantization(awq=False), (f"{Q}.awq_scales is left over", f"{K}.awq_scales is left over")
    ),
    # 12: dtypes and shapes
    "packed int8": _changed(f"{Q}.packed", lambda t: t.to(torch.int8), "torch.uint8", "torch.int8"),
    "packed fp16": _changed(f"{Q}.packed", lambda t: t.to(torch.float16), "torch.float16"),
    "packed short of a column": _changed(f"{Q}.packed", _shorter, "[128, 80]", "[128, 79]"),
    "packed long by a column": _changed(f"{Q}.packed", _longer, "[128, 80]", "[128, 81]"),
    "packed short of a row": _changed(f"{Q}.packed", lambda t: _shorter(t, 0), "[128, 80]", "[127, 80]"),
    "packed long by a row": _changed(f"{Q}.packed", lambda t: _longer(t, 0), "[128, 80]", "[129, 80]"),
    "packed flat": _changed(f"{Q}.packed", torch.flatten, "[10240]"),
    "packed transposed": _changed(f"{Q}.packed", torch.t, "[80, 128]"),
    "packed empty": _changed(f"{Q}.packed", lambda t: t[:0], "[0, 80]"),
    "packed of the embedding short": _changed(f"{EMBEDDING}.packed", _shorter, "[256, 80]", "[256, 79]"),
    "norms fp32": _changed(f"{Q}.norms", torch.Tensor.float, "torch.float16", "torch.float32"),
    "norms bf16": _changed(f"{Q}.norms", torch.Tensor.bfloat16, "torch.bfloat16"),
    "a norm too many a row": _changed(f"{DOWN}.norms", _longer, "[128, 2]", "[128, 3]"),
    "a norm too few a row": _changed(f"{DOWN}.norms", _shorter, "[128, 2]", "[128, 1]"),
    "norms of one row too few": _changed(f"{DOWN}.norms", lambda t: _shorter(t, 0), "[127, 2]"),
    "norms flat": _changed(f"{Q}.norms", torch.flatten, "[128]"),
    "scales fp32": _changed(f"{Q}.awq_scales", torch.Tensor.float, "torch.float32"),
    "scales one too few": _changed(f"{Q}.awq_scales", _shorter, "[128]", "[127]"),
    "scales one too many": _changed(f"{Q}.awq_scales", _longer, "[128]", "[129]"),
    "scales 2-D": _changed(f"{Q}.awq_scales", lambda t: t[None], "[1, 128]"),
    "norm weight of another length": _changed(NORM, _shorter, "[128]", "[127]"),
    "norm weight of integers": _changed(NORM, torch.Tensor.int, "a float dtype", "torch.int32"),
    "all wrong tensors": Spoilt(
        lambda s: (s.change(f"{Q}.packed", _shorter), s.change(f"{K}.norms", torch.Tensor.float)),
        (f"{Q}.packed must be", f"{K}.norms must be"),
    ),
    # 16: the table, and the rest of the metadata
    "no centroids": Spoilt(lambda s: s.metadata(centroids=None), ("spoilt", "'centroids' is missing")),
    "no bits per tensor": Spoilt(lambda s: s.metadata(bits_per_tensor=None), ("spoilt", "'bits_per_tensor'")),
    "no bit order": Spoilt(lambda s: s.metadata(bit_order=None), ("spoilt", "'bit_order'", "None")),
    "another bit order": Spoilt(lambda s: s.metadata(bit_order="msb"), ("'bit_order'", "'lsb'", "'msb'")),
    "no table for the width": Spoilt(lambda s: s.table("5", None), ("no table for the 5 bits of", Q)),
    "other bits in the metadata": Spoilt(
        lambda s: s.metadata(bits_per_tensor=json.dumps({Q: 4})), (f"says 4 for {Q}", f"says None for {K}")
    ),
    "bits per tensor malformed": Spoilt(lambda s: s.metadata(bits_per_tensor="[5]"), ("'bits_per_tensor'", "list")),
    "centroids not JSON": Spoilt(lambda s: s.metadata(centroids="{"), ("'centroids'", "not valid JSON")),
    "centroids too few": Spoilt(lambda s: s.table("5", [0.1] * 31), ("'centroids'['5']", "31 values")),
    "centroids too many": Spoilt(lambda s: s.table("5", [0.1] * 33), ("'centroids'['5']", "33 values")),
    "centroids unsorted": Spoilt(lambda s: s.table("5", list(range(32, 0, -1))), ("'centroids'['5']", "increasing")),
    "centroids duplicate": Spoilt(lambda s: s.table("5", [0, *range(31)]), ("'centroids'['5']", "increasing")),
    "centroids NaN": Spoilt(lambda s: s.table("5", [*range(31), float("nan")]), ("'centroids'['5']", "finite")),
    "centroids infinite": Spoilt(lambda s: s.table("5", [*range(31), 1e39]), ("'centroids'['5']", "finite")),
    "centroids of strings": Spoilt(lambda s: s.table("5", ["1"] * 32), ("'centroids'['5']", "numbers")),
    "config of other bits": Spoilt(
        lambda s: s.quantization(bits=4), (f"{{{Q}.packed}}", f"{Q}.packed must be", "[128, 64]", "no table for the 4")
    ),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", HEADERS)
def test_tensors_that_are_not_those_of_the_model(stored: Stored, case: str, reader: str) -> None:
    _refusal(stored, HEADERS[case], reader)


def _bad_norm(value: float, found: str) -> Spoilt:
    name = f"{DOWN}.norms"
    return Spoilt(lambda s: s.poke(name, (7, 1), value), (f"{{{name}}}", name, f"found {found} at row 7, block 1"))


def _bad_scale(value: float, found: str) -> Spoilt:
    name = f"{Q}.awq_scales"
    return Spoilt(lambda s: s.poke(name, (5,), value), (f"{{{name}}}", name, f"found {found} at [5]"))


VALUES: dict[str, Spoilt] = {
    "norm NaN": _bad_norm(float("nan"), "nan"),
    "norm infinite": _bad_norm(float("inf"), "inf"),
    "norm minus infinite": _bad_norm(-float("inf"), "-inf"),
    "norm negative": _bad_norm(-1.0, "-1.0"),
    "norm of the embedding": Spoilt(
        lambda s: s.poke(f"{EMBEDDING}.norms", (255, 0), float("nan")),
        (f"{{{EMBEDDING}.norms}}", f"{EMBEDDING}.norms", "row 255, block 0"),
    ),
    "scale 0": _bad_scale(0.0, "0.0"),
    "scale NaN": _bad_scale(float("nan"), "nan"),
    "scale infinite": _bad_scale(float("inf"), "inf"),
    "scale negative": _bad_scale(-0.5, "-0.5"),
    "norm and scale of different layers": Spoilt(
        lambda s: (s.poke(f"{DOWN}.norms", (0, 0), -1.0), s.poke(f"{Q}.awq_scales", (0,), 0.0)),
        (f"{DOWN}.norms", f"{Q}.awq_scales"),
    ),
}


def _dequantize(folder: Path) -> None:
    dequantize_checkpoint(folder, folder.parent / "dense")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", VALUES)
def test_values_that_are_no_scales(stored: Stored, case: str, reader: str) -> None:
    _refusal(stored, VALUES[case], reader)


@pytest.mark.parametrize("case", ["norm NaN", "norm negative", "scale 0"])
def test_values_that_are_no_scales_are_not_dequantised(stored: Stored, case: str) -> None:
    with pytest.raises(CheckpointError, match=r"\.safetensors: .*(norms|awq_scales) must be"):
        VALUES[case].spoil(stored) or _dequantize(stored.folder)
    assert os.listdir(stored.folder.parent) == ["spoilt"]


def test_verify_lists_plain_tensors_with_nan(stored: Stored) -> None:
    stored.poke(NORM, (3,), float("nan"))
    stored.poke("model.norm.weight", (3,), float("inf"))
    with pytest.raises(CheckpointError) as caught:
        _verify(stored.folder)
    for name in (NORM, "model.norm.weight"):
        assert f"{stored.weight_map[name]}: {name} has NaN or infinite" in str(caught.value)


# 17 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, -0.0, 2.0**-24])
def test_a_norm_of_zero_or_next_to_it(stored: Stored, value: float) -> None:
    stored.poke(f"{DOWN}.norms", (7, 1), value)
    _verify(stored.folder)
    model = load_model(stored.folder, dtype=torch.float32)
    weight = model.get_submodule(DOWN).dequantize(torch.float32)
    assert weight[7, 128:].abs().max() <= abs(value)
    assert weight[7, :128].abs().max() > 0
    logits = model(torch.arange(8, device=model.device)[None]).logits
    assert logits.isfinite().all()


# 7: index and shards -------------------------------------------------------------------------------------------------


def _move(stored: Stored, index: Callable[[dict[str, str]], object]) -> None:
    weight_map = stored.weight_map
    index(weight_map)
    (stored.folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def _remove_all(stored: Stored) -> None:
    for file in set(stored.weight_map.values()):
        (stored.folder / file).unlink()


def _folder_for_shard(stored: Stored) -> None:
    file = stored.folder / stored.weight_map[NORM]
    file.unlink()
    file.mkdir()


def _copy_into_another(stored: Stored) -> None:
    """Put q_proj's codes into the embedding's shard too."""
    packed = stored.read(stored.weight_map[f"{Q}.packed"])[0][f"{Q}.packed"]
    index = (stored.folder / INDEX_NAME).read_bytes()
    file = stored.weight_map[f"{EMBEDDING}.packed"]
    tensors, metadata = stored.read(file)
    stored.write(file, tensors | {f"{Q}.packed": packed}, metadata)
    (stored.folder / INDEX_NAME).write_bytes(index)


def _replace_shard(content: bytes) -> Callable[[Stored], object]:
    return lambda stored: (stored.folder / stored.weight_map[NORM]).write_bytes(content)


FILES: dict[str, Spoilt] = {
    "shard missing": Spoilt(
        lambda s: (s.folder / s.weight_map[NORM]).unlink(), (f"{{{NORM}}}", "this shard is missing")
    ),
    "all shards missing": Spoilt(_remove_all, (f"{{{Q}.packed}}", f"{{{EMBEDDING}.packed}}", f"{{{DOWN}.packed}}")),
    "folder for a shard": Spoilt(_folder_for_shard, (f"{{{NORM}}}", "not a file")),
    "empty shard": Spoilt(_replace_shard(b""), (f"{{{NORM}}}", "not a readable safetensors file")),
    "git-lfs pointer": Spoilt(_replace_shard(b"version https://git-lfs.github.com/spec/v1\n"), ("git lfs pull",)),
    "pickle": Spoilt(_replace_shard(b"\x80\x04\x95"), (f"{{{NORM}}}", "pickle")),
    "in the index only": Spoilt(
        lambda s: _move(s, lambda m: m.update({"ghost": m[NORM], "wraith": m[NORM]})),
        ("puts ghost in", "puts wraith in", "nowhere", f"{{{NORM}}}"),
    ),
    "in the shard only": Spoilt(
        lambda s: _move(s, lambda m: (m.pop(f"{Q}.norms"), m.pop(f"{K}.norms"))),
        (f"holds {Q}.norms", f"holds {K}.norms", f"{{{Q}.norms}}", INDEX_NAME),
    ),
    "in another shard": Spoilt(
        lambda s: _move(s, lambda m: m.update({f"{Q}.norms": m[f"{EMBEDDING}.packed"]})),
        (f"puts {Q}.norms in", f"{{{Q}.norms}}", f"{{{EMBEDDING}.packed}}"),
    ),
    "in two shards": Spoilt(
        _copy_into_another, (f"{Q}.packed is in both", f"{{{Q}.packed}}", f"{{{EMBEDDING}.packed}}")
    ),
    "absolute path": Spoilt(
        lambda s: _move(s, lambda m: m.update({NORM: "/etc/x.safetensors"})), (INDEX_NAME, NORM, "/etc/x.safetensors")
    ),
    "climbing path": Spoilt(
        lambda s: _move(s, lambda m: m.update({NORM: "../x.safetensors"})), (INDEX_NAME, NORM, "../x.safetensors")
    ),
    "no weights": Spoilt(lambda s: (_remove_all(s), (s.folder / INDEX_NAME).unlink()), ("spoilt", SINGLE_NAME)),
    # 9: config.json, as a file
    "config missing": Spoilt(lambda s: (s.folder / "config.json").unlink(), ("config.json", "cannot be read")),
    "config not JSON": Spoilt(
        lambda s: (s.folder / "config.json").write_text("model_type: qwen3"), ("config.json", "not valid JSON")
    ),
    "config a list": Spoilt(lambda s: (s.folder / "config.json").write_text("[]"), ("config.json", "found list")),
    "config with NaN": Spoilt(lambda s: s.config(rms_norm_eps=float("nan")), ("config.json", "NaN")),
    "config with Infinity": Spoilt(lambda s: s.config(rms_norm_eps=float("inf")), ("config.json", "Infinity")),
    "config with a key twice": Spoilt(
        lambda s: (s.folder / "config.json").write_text('{"model_type": "qwen3", "model_type": "qwen2"}'),
        ("config.json", "'model_type' occurs twice"),
    ),
    "config of another model": Spoilt(lambda s: s.config(hidden_size="128"), ("config.json", "hidden_size")),
    "config of an activation that is none": Spoilt(lambda s: s.config(hidden_act="?"), ("config.json", "KeyError")),
    "config of another size": Spoilt(
        lambda s: s.config(vocab_size=257), (f"{{{EMBEDDING}.packed}}", f"{EMBEDDING}.packed must be", "[257, 80]")
    ),
    # 9: unknown methods; transformers itself would leave random weights
    "unknown method": Spoilt(
        lambda s: s.quantization(quant_method="polarquant2"), ("config.json", "quant_method", "'polarquant2'")
    ),
    "method missing": Spoilt(lambda s: s.config(quantization_config={"bits": 5}), ("quant_method", "None")),
    "method of another kind": Spoilt(lambda s: s.quantization(quant_method=5), ("quant_method", "5")),
    "quantization_config a string": Spoilt(lambda s: s.config(quantization_config="polarquant"), ("quant_method",)),
    "quantization_config a list": Spoilt(lambda s: s.config(quantization_config=[]), ("quant_method", "[]")),
}


@pytest.mark.parametrize("reader", ["load_model", "verify"])
@pytest.mark.parametrize("case", FILES)
def test_files_that_are_not_those_of_a_checkpoint(stored: Stored, case: str, reader: str) -> None:
    _refusal(stored, FILES[case], reader)


def test_a_quantised_checkpoint_without_its_config_is_no_plain_one(stored: Stored) -> None:
    stored.config(quantization_config=None)
    with pytest.raises(CheckpointError, match=rf"{Q}\.weight is missing: .* has packed codes"):
        load_model(stored.folder)
    with pytest.raises(CheckpointError, match="no quantization_config"):
        _verify(stored.folder)


# 9: quantization_config ----------------------------------------------------------------------------------------------


def _bad_key(key: str, value: object) -> Spoilt:
    return Spoilt(lambda s: s.quantization(**{key: value}), (f"quantization_config.{key}",), ConfigError)


BAD_CONFIG: dict[str, Spoilt] = {
    f"{key}={value!r:.20}": _bad_key(key, value)
    for key, values in {
        "bits": (True, 5.0, "5", None, [5], 0, 1, 9, -5, 10**30),
        "block_size": (True, 128.0, "128", None, 64, 256, -128, 0, 10**30),
        "format_version": (2, 0, -1, "1", 1.0, True, None),
        "bit_order": ("msb", "", None, 1),
        "awq": (0, 1, "true", None),
        "bits_per_layer": ([], "x", {Q: 9}, {Q: True}, {Q: 4.0}, {Q: None}),
        "modules_to_not_convert": ("lm_head", {"lm_head": 1}, [1], [None]),
    }.items()
    for value in values
} | {
    "unknown key": Spoilt(lambda s: s.quantization(group_size=64), ("quantization_config", "group_size"), ConfigError),
    "unknown keys": Spoilt(lambda s: s.quantization(zero=1, scale=1), ("'scale'", "'zero'"), ConfigError),
    "pattern without a layer": Spoilt(
        lambda s: s.quantization(modules_to_not_convert=["nothing*"]), ("nothing*",), ConfigError
    ),
    "bits for no layer": Spoilt(lambda s: s.quantization(bits_per_layer={"nothing": 4}), ("nothing",), ConfigError),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", BAD_CONFIG)
def test_a_quantization_config_that_is_none(stored: Stored, case: str, reader: str) -> None:
    row = BAD_CONFIG[case]
    _refusal(stored, row, reader)


@pytest.mark.parametrize("reader", ["load_model", "verify"])
def test_a_bad_quantization_config_is_one_of_config_json(stored: Stored, reader: str) -> None:
    stored.quantization(bits=9)
    with pytest.raises(ConfigError, match=r"config\.json: quantization_config\.bits"):
        READERS[reader](stored.folder)


# 11 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "nonsense", None, 3, ["qwen3"], "QWEN3"])
@pytest.mark.parametrize("reader", ["load_model", "verify"])
def test_an_unknown_architecture(stored: Stored, model_type: object, reader: str) -> None:
    row = Spoilt(lambda s: s.config(model_type=model_type), (repr(model_type), *SUPPORTED), UnsupportedModelError)
    _refusal(stored, row, reader)


@pytest.mark.parametrize("model_type", ["llama", "nonsense", None])
def test_an_unknown_architecture_is_not_quantised(source: Path, tmp_path: Path, model_type: object) -> None:
    shutil.copytree(source, tmp_path / "spoilt")
    Stored(tmp_path / "spoilt").config(model_type=model_type)
    with pytest.raises(UnsupportedModelError, match="known are"):
        plan_checkpoint(tmp_path / "spoilt", PolarQuantConfig(), awq=False)


def test_a_quantised_checkpoint_is_not_quantised_again(quantized: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="quantised already"):
        plan_checkpoint(quantized, PolarQuantConfig(), awq=False)


# Plain sources -------------------------------------------------------------------------------------------------------


def _spoil_source(source: Path, out: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Path:
    """A copy of a single-file checkpoint with one tensor changed or, for None, removed."""
    shutil.copytree(source, out)
    with safe_open(out / SINGLE_NAME, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    changed = change(tensors.pop(name).clone())
    save_file(tensors | ({} if changed is None else {name: changed.contiguous()}), out / SINGLE_NAME, {"format": "pt"})
    return out


def _set(place: Any, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[place] = value
        return tensor

    return change


PLAIN_SPOILT: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor | None], str]] = {
    "missing": (lambda t: None, f"{DOWN}.weight is missing"),
    "shape": (_shorter, rf"model\.safetensors: {DOWN}\.weight must be .*\[128, 256\], found .*\[128, 255\]"),
    "integers": (lambda t: t.to(torch.int8), rf"model\.safetensors: {DOWN}\.weight must be a float dtype"),
}


@pytest.mark.parametrize("case", PLAIN_SPOILT)
def test_a_plain_checkpoint_that_is_not_that_of_the_model(source: Path, tmp_path: Path, case: str) -> None:
    change, message = PLAIN_SPOILT[case]
    folder = _spoil_source(source, tmp_path / "spoilt", f"{DOWN}.weight", change)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)
    with pytest.raises(CheckpointError, match=message):
        plan_checkpoint(folder, PolarQuantConfig(), awq=False)


# 18, 19: weights the format cannot hold; one that it can
UNQUANTIZABLE: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "NaN": (_set((5, 130), float("nan")), r"1 NaN or infinite elements, the first at \[5, 130\] = nan"),
    "infinite": (_set((127, 255), float("inf")), r"1 NaN or infinite elements, the first at \[127, 255\] = inf"),
    "minus infinite": (_set((0, 0), -float("inf")), r"\[0, 0\] = -inf"),
    "a row of NaN": (_set(9, float("nan")), r"256 NaN or infinite elements, the first at \[9, 0\]"),
    "norm beyond fp16": (_set((3, slice(128, 256)), 6e3), r"row 3, block 1 is beyond fp16"),
    "largest bf16": (_set((3, slice(0, 128)), torch.finfo(torch.bfloat16).max), r"row 3, block 0 is beyond fp16"),
    "all too small": (lambda t: t * 1e-9, r"too small for fp16"),
    "all subnormal": (_set(slice(None), 1e-39), r"too small for fp16"),
}


@pytest.mark.parametrize("case", UNQUANTIZABLE)
def test_weights_that_cannot_be_quantised(source: Path, tmp_path: Path, case: str) -> None:
    change, message = UNQUANTIZABLE[case]
    folder = _spoil_source(source, tmp_path / "spoilt", f"{DOWN}.weight", change)
    plan = plan_checkpoint(folder, PolarQuantConfig(), awq=False)
    with pytest.raises(QuantizationError, match=rf"model\.safetensors: {DOWN}\.weight: .*{message}"):
        quantize_checkpoint(plan, tmp_path / "out", max_shard_size="40KB")
    assert os.listdir(tmp_path) == ["spoilt"]


@pytest.mark.parametrize("case", ["NaN", "norm beyond fp16", "all too small"])
def test_weights_that_cannot_be_quantised_on_the_fly(source: Path, tmp_path: Path, case: str) -> None:
    change, message = UNQUANTIZABLE[case]
    folder = _spoil_source(source, tmp_path / "spoilt", f"{DOWN}.weight", change)
    with pytest.raises(CheckpointError, match=rf"{DOWN}\.weight: .*{message}"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=PolarQuantConfig())


@pytest.mark.parametrize("change", [_set(slice(None), 0.0), _set(0, 1e-9), _set((0, slice(0, 128)), 0.0)])
def test_dead_weights_are_quantised(source: Path, tmp_path: Path, change: Callable[..., torch.Tensor]) -> None:
    """An all-zero weight, a row or a block next to nothing among others."""
    folder = _spoil_source(source, tmp_path / "spoilt", f"{DOWN}.weight", change)
    quantize_checkpoint(plan_checkpoint(folder, PolarQuantConfig(), awq=False), tmp_path / "out")
    _verify(tmp_path / "out")
    weight = load_model(tmp_path / "out", dtype=torch.float32).get_submodule(DOWN).dequantize(torch.float32)
    assert weight.isfinite().all()
    assert weight[0, :128].abs().max() <= 1e-8


# AWQ scales that are not those of the plan ---------------------------------------------------------------------------


def _without(scales: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in scales.items() if key != name}


AWQ_SPOILT: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
    "none": (lambda s: {}, rf"missing .*{Q}"),
    "one missing": (lambda s: _without(s, Q), rf"missing \['{Q}'\]"),
    "of no layer": (lambda s: s | {"nothing": torch.ones(128)}, r"not planned \['nothing'\]"),
    "of the embedding": (lambda s: s | {EMBEDDING: torch.ones(128)}, rf"not planned \['{EMBEDDING}'\]"),
    "wrong length": (lambda s: s | {Q: torch.ones(127)}, rf"{Q}\.weight: awq_scales must have shape \[128\]"),
    "zero": (lambda s: s | {Q: torch.zeros(128)}, rf"{Q}\.weight: awq_scales must be finite and positive"),
    "zero in fp16": (lambda s: s | {Q: torch.full((128,), 1e-9)}, rf"{Q}\.weight: awq_scales must be finite"),
    "NaN": (lambda s: s | {Q: torch.full((128,), float("nan"))}, rf"{Q}\.weight: awq_scales must be finite"),
}


@pytest.mark.parametrize("case", AWQ_SPOILT)
def test_scales_that_are_not_those_of_the_plan(source: Path, tmp_path: Path, case: str) -> None:
    change, message = AWQ_SPOILT[case]
    plan = plan_checkpoint(source, PolarQuantConfig(), awq=True)
    with pytest.raises(ArgumentError, match=message):
        quantize_checkpoint(plan, tmp_path / "out", awq_scales=change(_scales(plan)))
    assert os.listdir(tmp_path) == []


def test_scales_for_a_plan_without(source: Path, tmp_path: Path) -> None:
    plan = plan_checkpoint(source, PolarQuantConfig(), awq=False)
    with pytest.raises(ArgumentError, match="not planned"):
        quantize_checkpoint(plan, tmp_path / "out", awq_scales=_scales(plan))
    assert os.listdir(tmp_path) == []


# 23: the output ------------------------------------------------------------------------------------------------------

Write = Callable[..., object]


def _write_quantized(source: Path, quantized: Path, out: Path, **options: Any) -> None:
    plan = plan_checkpoint(source, PolarQuantConfig(), awq=True)
    quantize_checkpoint(plan, out, awq_scales=_scales(plan), max_shard_size="40KB", **options)


def _write_absmax(source: Path, quantized: Path, out: Path, **options: Any) -> None:
    write_absmax(plan_checkpoint(source, PolarQuantConfig(), awq=False), out, max_shard_size="70KB", **options)


def _write_dense(source: Path, quantized: Path, out: Path, **options: Any) -> None:
    dequantize_checkpoint(quantized, out, max_shard_size="70KB", **options)


@pytest.fixture(params=[_write_quantized, _write_absmax, _write_dense])
def write(request: pytest.FixtureRequest, source: Path, quantized: Path) -> Write:
    """Each of the writers, called as write(out, **options)."""
    return lambda out, **options: request.param(source, quantized, out, **options)


def _snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden names too."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_a_new_output_is_whole_and_alone(write: Write, tmp_path: Path) -> None:
    write(tmp_path / "new" / "out")
    assert os.listdir(tmp_path / "new") == ["out"]
    assert load_model(tmp_path / "new" / "out") is not None


def test_an_existing_output_is_refused(write: Write, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    before = _snapshot(tmp_path)
    with pytest.raises(OutputError, match=r"out exists and is not empty: .*--overwrite"):
        write(tmp_path / "out")
    assert _snapshot(tmp_path) == before


def test_an_empty_folder_is_filled(write: Write, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / INDEX_NAME).is_file()


def test_an_existing_output_is_replaced_as_a_whole(write: Write, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.safetensors").write_text("x")
    write(tmp_path / "out", overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert "old.safetensors" not in os.listdir(tmp_path / "out")


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_no_folder(write: Write, tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = _snapshot(tmp_path)
    for name in ("out", "link"):
        with pytest.raises(OutputError, match=rf"{name} exists and is not a folder"):
            write(tmp_path / name, overwrite=overwrite)
    assert _snapshot(tmp_path) == before


def test_an_output_below_a_file(write: Write, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OutputError, match=r"file/out: cannot be written"):
        write(tmp_path / "file" / "out")
    assert _snapshot(tmp_path) == {"file": b"precious"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_that_may_not_be_written(write: Write, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match=r"out: cannot be written: Permission denied"):
            write(tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, exists: bool
) -> None:
    save, calls = writer.save_file, []

    def full(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        calls.append(file)
        if len(calls) == 2:
            raise error
        save(tensors, file, metadata=metadata)

    _precious(tmp_path / "out", exists)
    before = _snapshot(tmp_path)
    monkeypatch.setattr(writer, "save_file", full)
    with pytest.raises(OutputError, match=r"out: could not be written: .*No space left on device"):
        write(tmp_path / "out", overwrite=True)
    assert len(calls) == 2
    assert _snapshot(tmp_path) == before


@pytest.mark.parametrize("exists", [False, True])
def test_an_interruption(write: Write, tmp_path: Path, exists: bool) -> None:
    seen = []

    def interrupt(done: int, total: int, what: str) -> None:
        seen.append(os.listdir(tmp_path))
        if done == 3:
            raise KeyboardInterrupt

    _precious(tmp_path / "out", exists)
    before = _snapshot(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", overwrite=True, progress=interrupt)
    assert len(seen) == 3
    assert any(".partial" in name for name in seen[-1])
    assert _snapshot(tmp_path) == before


def test_an_output_that_cannot_be_moved_into_place(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if ".partial" in Path(source).name:
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    _precious(tmp_path / "out", True)
    before = _snapshot(tmp_path)
    monkeypatch.setattr(writer.os, "replace", refuse)
    with pytest.raises(OutputError, match=r"out: could not be written: .*Input/output error"):
        write(tmp_path / "out", overwrite=True)
    assert _snapshot(tmp_path) == before


def _precious(folder: Path, exists: bool) -> None:
    if exists:
        folder.mkdir()
        (folder / "precious.safetensors").write_text("x")


@pytest.mark.parametrize("size", ["", "5", "abc", "-5MB", "0KB", "0.5", 0, -1, "1e3GB", "infGB", "5PB", "9" * 400])
def test_a_shard_size_that_is_none(write: Write, source: Path, tmp_path: Path, size: int | str) -> None:
    plan = plan_checkpoint(source, PolarQuantConfig(), awq=False)
    if size == "5":  # bytes: a shard for every tensor
        quantize_checkpoint(plan, tmp_path / "out", max_shard_size=size)
        assert len(list((tmp_path / "out").glob("*.safetensors"))) > 10
        return
    with pytest.raises(ConfigError, match="the size of a shard must be"):
        quantize_checkpoint(plan, tmp_path / "out", max_shard_size=size)
    assert os.listdir(tmp_path) == []


# Random damage -------------------------------------------------------------------------------------------------------


def _flip(path: Path, rng: random.Random, end: int) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 2, 4))):
        content[rng.randrange(min(end, len(content)))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


@pytest.mark.parametrize("seed", range(6))
def test_damaged_shards_load_or_are_refused(stored: Stored, seed: int) -> None:
    rng = random.Random(seed)
    files = {file: (stored.folder / file).read_bytes() for file in sorted(set(stored.weight_map.values()))}
    refused = 0
    for _ in range(20):
        file = rng.choice(sorted(files))
        end = rng.choice((8, 2000, 4000, len(files[file])))
        _flip(stored.folder / file, rng, end)
        try:
            load_model(stored.folder)
        except PolarError:
            refused += 1
        (stored.folder / file).write_bytes(files[file])
    assert refused > 0
    load_model(stored.folder)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["config.json", INDEX_NAME])
def test_damaged_json_loads_or_is_refused(stored: Stored, name: str, seed: int) -> None:
    rng = random.Random(seed)
    path, refused = stored.folder / name, 0
    content = path.read_bytes()
    for _ in range(15):
        _flip(path, rng, len(content))
        try:
            load_model(stored.folder)
        except PolarError:
            refused += 1
        path.write_bytes(content)
    assert refused > 0
