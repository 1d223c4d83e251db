"""`polar quantize` without its command line: the streaming writer, calibration, the AWQ search, the absmax baseline."""

import errno
import json
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel

from model_patch import (
    CheckpointError,
    ConfigError,
    OutputError,
    PolarQuantConfig,
    UnsupportedModelError,
    demo,
    load_model,
    patch_model,
)
from model_patch.architectures import Kind, kind_of, role_of
from model_patch.checkpoint import writer
from model_patch.checkpoint.reader import INDEX_NAME, Checkpoint
from model_patch.evaluate import evaluate, tokenize_file
from model_patch.patch import plan_model
from model_patch.quantize import (
    SiteStatistics,
    calibrate,
    calibrate_plan,
    plan_checkpoint,
    quantize_checkpoint,
    search_awq_scales,
    write_absmax,
)
from model_patch.quantize import checkpoint as quantize_module
from model_patch.quantize.absmax import absmax_round
from model_patch.quantize.awq import EXPONENTS
from model_patch.verify import verify_checkpoint
from polar_kernels import BLOCK_SIZE, QuantizationError, published_levels, quantize_weight, reference

SMALL_SHARDS = 60_000
UP = "model.layers.0.mlp.up_proj"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def quantize(source: Path, out: Path, config: PolarQuantConfig | None = None, **options: Any) -> list[str]:
    return quantize_checkpoint(plan_checkpoint(source, config or PolarQuantConfig(), awq=False), out, **options)


def dequantized(weight: torch.Tensor, bits: int, **options: Any) -> torch.Tensor:
    made = quantize_weight(weight, bits, **options)
    parts = (made.packed, made.norms, made.awq_scales, made.centroids)
    return reference.dequantize(*parts, weight.shape[1], torch.float32)


# The streaming writer


def test_a_single_shard_is_what_patch_model_saves(zoo: Any, architecture: str, tmp_path: Path) -> None:
    warnings = quantize(zoo.checkpoint(architecture), tmp_path / "out", device=zoo.device)
    expected = (zoo.quantized(architecture) / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected
    assert any("tokenizer.json" in warning for warning in warnings)


def test_awq_scales_and_mixed_bits_are_what_patch_model_saves(zoo: Any, architecture: str, tmp_path: Path) -> None:
    config = PolarQuantConfig(4, {"*.mlp.*": 3}, ["*.k_proj"])
    model = load_model(zoo.checkpoint(architecture), device=zoo.device)
    scales = {name: s for name, s in zoo.awq_scales(model).items() if not name.endswith("k_proj")}
    patch_model(model, config, awq_scales=scales)
    model.save_pretrained(tmp_path / "patched")
    plan = plan_checkpoint(zoo.checkpoint(architecture), config, awq=True)
    quantize_checkpoint(plan, tmp_path / "out", awq_scales=scales, device=zoo.device)
    names = ("out", "patched")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in names)
    assert one == other
    stated, expected = (zoo.read(tmp_path / name).config["quantization_config"] for name in names)
    assert stated == expected


def test_the_result_loads_and_computes_the_same(zoo: Any, architecture: str, tmp_path: Path) -> None:
    quantize(zoo.checkpoint(architecture), tmp_path / "out", device=zoo.device, max_shard_size=SMALL_SHARDS)
    loaded = load_model(tmp_path / "out", device=zoo.device, dtype=torch.float32)
    expected = load_model(zoo.quantized(architecture), device=zoo.device, dtype=torch.float32)
    assert torch.equal(zoo.logits(architecture, loaded), zoo.logits(architecture, expected))


def test_shards_hold_what_the_single_file_holds(zoo: Any, tmp_path: Path) -> None:
    quantize(zoo.checkpoint("qwen3_5"), tmp_path / "out", device=zoo.device, max_shard_size=SMALL_SHARDS)
    sharded, whole = Checkpoint.open(tmp_path / "out"), Checkpoint.open(zoo.quantized("qwen3_5"))
    assert len({info.file for info in sharded.tensors.values()}) > 3
    assert sharded.tensors.keys() == whole.tensors.keys()
    assert sharded.metadata == whole.metadata
    assert all(torch.equal(sharded.read(name), whole.read(name)) for name in whole.tensors)
    index = json.loads((tmp_path / "out" / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in whole.tensors.values())


def test_a_sharded_source_gives_the_same_result(zoo: Any, tmp_path: Path) -> None:
    load_model(zoo.checkpoint("qwen3_tied"), device="cpu").save_pretrained(tmp_path / "in", max_shard_size="100KB")
    assert (tmp_path / "in" / INDEX_NAME).is_file()
    quantize(tmp_path / "in", tmp_path / "out", device=zoo.device)
    assert not (tmp_path / "out" / INDEX_NAME).exists()
    expected = Checkpoint.open(zoo.quantized("qwen3_tied"))
    found = Checkpoint.open(tmp_path / "out")
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.read(name), expected.read(name)) for name in expected.tensors)


def test_a_second_copy_of_a_tied_weight_is_not_written(zoo: Any, tmp_path: Path) -> None:
    content = zoo.read(zoo.checkpoint("qwen3_tied"))
    content.tensors["lm_head.weight"] = content.tensors["model.embed_tokens.weight"].clone()
    content.write(tmp_path / "in")
    quantize(tmp_path / "in", tmp_path / "out", device=zoo.device)
    expected = (zoo.quantized("qwen3_tied") / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected


def test_config_and_carried_files(zoo: Any, tmp_path: Path) -> None:
    source, out = tmp_path / "Tiny-Qwen", tmp_path / "out"
    zoo.read(zoo.checkpoint("qwen3")).write(source)
    carried = {"tokenizer.json": "{}", "chat_template.jinja": "{{ x }}", "generation_config.json": "{}", "LICENSE": "y"}
    left = {"README.md": "old card", "pytorch_model.bin": "x", "modeling.py": "raise", ".hidden": "x", "a.gguf": "x"}
    for name, text in (carried | left).items():
        (source / name).write_text(text)
    (source / "folder").mkdir()
    warnings = quantize(source, out, PolarQuantConfig(bits=4, modules_to_not_convert=["lm_head"]), device=zoo.device)
    assert warnings == []
    assert {path.name for path in out.iterdir()} == {*carried, "config.json", "model.safetensors", "README.md"}
    assert all((out / name).read_text() == text for name, text in carried.items())
    config = json.loads((out / "config.json").read_text())
    stated = config.pop("quantization_config")
    assert stated == PolarQuantConfig(bits=4, modules_to_not_convert=["lm_head"]).to_dict()
    assert config == json.loads((source / "config.json").read_text())
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "# Tiny-Qwen\n" in card
    assert "\n4 bits a weight" in card
    assert "gates, lm_head." in card
    assert "AWQ" not in card


@pytest.mark.parametrize("awq", [False, True])
@pytest.mark.parametrize("max_shard_size", ["5GB", SMALL_SHARDS])
def test_planned_sizes_are_the_sizes_written(
    zoo: Any, architecture: str, awq: bool, max_shard_size: int | str, tmp_path: Path
) -> None:
    plan = plan_checkpoint(zoo.checkpoint(architecture), PolarQuantConfig(3), awq)
    scales = zoo.awq_scales(zoo.model(architecture)) if awq else None
    quantize_checkpoint(plan, tmp_path / "out", awq_scales=scales, max_shard_size=max_shard_size, device=zoo.device)
    written = 0
    for path in (tmp_path / "out").glob("*.safetensors"):
        written += path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")
    assert plan.output_bytes == written
    source = (zoo.checkpoint(architecture) / "model.safetensors").read_bytes()
    assert plan.source_bytes == len(source) - 8 - int.from_bytes(source[:8], "little")
    kept = plan.source_bytes - sum(plan.layer_bytes(name)[0] for name in plan.layers.bits)
    assert plan.output_bytes == kept + sum(plan.layer_bytes(name)[1] for name in plan.layers.bits)


def test_progress_counts_every_layer(zoo: Any, tmp_path: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    plan = plan_checkpoint(zoo.checkpoint("qwen3"), PolarQuantConfig(), awq=False)
    quantize_checkpoint(plan, tmp_path / "out", device=zoo.device, progress=lambda *step: steps.append(step))
    assert [(done, total) for done, total, _ in steps] == [(i + 1, 16) for i in range(16)]
    assert {what for _, _, what in steps} == set(plan.layers.bits)


class Alive:
    """Bytes of those tensors given to `watch` that are still referenced."""

    def __init__(self) -> None:
        self.references: list[tuple[weakref.ref, int]] = []

    def watch(self, tensor: torch.Tensor) -> torch.Tensor:
        self.references.append((weakref.ref(tensor), tensor.nbytes))
        return tensor

    def nbytes(self) -> int:
        return sum(size for reference, size in self.references if reference() is not None)


def test_one_source_tensor_and_one_shard_are_alive_at_a_time(
    zoo: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain, written = Alive(), Alive()
    sizes: list[tuple[int, int]] = []  # at each read: of what was read before, and of the shards saved before
    read, save = Checkpoint.read, writer.save_file

    def watched_read(self: Checkpoint, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        sizes.append((plain.nbytes(), written.nbytes()))
        return plain.watch(read(self, name, device))

    def watched_save(shard: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> None:
        save(shard, *args, **kwargs)
        for tensor in shard.values():
            written.watch(tensor)

    monkeypatch.setattr(Checkpoint, "read", watched_read)
    monkeypatch.setattr(writer, "save_file", watched_save)
    plan = plan_checkpoint(zoo.checkpoint("qwen3"), PolarQuantConfig(), awq=False)
    quantize_checkpoint(plan, tmp_path / "out", device=zoo.device, max_shard_size=SMALL_SHARDS)
    quantised = {f"{name}.weight" for name in plan.names.values()}
    kept = sum(info.nbytes for name, info in plan.source.tensors.items() if name not in quantised)
    assert len(sizes) == len(plan.source.tensors)
    assert max(before for before, _ in sizes) <= kept  # those are in the shard; the weights to quantise are gone
    assert [saved for _, saved in sizes] == [0] * len(sizes)
    assert len(written.references) == len(plan.layout)


def test_each_weight_is_read_once(zoo: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names: list[str] = []
    read = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name, *rest: names.append(name) or read(self, name, *rest))
    quantize(zoo.checkpoint("qwen3_5"), tmp_path / "out", device=zoo.device, max_shard_size=SMALL_SHARDS)
    assert sorted(names) == sorted(Checkpoint.open(zoo.checkpoint("qwen3_5")).tensors)


# What is refused, and what is left behind


def test_an_output_that_is_not_empty_is_refused_and_untouched(zoo: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(OutputError, match="exists and is not empty"):
        quantize(zoo.checkpoint("qwen3"), out)
    assert files(out) == {"precious": b"x"}
    assert list(tmp_path.iterdir()) == [out]


def test_an_output_that_is_a_file_is_refused_even_with_overwrite(zoo: Any, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(OutputError, match="exists and is not a folder"):
        quantize(zoo.checkpoint("qwen3"), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "x"


def test_an_empty_folder_is_filled(zoo: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    quantize(zoo.checkpoint("qwen3"), tmp_path / "out", device=zoo.device)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_missing_parents_are_made(zoo: Any, tmp_path: Path) -> None:
    quantize(zoo.checkpoint("qwen3"), tmp_path / "a" / "b", device=zoo.device)
    assert (tmp_path / "a" / "b" / "config.json").is_file()


def test_overwrite_replaces_the_folder_as_a_whole(zoo: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "stale.safetensors").write_text("x")
    quantize(zoo.checkpoint("qwen3"), out, overwrite=True, device=zoo.device)
    assert {path.name for path in out.iterdir()} >= {"model.safetensors", "config.json", "README.md"}
    assert not (out / "stale.safetensors").exists()
    assert list(tmp_path.iterdir()) == [out]


@pytest.fixture
def failing_after_three(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Makes the quantiser raise the given exception at its fourth weight."""

    def arm(error: BaseException) -> None:
        weights: Iterator[int] = iter(range(100))

        def failing(*args: Any, **kwargs: Any) -> Any:
            if next(weights) == 3:
                raise error
            return quantize_weight(*args, **kwargs)

        monkeypatch.setattr(quantize_module, "quantize_weight", failing)

    return arm


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt(), SystemExit(1)], ids=repr)
@pytest.mark.parametrize("existing", [False, True])
def test_an_exception_midway_leaves_things_as_they_were(
    zoo: Any,
    error: BaseException,
    existing: bool,
    failing_after_three: Callable[[BaseException], None],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    if existing:
        out.mkdir()
        (out / "old").write_text("x")
    failing_after_three(error)
    with pytest.raises(type(error)):
        quantize(zoo.checkpoint("qwen3"), out, overwrite=existing, max_shard_size=SMALL_SHARDS, device=zoo.device)
    assert list(tmp_path.iterdir()) == ([out] if existing else [])
    assert not existing or files(out) == {"old": b"x"}


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_a_full_disk_is_an_output_error_and_leaves_nothing(
    zoo: Any, error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """safetensors has an exception of its own for what the system refuses to write."""

    def full(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(writer, "save_file", full)
    with pytest.raises(OutputError, match=r"could not be written: .*No space left"):
        quantize(zoo.checkpoint("qwen3"), tmp_path / "out", device=zoo.device)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_parent(zoo: Any, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="cannot be written"):
            quantize(zoo.checkpoint("qwen3"), tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


def test_a_parent_that_is_a_file(zoo: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"):
        quantize(zoo.checkpoint("qwen3"), tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "x"


def test_a_weight_that_is_not_finite_names_file_and_tensor(zoo: Any, tmp_path: Path) -> None:
    content = zoo.read(zoo.checkpoint("qwen3"))
    content.tensors[f"{UP}.weight"][3, 7] = float("nan")
    content.write(tmp_path / "in")
    with pytest.raises(QuantizationError) as caught:
        quantize(tmp_path / "in", tmp_path / "out", device=zoo.device)
    assert str(caught.value).startswith(f"{tmp_path / 'in' / 'model.safetensors'}: {UP}.weight: ")
    assert "[3, 7] = nan" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_quantised_source_is_refused(zoo: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="quantised already"):
        plan_checkpoint(zoo.quantized("qwen3"), PolarQuantConfig(), awq=False)


def test_a_source_with_a_tensor_missing_is_refused(zoo: Any, tmp_path: Path) -> None:
    content = zoo.read(zoo.checkpoint("qwen3"))
    del content.tensors["model.norm.weight"], content.tensors[f"{UP}.weight"]
    content.write(tmp_path / "in")
    with pytest.raises(CheckpointError) as caught:
        plan_checkpoint(tmp_path / "in", PolarQuantConfig(), awq=False)
    assert sorted(caught.value.problems) == [f"{UP}.weight is missing", "model.norm.weight is missing"]


def test_a_pattern_that_matches_nothing_is_refused(zoo: Any) -> None:
    with pytest.raises(ConfigError, match="no_such"):
        plan_checkpoint(zoo.checkpoint("qwen3"), PolarQuantConfig(bits_per_layer={"no_such": 4}), awq=False)


# Calibration


def hooked_inputs(model: PreTrainedModel, windows: torch.Tensor, layer: str) -> torch.Tensor:
    """What `layer` reads over all windows, [W, T, K]."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for window in windows:
            model(window[None])
    handle.remove()
    return torch.cat(seen).float().cpu()


@pytest.fixture
def windows(device: torch.device) -> torch.Tensor:
    return torch.randint(0, 512, (3, 16), generator=torch.Generator().manual_seed(3)).to(device)


def test_statistics_are_those_of_a_hook(zoo: Any, architecture: str, windows: torch.Tensor) -> None:
    windows = windows.clamp_max(499)  # text without images
    model = zoo.model(architecture)
    sites = plan_model(model, PolarQuantConfig()).sites()
    sites = {site: names for site, names in sites.items() if kind_of(names[0]) is not Kind.EXPERTS}
    statistics = calibrate(model, windows, sites)
    assert statistics.keys() == sites.keys()
    for site, names in sites.items():
        for name in names:
            inputs = hooked_inputs(model, windows, name).flatten(0, -2)
            if site != "lm_head":  # of which calibration asks for one token's logits
                torch.testing.assert_close(statistics[site].mean_abs, inputs.abs().mean(0), rtol=1e-5, atol=1e-7)
                torch.testing.assert_close(statistics[site].sample, inputs, rtol=1e-4, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("rows", "places"), [(12, [0, 4, 8, 12]), (15, [0, 3, 6, 9, 12]), (33, [0, 1, 2, 4, 5, 7, 8, 10, 11, 13, 14])]
)
def test_sampled_rows_are_spread_over_each_window(
    zoo: Any, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch, rows: int, places: list[int]
) -> None:
    monkeypatch.setattr(sys.modules[calibrate.__module__], "SAMPLE_ROWS", rows)
    model = zoo.model("qwen3")
    sample = calibrate(model, windows, {"site": ["model.layers.1.mlp.down_proj"]})["site"].sample
    inputs = hooked_inputs(model, windows, "model.layers.1.mlp.down_proj")
    torch.testing.assert_close(sample, inputs[:, places].flatten(0, 1), rtol=1e-4, atol=1e-5)


def test_hooks_go_when_the_model_fails(zoo: Any, windows: torch.Tensor) -> None:
    model = zoo.model("qwen3")

    def fail(*_: Any) -> None:
        raise RuntimeError("midway")

    model.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="midway"):
        calibrate(model, windows, {"site": [UP]})
    assert not any(module._forward_pre_hooks for module in model.modules())


# The search of the scales


def site_statistics(channels: int, device: torch.device, outliers: bool) -> SiteStatistics:
    sample = torch.randn(256, channels)
    if outliers:
        sample *= torch.logspace(-1, 1.5, channels)[torch.randperm(channels)]
    return SiteStatistics(sample.abs().mean(0).to(device), sample.to(device))


def scaled_dequantized(weight: torch.Tensor, bits: int, scales: torch.Tensor | None) -> torch.Tensor:
    return dequantized(weight, bits, awq_scales=scales)


def scaled_absmax(weight: torch.Tensor, bits: int, scales: torch.Tensor | None) -> torch.Tensor:
    scales = torch.ones_like(weight[0]) if scales is None else scales.half().float()
    return absmax_round(weight * scales, bits) / scales


def site_error(
    statistics: SiteStatistics, weights: list[torch.Tensor], bits: list[int], scales: Any, fake_quantize: Any
) -> float:
    """Squared error of the layers' outputs relative to their size, summed over the layers."""
    total = 0.0
    for weight, b in zip(weights, bits, strict=True):
        output = statistics.sample @ weight.T
        change = statistics.sample @ fake_quantize(weight, b, scales).T - output
        total += float(change.square().sum() / output.square().sum())
    return total


def test_uniform_activations_need_no_scaling(device: torch.device) -> None:
    statistics = SiteStatistics(torch.ones(256, device=device), torch.randn(64, 256, device=device).sign())
    scales, exponent = search_awq_scales(statistics, [torch.randn(64, 256, device=device)], [3])
    assert exponent == 0
    assert torch.equal(scales.cpu(), torch.ones(256).half())


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("method", [scaled_dequantized, scaled_absmax])
def test_the_choice_is_the_best_of_all_exponents_on_its_sample(
    device: torch.device, outliers: bool, method: Any
) -> None:
    statistics = site_statistics(256, device, outliers)
    weights, bits = [torch.randn(48, 256, device=device), torch.randn(32, 256, device=device)], [3, 4]
    given = () if method is scaled_dequantized else (method,)  # the scheme's own is the default
    scales, exponent = search_awq_scales(statistics, weights, bits, *given)
    chosen = site_error(statistics, weights, bits, scales, method)
    candidates = []
    for step in range(21):
        logs = statistics.mean_abs.log() * (step / 20)
        candidates.append(site_error(statistics, weights, bits, (logs - logs.mean()).exp(), method))
    assert chosen == pytest.approx(min(candidates), rel=1e-4)
    assert exponent == EXPONENTS[candidates.index(min(candidates))]
    plain = site_error(statistics, weights, bits, None, method)
    assert chosen <= plain * (1 + 1e-6)
    assert not outliers or chosen < 0.7 * plain


def test_scales_are_fp16_with_geometric_mean_one_even_for_dead_channels(device: torch.device) -> None:
    statistics = site_statistics(256, device, outliers=True)
    statistics.mean_abs[7], statistics.sample[:, 7] = 0, 0
    scales, _ = search_awq_scales(statistics, [torch.randn(32, 256, device=device)], [3])
    assert scales.dtype == torch.float16
    assert (scales > 0).all()
    assert scales.double().log().mean().abs() < 1e-3


def test_every_layer_of_a_site_gets_its_vector(tmp_path: Path, device: torch.device) -> None:
    plan = plan_checkpoint(demo.MODEL, PolarQuantConfig(3), awq=True)
    steps: list[tuple[int, int, str]] = []
    found = calibrate_plan(plan, demo.CALIBRATION_TEXT, device, 1, progress=lambda *step: steps.append(step))
    scales = found.awq_scales
    assert not found.moments
    sites = plan.layers.sites()
    assert set(scales) == {name for names in sites.values() for name in names}
    assert set(scales) == {name for name in plan.layers.bits if not name.endswith("embed_tokens")}
    for names in sites.values():
        assert all(torch.equal(scales[name], scales[names[0]]) for name in names)
    assert len({tuple(scales[names[0]].tolist()) for names in sites.values()}) > len(sites) / 2
    count = 4 + len(sites)  # the window through each layer, and the sites
    assert [done for done, _, _ in steps] == list(range(1, count + 1))
    assert {total for _, total, _ in steps} == {count}


def test_a_calibration_text_shorter_than_a_window_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short a text")
    plan = plan_checkpoint(demo.MODEL, PolarQuantConfig(), awq=True)
    with pytest.raises(CheckpointError, match=r"fewer than one window of 512"):
        calibrate_plan(plan, tmp_path / "short.txt", "cpu", 4)


# The absmax baseline


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("columns", [256, 192])
def test_absmax_levels(bits: int, columns: int) -> None:
    weight = torch.randn(16, columns)
    weight[0, :BLOCK_SIZE] = 0
    rounded = absmax_round(weight, bits)
    top = 2 ** (bits - 1) - 1
    for start in range(0, columns, BLOCK_SIZE):
        block, result = weight[:, start : start + BLOCK_SIZE], rounded[:, start : start + BLOCK_SIZE]
        peak = block.abs().amax(1, keepdim=True)
        steps = result / peak.clamp_min(1e-30) * top
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
        assert steps.abs().max() <= top + 1e-4
        assert ((result - block).abs() <= peak / top / 2 * (1 + 1e-5)).all()
    assert not rounded[0, :BLOCK_SIZE].any()


def test_write_absmax_rounds_the_planned_layers_only(zoo: Any, tmp_path: Path) -> None:
    source = zoo.checkpoint("qwen3_5")
    plan = plan_checkpoint(source, PolarQuantConfig(3, {"*.mlp.*": 4}, ["embed_tokens"]), awq=False)
    write_absmax(plan, tmp_path / "out", device=zoo.device, max_shard_size=SMALL_SHARDS)
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    assert before.tensors.keys() == after.tensors.keys()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    bits = {f"{plan.names[name]}.weight": b for name, b in plan.layers.bits.items()}
    for name in before.tensors:
        weight = before.read(name)
        expected = absmax_round(weight.to(zoo.device), bits[name]).cpu() if name in bits else weight
        assert torch.equal(after.read(name), expected)
        assert torch.equal(expected, weight) == (name not in bits)
    assert set(bits.values()) == {3, 4}
    load_model(tmp_path / "out", device=zoo.device)


def test_write_absmax_refuses_a_full_folder(zoo: Any, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    plan = plan_checkpoint(zoo.checkpoint("qwen3"), PolarQuantConfig(), awq=False)
    with pytest.raises(OutputError):
        write_absmax(plan, tmp_path)
    assert files(tmp_path) == {"x": b"x"}


# The trained model that ships with the package


@pytest.fixture(scope="module")
def demo_weights(device: torch.device) -> dict[str, torch.Tensor]:
    """fp32 weights of all linear layers, the head among them, that are quantised."""
    checkpoint = Checkpoint.open(demo.MODEL)
    names = [name.removesuffix(".weight") for name in checkpoint.tensors]
    linear = [name for name in names if (role := role_of(name)) and role.kind is not Kind.EMBEDDING]
    return {name: checkpoint.read(f"{name}.weight", device).float() for name in linear}


def demo_error(weights: dict[str, torch.Tensor], **options: Any) -> float:
    """Relative squared error over all weights together."""
    errors = [(dequantized(weight, 5, **options) - weight).double().square().sum() for weight in weights.values()]
    return float(sum(errors) / sum(weight.double().square().sum() for weight in weights.values()))


def test_weight_error_of_the_demo_model(demo_weights: dict[str, torch.Tensor]) -> None:
    assert len(demo_weights) == 3 * 3 + 4 + 4 * 3 + 1
    assert demo_error(demo_weights) <= 0.00246
    assert 0.00245 < demo_error(demo_weights, least_squares=False) < 0.00252
    published = demo_error(demo_weights, least_squares=False, centroids=published_levels(5))
    assert 0.00286 < published < 0.00296


@cache
def demo_tokens() -> torch.Tensor:
    return tokenize_file(AutoTokenizer.from_pretrained(demo.MODEL), demo.EVALUATION_TEXT)


def perplexity(folder: Path, device: torch.device) -> float:
    model = load_model(folder, device=device, dtype=torch.float32)
    return evaluate(model, demo_tokens(), limit=demo.EVALUATION_WINDOWS).perplexity


@pytest.fixture(scope="module")
def plain_perplexity(device: torch.device) -> float:
    return perplexity(demo.MODEL, device)


def quantized_demo(config: PolarQuantConfig, out: Path, device: torch.device) -> Path:
    plan = plan_checkpoint(demo.MODEL, config, awq=True)
    found = calibrate_plan(plan, demo.CALIBRATION_TEXT, device, demo.CALIBRATION_WINDOWS)
    quantize_checkpoint(plan, out, awq_scales=found.awq_scales, device=device)
    return out


def test_perplexity_of_the_plain_demo_model(plain_perplexity: float) -> None:
    assert plain_perplexity == pytest.approx(48.60, abs=0.05)


@pytest.mark.figures
def test_five_bits_cost_almost_nothing(plain_perplexity: float, device: torch.device, tmp_path: Path) -> None:
    found = perplexity(quantized_demo(PolarQuantConfig(), tmp_path / "q5", device), device)
    assert plain_perplexity - 0.1 < found < plain_perplexity + 0.6


@pytest.mark.figures
def test_three_bits_beat_absmax_by_far(plain_perplexity: float, device: torch.device, tmp_path: Path) -> None:
    config = PolarQuantConfig(3, modules_to_not_convert=["embed_tokens"])
    ours = perplexity(quantized_demo(config, tmp_path / "q3", device), device)
    write_absmax(plan_checkpoint(demo.MODEL, config, awq=False), tmp_path / "absmax", device=device)
    assert plain_perplexity < ours < 54.5
    assert 71 < perplexity(tmp_path / "absmax", device) < 72.5


@pytest.mark.slow
def test_three_layers_of_the_shape_of_9b(device: torch.device, tmp_path: Path) -> None:
    """Random weights of Qwen3.5-9B's layers, with a small vocabulary, through the whole of `polar quantize`."""
    from polar_bench.random_model import model_config, random_model

    config = model_config("qwen3.5-9b")
    config.num_hidden_layers, config.vocab_size = 3, 4096
    config.layer_types = config.layer_types[1:4]  # two of GatedDeltaNet and one of attention
    random_model(config, None, device).save_pretrained(tmp_path / "source")
    plan = plan_checkpoint(tmp_path / "source", PolarQuantConfig(), awq=False)
    (warning,) = quantize_checkpoint(plan, tmp_path / "out", device=device)
    assert "no tokenizer" in warning
    errors = verify_checkpoint(tmp_path / "out", tmp_path / "source", device).layer_errors
    assert len(errors) == len(plan.layers.bits) == 2 + 2 * 6 + 7
    assert max(errors.values()) < 0.0027
