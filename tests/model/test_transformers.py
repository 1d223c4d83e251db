"""save_pretrained and from_pretrained of transformers, `load_model`, and checkpoints that both must refuse."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen3_5Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import model_patch
from model_patch import (
    CheckpointError,
    ConfigError,
    PolarQuantConfig,
    UnsupportedModelError,
    load_model,
    patch_model,
    register,
)
from model_patch.load import meta_model
from polar_kernels import PolarModule, lloyd_max_levels, published_levels

UP = "model.layers.0.mlp.up_proj"
QUERY = "model.layers.1.self_attn.q_proj"
SMALL_SHARDS = "60KB"


def polar_modules(model: torch.nn.Module) -> dict[str, PolarModule]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PolarModule)}


def same_tensors(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Whether both state dicts are equal in names, dtypes and bits."""
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(
        left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left
    )


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors*")}


# Round trips


@pytest.mark.parametrize("awq", [False, True])
def test_a_patched_model_comes_back_the_same(zoo: Any, architecture: str, awq: bool, tmp_path: Path) -> None:
    model = zoo.model(architecture)
    patch_model(model, awq_scales=zoo.awq_scales(model) if awq else None)
    model.save_pretrained(tmp_path / "saved")
    loaded = zoo.load(architecture, tmp_path / "saved")
    assert same_tensors(loaded, model)
    assert type(loaded) is type(model)
    assert torch.equal(zoo.logits(architecture, loaded), zoo.logits(architecture, model))
    assert zoo.tokens(architecture, loaded) == zoo.tokens(architecture, model)


def test_saved_names_dtypes_and_metadata_are_those_of_the_format(zoo: Any, architecture: str) -> None:
    content = zoo.read(zoo.quantized(architecture, awq=True))
    model = zoo.load(architecture, zoo.quantized(architecture, awq=True))
    layers = polar_modules(model)
    dtypes = {"packed": torch.uint8, "norms": torch.float16, "awq_scales": torch.float16}
    for name, module in layers.items():
        has_scales = not name.endswith("embed_tokens")
        parts = [part for part in dtypes if part != "awq_scales" or has_scales]
        assert {key for key in content.tensors if key.startswith(f"{name}.")} == {
            *(f"{name}.{part}" for part in parts),
            *([f"{name}.bias"] if getattr(module, "bias", None) is not None else []),
        }
        assert all(content.tensors[f"{name}.{part}"].dtype == dtypes[part] for part in parts)
    assert not [key for key in content.tensors if "centroids" in key]
    assert json.loads(content.metadata["bits_per_tensor"]) == dict.fromkeys(layers, 5)
    assert json.loads(content.metadata["centroids"]) == {"5": lloyd_max_levels(5).tolist()}
    assert content.metadata["bit_order"] == "lsb"
    assert content.metadata["format"] == "pt"
    assert content.config["quantization_config"] == PolarQuantConfig(awq=True).to_dict()


@pytest.mark.parametrize("max_shard_size", ["5GB", SMALL_SHARDS])
def test_saving_again_gives_the_same_bytes(zoo: Any, architecture: str, max_shard_size: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    load_model(zoo.quantized(architecture), device=zoo.device).save_pretrained(first, max_shard_size=max_shard_size)
    load_model(first, device=zoo.device).save_pretrained(second, max_shard_size=max_shard_size)
    assert shards(first) == shards(second)
    assert (len(shards(first)) > 2) == (max_shard_size == SMALL_SHARDS)
    if max_shard_size == "5GB":
        assert shards(first) == shards(zoo.quantized(architecture))


def test_every_shard_carries_the_metadata(zoo: Any, tmp_path: Path) -> None:
    zoo.load("qwen3", zoo.quantized("qwen3")).save_pretrained(tmp_path / "shards", max_shard_size=SMALL_SHARDS)
    expected = zoo.read(zoo.quantized("qwen3")).metadata
    headers = [data for name, data in shards(tmp_path / "shards").items() if name.endswith(".safetensors")]
    stated = [json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"] for data in headers]
    assert stated == [expected] * len(headers)


def test_shards_load_like_a_single_file(zoo: Any, architecture: str, tmp_path: Path) -> None:
    whole = zoo.load(architecture, zoo.quantized(architecture))
    whole.save_pretrained(tmp_path / "shards", max_shard_size=SMALL_SHARDS)
    assert same_tensors(zoo.load(architecture, tmp_path / "shards"), whole)


def test_mixed_bits_and_exclusions_come_back(zoo: Any, tmp_path: Path) -> None:
    model = zoo.model("qwen3_5_text")
    config = PolarQuantConfig(4, {"*.mlp.*": 2, "lm_head": 8}, ["embed_tokens", "*.in_proj_z"])
    report = patch_model(model, config)
    model.save_pretrained(tmp_path / "saved")
    loaded = load_model(tmp_path / "saved", device=zoo.device)
    assert same_tensors(loaded, model)
    assert {name: module.bits for name, module in polar_modules(loaded).items()} == report.replaced
    stated = zoo.read(tmp_path / "saved").config["quantization_config"]
    assert stated["modules_to_not_convert"] == ["model.embed_tokens", "model.layers.0.linear_attn.in_proj_z"]


def test_the_text_part_of_a_vision_language_checkpoint(zoo: Any, tmp_path: Path) -> None:
    whole = zoo.load("qwen3_5", zoo.quantized("qwen3_5", awq=True))
    text = AutoModelForCausalLM.from_pretrained(
        zoo.quantized("qwen3_5", awq=True), dtype=torch.float32, device_map={"": zoo.device}
    )
    assert type(text).__name__ == "Qwen3_5ForCausalLM"
    assert {parameter.dtype for parameter in text.parameters()} == {torch.float32}
    ids = zoo.inputs("qwen3_5_text")["input_ids"]
    with torch.no_grad():
        assert torch.equal(text(ids).logits, whole(ids).logits)
    assert zoo.tokens("qwen3_5_text", text) == zoo.tokens("qwen3_5_text", whole)
    text.save_pretrained(tmp_path / "text")
    assert same_tensors(load_model(tmp_path / "text", device=zoo.device, dtype=torch.float32), text)


def test_load_model_agrees_with_from_pretrained(zoo: Any, architecture: str) -> None:
    loaded = load_model(zoo.quantized(architecture), device=zoo.device, dtype=torch.float32)
    assert not loaded.training
    assert same_tensors(loaded, zoo.load(architecture, zoo.quantized(architecture)))


def test_load_model_of_a_plain_folder(zoo: Any, architecture: str) -> None:
    loaded = load_model(str(zoo.checkpoint(architecture)), device=zoo.device, dtype=torch.float32)
    assert not polar_modules(loaded)
    assert torch.equal(zoo.logits(architecture, loaded), zoo.logits(architecture, zoo.model(architecture)))


def test_a_quantised_head_beside_a_plain_embedding_keeps_its_own_weight(zoo: Any, tmp_path: Path) -> None:
    model = zoo.model("qwen3")
    patch_model(model, PolarQuantConfig(modules_to_not_convert=["embed_tokens"]))
    model.save_pretrained(tmp_path / "saved")
    loaded = load_model(tmp_path / "saved", device=zoo.device)
    assert torch.equal(loaded.model.embed_tokens.weight, zoo.model("qwen3").model.embed_tokens.weight)
    assert torch.equal(zoo.logits("qwen3", loaded), zoo.logits("qwen3", model))


@pytest.mark.parametrize("loader", ["load_model", "from_pretrained"])
def test_levels_come_from_the_file_and_go_back_to_it(zoo: Any, loader: str, tmp_path: Path) -> None:
    content = zoo.read(zoo.quantized("qwen3_tied"))
    content.metadata["centroids"] = json.dumps({"5": published_levels(5).tolist()})
    content.write(tmp_path / "in")
    in_zoo = loader == "from_pretrained"
    model = zoo.load("qwen3_tied", tmp_path / "in") if in_zoo else load_model(tmp_path / "in", device=zoo.device)
    assert not torch.equal(published_levels(5), lloyd_max_levels(5))
    assert all(torch.equal(module.centroids.cpu(), published_levels(5)) for module in polar_modules(model).values())
    model.save_pretrained(tmp_path / "out")
    assert zoo.read(tmp_path / "out").metadata == content.metadata


# On the fly


def test_on_the_fly_is_patch_model_bit_for_bit(zoo: Any, dense: str) -> None:
    def config() -> PolarQuantConfig:
        return PolarQuantConfig(4, {"*.layers.1.*": 3}, ["*.k_proj"])

    loaded = zoo.load(dense, zoo.checkpoint(dense), torch.bfloat16, quantization_config=config())
    patched = load_model(zoo.checkpoint(dense), device=zoo.device, dtype=torch.bfloat16)
    report = patch_model(patched, config())
    assert {name: module.bits for name, module in polar_modules(loaded).items()} == report.replaced
    assert same_tensors(loaded, patched)
    assert torch.equal(zoo.logits(dense, loaded), zoo.logits(dense, patched))


def test_what_was_quantised_on_the_fly_saves_as_if_patched(zoo: Any, dense: str, tmp_path: Path) -> None:
    loaded = zoo.load(dense, zoo.checkpoint(dense), torch.bfloat16, quantization_config=PolarQuantConfig())
    loaded.save_pretrained(tmp_path / "saved")
    assert shards(tmp_path / "saved") == shards(zoo.quantized(dense))
    config, expected = (zoo.read(f).config["quantization_config"] for f in (tmp_path / "saved", zoo.quantized(dense)))
    assert config == expected


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_on_the_fly_names_every_weight_that_is_not_finite(zoo: Any, value: float, tmp_path: Path) -> None:
    content = zoo.read(zoo.checkpoint("qwen3"))
    content.tensors[f"{UP}.weight"][3, 7] = value
    content.tensors[f"{QUERY}.weight"][0, 0] = value
    content.write(tmp_path / "bad")
    with pytest.raises(CheckpointError) as caught:
        zoo.load("qwen3", tmp_path / "bad", quantization_config=PolarQuantConfig())
    problems = sorted(caught.value.problems)
    assert len(problems) == 2
    assert problems[0].startswith(f"{UP}.weight: ")
    assert f"[3, 7] = {value}" in problems[0]
    assert problems[1].startswith(f"{QUERY}.weight: ")
    assert str(tmp_path / "bad") in str(caught.value)


def test_on_the_fly_does_not_calibrate(zoo: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="awq=True"):
        zoo.load("qwen3", zoo.checkpoint("qwen3"), quantization_config=PolarQuantConfig(awq=True))


def test_on_the_fly_with_a_pattern_that_matches_nothing(zoo: Any) -> None:
    config = PolarQuantConfig(modules_to_not_convert=["no_such"])
    with pytest.raises(ConfigError, match="no_such"):
        zoo.load("qwen3", zoo.checkpoint("qwen3"), quantization_config=config)


def test_on_the_fly_refuses_a_checkpoint_without_one_of_the_weights(zoo: Any, tmp_path: Path) -> None:
    content = zoo.read(zoo.checkpoint("qwen3"))
    del content.tensors[f"{UP}.weight"]
    content.write(tmp_path / "bad")
    with pytest.raises(CheckpointError, match=rf"{UP}\.weight is missing"):
        zoo.load("qwen3", tmp_path / "bad", quantization_config=PolarQuantConfig())


# Dtypes and devices


@pytest.mark.parametrize(
    ("dtype", "plain"),
    [
        ("auto", torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
    ],
)
@pytest.mark.parametrize("loader", ["load_model", "from_pretrained"])
def test_stored_tensors_keep_their_dtypes(
    zoo: Any, architecture: str, loader: str, dtype: torch.dtype | str, plain: torch.dtype
) -> None:
    folder = zoo.quantized(architecture, awq=True)
    by_zoo = loader == "from_pretrained"
    model = zoo.load(architecture, folder, dtype) if by_zoo else load_model(folder, device=zoo.device, dtype=dtype)
    stored = zoo.read(folder).tensors
    for name, module in polar_modules(model).items():
        assert module.centroids.dtype == torch.float32
        assert torch.equal(module.centroids.cpu(), lloyd_max_levels(5))
        for part in ("packed", "norms", "awq_scales"):
            tensor = getattr(module.polar_weight, part)
            assert (tensor is None) == (f"{name}.{part}" not in stored)
            assert tensor is None or (tensor.dtype, tensor.device.type) == (
                stored[f"{name}.{part}"].dtype,
                zoo.device.type,
            )
            assert tensor is None or torch.equal(tensor.cpu(), stored[f"{name}.{part}"].view(tensor.shape))
    assert {parameter.dtype for parameter in model.parameters()} == {plain}
    assert model.get_input_embeddings().dtype == plain
    assert zoo.logits(architecture, model).dtype == plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_a_model_leaves_the_stored_tensors(zoo: Any, architecture: str, dtype: torch.dtype) -> None:
    model = load_model(zoo.quantized(architecture, awq=True), device=zoo.device, dtype=torch.float32)
    before = {n: t.clone() for n, t in model.state_dict().items() if n.rpartition(".")[0] in polar_modules(model)}
    model.to(dtype)
    after = model.state_dict()
    for name, tensor in before.items():
        if not name.endswith(".bias"):
            assert after[name].dtype == tensor.dtype
            assert torch.equal(after[name], tensor)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert zoo.logits(architecture, model).dtype == dtype


def test_half_of_the_decoder_leaves_the_stored_tensors(zoo: Any) -> None:
    """`half` of a whole quantised model is refused by transformers; that of a part of it is not."""
    model = load_model(zoo.quantized("qwen3"), device=zoo.device, dtype=torch.float32)
    before = {name: module.polar_weight.norms.clone() for name, module in polar_modules(model).items()}
    with pytest.raises(ValueError, match=r"half\(\)"):
        model.half()
    model.model.half()
    for name, module in polar_modules(model).items():
        assert module.centroids.dtype == torch.float32
        assert torch.equal(module.polar_weight.norms, before[name])
    assert model.model.norm.weight.dtype == torch.float16


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_device_maps(zoo: Any, device_map: str | dict[str, str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(zoo.quantized("qwen3"), dtype=torch.float32, device_map=device_map)
    expected = load_model(zoo.quantized("qwen3"), device="cpu", dtype=torch.float32)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    assert same_tensors(model, expected)
    ids = zoo.inputs("qwen3")["input_ids"].cpu()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)


# Registration


def test_registration_is_idempotent() -> None:
    before = (AUTO_QUANTIZATION_CONFIG_MAPPING["polarquant"], AUTO_QUANTIZER_MAPPING["polarquant"])
    register()
    register()
    assert before == (AUTO_QUANTIZATION_CONFIG_MAPPING["polarquant"], AUTO_QUANTIZER_MAPPING["polarquant"])
    assert before[0] is PolarQuantConfig


SCRIPT = """
import sys
import model_patch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__name__, model.lm_head.polar_weight.packed.sum().item(), model.dtype)
"""


def test_importing_the_package_is_all_that_a_script_needs(zoo: Any) -> None:
    root = str(Path(model_patch.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", SCRIPT, str(zoo.quantized("qwen3"))]
    ran = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    total = zoo.read(zoo.quantized("qwen3")).tensors["lm_head.packed"].sum().item()
    assert ran.stdout.split() == ["PolarLinear", str(total), "torch.bfloat16"]


# Strict loading


def _set(name: str, index: tuple[int, ...], value: float) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        content.tensors[name][index] = value

    return change


def _remove(*names: str) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for name in names:
            del content.tensors[name]

    return change


def _replace(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        content.tensors[name] = make(content.tensors[name]).contiguous()

    return change


def _add_left_over(content: Any) -> None:
    content.tensors["model.layers.9.mlp.up_proj.packed"] = torch.zeros(2, 80, dtype=torch.uint8)


def _plain_where_quantised(content: Any) -> None:
    for part in ("packed", "norms", "awq_scales"):
        del content.tensors[f"{UP}.{part}"]
    content.tensors[f"{UP}.weight"] = torch.zeros(256, 128, dtype=torch.bfloat16)


def _quantised_where_plain(content: Any) -> None:
    content.config["quantization_config"]["modules_to_not_convert"] = [UP]


def _other_bits(content: Any) -> None:
    content.config["quantization_config"]["bits_per_layer"] = {UP: 4}


def _drop_metadata(key: str) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        del content.metadata[key]

    return change


def _set_centroids(tables: Callable[[list[float]], Any]) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        content.metadata["centroids"] = json.dumps(tables(json.loads(content.metadata["centroids"])["5"]))

    return change


def _set_metadata(key: str, value: str) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        content.metadata[key] = value

    return change


FILE = r"model\.safetensors: "
SPOILED: dict[str, tuple[Callable[[Any], None], list[str]]] = {
    "plain tensor missing": (
        _remove("model.norm.weight"),
        [r"model\.norm\.weight is missing"],
    ),
    "packed missing": (
        _remove(f"{UP}.packed"),
        [rf"{UP}\.packed is missing"],
    ),
    "norms and scales missing": (
        _remove(f"{UP}.norms", f"{QUERY}.awq_scales"),
        [rf"{UP}\.norms is missing", rf"{QUERY}\.awq_scales is missing"],
    ),
    "left over": (
        _add_left_over,
        [FILE + r"model\.layers\.9\.mlp\.up_proj\.packed is left over; .*"],
    ),
    "rows missing": (
        _replace(f"{UP}.packed", lambda t: t[:-1]),
        [FILE + rf"{UP}\.packed must be torch.uint8 \[256, 80\], found torch.uint8 \[255, 80\]"],
    ),
    "plain tensor of another shape": (
        _replace("model.norm.weight", lambda t: t[:-1]),
        [FILE + r"model\.norm\.weight must be a float dtype \[128\], found torch.bfloat16 \[127\]"],
    ),
    "norms of another dtype": (
        _replace(f"{UP}.norms", lambda t: t.float()),
        [FILE + rf"{UP}\.norms must be torch.float16 \[256, 1\], found torch.float32 \[256, 1\]"],
    ),
    "signed codes": (
        _replace(f"{UP}.packed", lambda t: t.view(torch.int8)),
        [FILE + rf"{UP}\.packed must be torch.uint8 \[256, 80\], found torch.int8 \[256, 80\]"],
    ),
    "NaN norm": (
        _set(f"{UP}.norms", (9, 0), float("nan")),
        [FILE + rf"{UP}\.norms must be finite and not negative; found nan at row 9, block 0"],
    ),
    "infinite norm": (
        _set("model.embed_tokens.norms", (0, 0), float("inf")),
        [FILE + r"model\.embed_tokens\.norms must be finite and not negative; found inf at row 0, block 0"],
    ),
    "negative norm": (
        _set("lm_head.norms", (511, 0), -0.5),
        [FILE + r"lm_head\.norms must be finite and not negative; found -0.5 at row 511, block 0"],
    ),
    "zero scale": (
        _set(f"{QUERY}.awq_scales", (100,), 0.0),
        [FILE + rf"{QUERY}\.awq_scales must be finite and positive; found 0.0 at \[100\]"],
    ),
    "plain weight where the config says quantised": (
        _plain_where_quantised,
        [
            *(
                rf"{UP}\.{part} is missing: the config says that {UP} is quantised, .* has a plain weight"
                for part in ("packed", "norms", "awq_scales")
            ),
            FILE + rf"{UP}\.weight is left over; .*",
        ],
    ),
    "codes where the config says plain": (
        _quantised_where_plain,
        [
            rf"{UP}\.weight is missing: the config says that {UP} is not quantised, .* has packed codes",
            *(FILE + rf"{UP}\.{part} is left over; .*" for part in ("packed", "norms", "awq_scales")),
        ],
    ),
    "bits of the config are not those of the codes": (
        _other_bits,
        [
            FILE + rf"{UP}\.packed must be torch.uint8 \[256, 64\], found torch.uint8 \[256, 80\]",
            rf"metadata 'centroids' has no table for the 4 bits of {UP}",
            rf"metadata 'bits_per_tensor' says 5 for {UP}, the config says 4",
        ],
    ),
    "no centroids": (
        _drop_metadata("centroids"),
        [r"the safetensors metadata 'centroids' is missing"],
    ),
    "no bits per tensor": (
        _drop_metadata("bits_per_tensor"),
        [r"the safetensors metadata 'bits_per_tensor' is missing"],
    ),
    "a level missing": (
        _set_centroids(lambda levels: {"5": levels[:-1]}),
        [r"metadata 'centroids'\['5'\]: expected a list of 32 levels, found 31 values"],
    ),
    "levels out of order": (
        _set_centroids(lambda levels: {"5": levels[::-1]}),
        [r"metadata 'centroids'\['5'\]: centroids must be finite and strictly increasing, .*"],
    ),
    "another bit order": (
        _set_metadata("bit_order", "msb"),
        [r"metadata 'bit_order' must be 'lsb', found 'msb'"],
    ),
}


def _load_by(loader: str, zoo: Any, folder: Path) -> PreTrainedModel:
    return zoo.load("qwen3", folder) if loader == "from_pretrained" else load_model(folder, device=zoo.device)


def _matches_each(problems: list[str], patterns: list[str]) -> bool:
    return len(problems) == len(patterns) and all(
        any(re.fullmatch(pattern, problem) for problem in problems) for pattern in patterns
    )


@pytest.mark.parametrize("loader", ["load_model", "from_pretrained"])
@pytest.mark.parametrize(("change", "expected"), SPOILED.values(), ids=SPOILED)
def test_spoiled_checkpoints_are_refused(
    zoo: Any, loader: str, change: Callable[[Any], None], expected: list[str], tmp_path: Path
) -> None:
    content = zoo.read(zoo.quantized("qwen3", awq=True))
    change(content)
    content.write(tmp_path / "bad")
    with pytest.raises(CheckpointError) as caught:
        _load_by(loader, zoo, tmp_path / "bad")
    assert _matches_each(caught.value.problems, expected), caught.value.problems
    assert str(tmp_path / "bad") in str(caught.value)
    assert all(problem in str(caught.value) for problem in caught.value.problems)


@pytest.mark.parametrize("loader", ["load_model", "from_pretrained"])
def test_the_unspoiled_checkpoint_loads(zoo: Any, loader: str, tmp_path: Path) -> None:
    zoo.read(zoo.quantized("qwen3", awq=True)).write(tmp_path / "good")
    assert same_tensors(_load_by(loader, zoo, tmp_path / "good"), _load_by(loader, zoo, zoo.quantized("qwen3", True)))


@pytest.mark.parametrize("loader", ["load_model", "from_pretrained"])
@pytest.mark.parametrize(
    "spoiled",
    [
        ["plain tensor missing", "packed missing", "left over", "norms of another dtype", "another bit order"],
        ["NaN norm", "infinite norm", "negative norm", "zero scale"],
    ],
    ids=["structure", "values"],
)
def test_all_problems_are_listed_at_once(zoo: Any, loader: str, spoiled: list[str], tmp_path: Path) -> None:
    content = zoo.read(zoo.quantized("qwen3", awq=True))
    if "packed missing" in spoiled:
        _remove(f"{QUERY}.packed")(content)
    for key in spoiled:
        if key != "packed missing":
            SPOILED[key][0](content)
    content.write(tmp_path / "bad")
    with pytest.raises(CheckpointError) as caught:
        _load_by(loader, zoo, tmp_path / "bad")
    expected = [pattern for key in spoiled if key != "packed missing" for pattern in SPOILED[key][1]]
    if "packed missing" in spoiled:
        expected.append(rf"{QUERY}\.packed is missing")
    assert _matches_each(caught.value.problems, expected), caught.value.problems


@pytest.mark.parametrize("loader", ["load_model", "from_pretrained"])
def test_a_bad_tensor_in_shards_is_named_with_its_shard(zoo: Any, loader: str, tmp_path: Path) -> None:
    zoo.load("qwen3", zoo.quantized("qwen3")).save_pretrained(tmp_path / "bad", max_shard_size=SMALL_SHARDS)
    index = json.loads((tmp_path / "bad" / "model.safetensors.index.json").read_text())
    shard = index["weight_map"][f"{QUERY}.packed"]
    config = json.loads((tmp_path / "bad" / "config.json").read_text())
    config["quantization_config"]["bits"] = 6
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        _load_by(loader, zoo, tmp_path / "bad")
    assert any(problem.startswith(f"{shard}: {QUERY}.packed must be") for problem in caught.value.problems)


def test_a_plain_checkpoint_with_a_tensor_missing_or_left_over(zoo: Any, tmp_path: Path) -> None:
    content = zoo.read(zoo.checkpoint("qwen3"))
    del content.tensors[f"{UP}.weight"]
    content.tensors["model.extra.weight"] = torch.zeros(1)
    content.write(tmp_path / "bad")
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path / "bad", device=zoo.device)
    expected = [rf"{UP}\.weight is missing", FILE + r"model\.extra\.weight is left over; .*"]
    assert _matches_each(caught.value.problems, expected)


def test_codes_without_a_quantization_config(zoo: Any, tmp_path: Path) -> None:
    content = zoo.read(zoo.quantized("qwen3"))
    del content.config["quantization_config"]
    content.write(tmp_path / "bad")
    with pytest.raises(CheckpointError, match=rf"{UP} is not quantised, but the checkpoint has packed codes"):
        load_model(tmp_path / "bad", device=zoo.device)


@pytest.mark.parametrize(
    ("key", "value"), [("format_version", 2), ("bit_order", "msb"), ("block_size", 64), ("grouping", 1), ("bits", 5.0)]
)
@pytest.mark.parametrize("loader", ["load_model", "from_pretrained"])
def test_an_unknown_config_is_refused(zoo: Any, loader: str, key: str, value: Any, tmp_path: Path) -> None:
    content = zoo.read(zoo.quantized("qwen3"))
    content.config["quantization_config"][key] = value
    content.write(tmp_path / "bad")
    with pytest.raises(ConfigError, match=key):
        _load_by(loader, zoo, tmp_path / "bad")


def test_a_foreign_quantisation_is_refused(zoo: Any, tmp_path: Path) -> None:
    content = zoo.read(zoo.quantized("qwen3"))
    content.config["quantization_config"] = {"quant_method": "awq"}
    content.write(tmp_path / "bad")
    with pytest.raises(CheckpointError, match="must be 'polarquant', found 'awq'"):
        load_model(tmp_path / "bad", device=zoo.device)


@pytest.mark.parametrize("loader", ["load_model", "from_pretrained"])
def test_an_unknown_architecture_is_refused(zoo: Any, loader: str, tmp_path: Path) -> None:
    content = deepcopy(zoo.read(zoo.quantized("qwen3")))
    content.config["model_type"] = "llama"
    content.write(tmp_path / "bad")
    with pytest.raises(UnsupportedModelError, match="'llama' is not supported"):
        _load_by(loader, zoo, tmp_path / "bad")


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        load_model("/no/such/folder")


def test_a_structure_is_of_transformers_own_config_class(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(PreTrainedConfig):  # as older versions of vLLM register for Qwen3.5
        model_type = "qwen3_5"

    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "qwen3_5", Other)
    assert type(AutoConfig.from_pretrained(zoo.checkpoint("qwen3_5"))) is Other
    assert type(meta_model(zoo.checkpoint("qwen3_5")).config) is Qwen3_5Config
