"""`polar ablate`: its baselines are what their names say, its variants of the format what `polar quantize` writes."""

import json
import math
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from polar_bench import ablate, kernels, models, peers, quality, report
from polar_bench.ablate import Calibration
from polar_bench.variants import BASELINE, FULL, VARIANTS, Variant
from typer.testing import CliRunner

from model_patch import ConfigError, OutputError, PolarQuantConfig, load_model, logits_cache
from model_patch.checkpoint.reader import Checkpoint
from model_patch.cli import ablate as command
from model_patch.cli.app import app
from model_patch.demo import CALIBRATION_TEXT, EVALUATION_TEXT, MODEL
from model_patch.evaluate import evaluate, model_reference
from model_patch.quantize import calibrate_plan, plan_checkpoint, quantize_checkpoint, write_absmax
from model_patch.quantize.calibrated import calibration_batch
from polar_kernels import BLOCK_SIZE, PolarError, lloyd_max_levels, published_levels, quantize_weight, reference
from polar_kernels.hadamard import transform_blocks

ROOT = Path(__file__).parents[2]


def variant(name: str) -> Variant:
    (found,) = (v for v in VARIANTS if v.name == name)
    return found


def unscaled(name: str, weight: torch.Tensor, bits: int) -> torch.Tensor:
    return variant(name).quantize(weight, bits, None, None)


# The baselines


@pytest.fixture
def weight() -> torch.Tensor:
    weight = torch.randn(32, 2 * BLOCK_SIZE, generator=torch.Generator().manual_seed(0))
    weight[:, 3] *= 8  # an outlier, which the rotation spreads
    weight[0, :BLOCK_SIZE] = 0
    return weight


def test_uniform_levels_after_rotation(weight: torch.Tensor) -> None:
    found = unscaled("Hadamard, uniform levels", weight, 4)
    rotated, result = (transform_blocks(w).view(32, 2, BLOCK_SIZE) for w in (weight, found))
    step = rotated.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 7
    torch.testing.assert_close(result / step, (rotated / step).round(), rtol=0, atol=1e-3)
    assert not found[0, :BLOCK_SIZE].any()


def test_lloyd_max_levels_without_rotation(weight: torch.Tensor) -> None:
    found = unscaled("Lloyd-Max, no rotation", weight, 3).view(32, 2, BLOCK_SIZE)
    blocks = weight.view(32, 2, BLOCK_SIZE)
    deviation = blocks.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
    distance = (blocks / deviation)[..., None] - lloyd_max_levels(3)
    torch.testing.assert_close(found / deviation, lloyd_max_levels(3)[distance.abs().argmin(-1)] * (deviation > 1e-20))
    assert not found[0, 0].any()


def test_columns_that_are_no_whole_block(weight: torch.Tensor) -> None:
    for v in VARIANTS:
        found = v.quantize(weight[:, :200], 5, torch.ones(200), None)
        assert found.shape == (32, 200)
        assert (found - weight[:, :200]).norm() < 0.3 * weight[:, :200].norm()


def test_scales_multiply_before_rounding_and_divide_after(weight: torch.Tensor) -> None:
    scales = torch.linspace(0.5, 2, weight.shape[1]).half()
    for v in VARIANTS:
        expected = v.quantize(weight * scales.float(), 4, None, None) / scales.float()
        torch.testing.assert_close(v.quantize(weight, 4, scales, None), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("levels", "name"), [(lloyd_max_levels, ""), (published_levels, " (published table)")])
def test_tables_and_norms(weight: torch.Tensor, levels: Any, name: str) -> None:
    made = quantize_weight(weight, 5, centroids=levels(5), least_squares=False)
    parts = (made.packed, made.norms, None, levels(5))
    expected = reference.dequantize(*parts, weight.shape[1], torch.float32)
    torch.testing.assert_close(unscaled(f"Hadamard + Lloyd-Max{name}", weight, 5), expected)


def test_each_part_lowers_the_error_of_the_weight() -> None:
    """On weights whose rows have outliers, as trained ones have."""
    weight = torch.distributions.StudentT(4.0).sample((256, 512))
    names = ("absmax", "Hadamard + Lloyd-Max (published table)", "Hadamard + Lloyd-Max", "+ least-squares scale")
    errors = [float((unscaled(name, weight, 5) - weight).square().sum()) for name in names]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


# The variants of the format


@pytest.fixture(scope="module")
def calibrated(tiny: Path) -> tuple[Any, Calibration]:
    """The tiny model in fp32 and what it is calibrated with."""
    model = load_model(tiny, device="cpu", dtype=torch.float32)
    sites = ablate.plans(tiny, [3])[3].layers.sites()
    return model, ablate.calibrate_sites(model, calibration_batch(tiny, CALIBRATION_TEXT, 2), sites)


@pytest.mark.parametrize(
    ("name", "awq", "feedback"),
    [
        ("+ least-squares scale", False, False),
        ("+ least-squares scale + AWQ", True, False),
        ("+ least-squares scale + error feedback", False, True),
        ("+ least-squares scale + AWQ + error feedback", True, True),
    ],
)
def test_weights_are_those_of_polar_quantize(
    tiny: Path, calibrated: Any, name: str, awq: bool, feedback: bool, tmp_path: Path
) -> None:
    plan = plan_checkpoint(tiny, PolarQuantConfig(3, modules_to_not_convert=["embed_tokens"]), awq)
    found = calibrate_plan(plan, CALIBRATION_TEXT, "cpu", 2, feedback=feedback)
    quantize_checkpoint(plan, tmp_path / "out", awq_scales=found.awq_scales, moments=found.moments)
    model, calibration = calibrated
    weights = dict(ablate.quantized_weights(model, variant(name), plan.layers, calibration))
    loaded = load_model(tmp_path / "out", device="cpu", dtype=torch.float32)
    assert weights.keys() == plan.layers.bits.keys()
    for layer, dense in weights.items():
        assert torch.equal(dense, loaded.get_submodule(layer).dequantize(torch.float32)), layer
    size = ablate.bits_per_weight(ablate.plans(tiny, [3])[3], awq)
    count = sum(model.get_submodule(layer).weight.numel() for layer in weights)
    assert size == pytest.approx(8 * sum(plan.layer_bytes(layer)[1] for layer in weights) / count)


def test_the_baseline_is_what_polar_quantize_writes(tiny: Path, calibrated: Any, tmp_path: Path) -> None:
    plan = plan_checkpoint(tiny, PolarQuantConfig(3, modules_to_not_convert=["embed_tokens"]), awq=False)
    write_absmax(plan, tmp_path / "out")
    model, calibration = calibrated
    written = Checkpoint.open(tmp_path / "out")
    for layer, dense in ablate.quantized_weights(model, variant("absmax"), plan.layers, calibration):
        torch.testing.assert_close(dense.bfloat16(), written.read(f"{plan.names[layer]}.weight"))


def test_rows_of_a_run(calibrated: Any, tiny: Path) -> None:
    model, calibration = calibrated
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens = torch.randint(0, 4096, (130,), generator=torch.Generator().manual_seed(0))
    told: list[tuple[int, int]] = []
    rows = ablate.run(
        model,
        calibration,
        tokens,
        model_reference(model, tokens),
        ablate.steps_of(ablate.plans(tiny, [5, 3]), [5, 3], {}, [variant("absmax"), variant(FULL)]),
        window=32,
        progress=lambda done, total, _: told.append((done, total)),
    )
    assert [(row.variant, row.bits) for row in rows] == [
        ("bf16", 0),
        ("absmax", 5),
        ("+ least-squares scale + error feedback", 5),
        ("absmax", 3),
        ("+ least-squares scale + error feedback", 3),
    ]
    assert told == [(i + 1, 5 * 4) for i in range(5 * 4)]
    assert [row.bits_per_weight for row in rows] == [16, 5.125, 5.125, 3.125, 3.125]
    original, wide, _, narrow, fed = (row.evaluation for row in rows)
    assert original == evaluate(model, tokens, window=32, reference=model)
    assert original.kl_divergence == 0
    assert 0 < wide.kl_divergence < fed.kl_divergence < narrow.kl_divergence
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["absmax + AWQ", "+ least-squares scale + AWQ", FULL])
def test_experts_are_those_of_polar_quantize(zoo: Any, name: str, tmp_path: Path, monkeypatch: Any) -> None:
    source, batch = zoo.checkpoint("qwen3_moe"), torch.randint(0, 500, (4, 32))
    monkeypatch.setattr("model_patch.quantize.calibrated.calibration_batch", lambda *_: batch)
    wanted = variant(name)
    plan = plan_checkpoint(source, PolarQuantConfig(3, modules_to_not_convert=["embed_tokens"]), wanted.awq)
    model = load_model(source, device="cpu", dtype=torch.float32)
    calibration = ablate.calibrate_sites(model, batch, plan.layers.sites())
    weights = dict(ablate.quantized_weights(model, wanted, plan.layers, calibration))
    experts = "model.layers.1.mlp.experts.down_proj"
    assert weights.keys() == plan.layers.bits.keys()
    assert weights[experts].shape == model.get_parameter(experts).shape
    if name.startswith("absmax"):  # which has no place in the format
        assert 0 < (weights[experts] - model.get_parameter(experts)).norm() < 0.5 * model.get_parameter(experts).norm()
        return
    found = calibrate_plan(plan, CALIBRATION_TEXT, "cpu", 2, feedback=wanted.feedback)
    quantize_checkpoint(plan, tmp_path / "out", awq_scales=found.awq_scales, moments=found.moments)
    loaded = load_model(tmp_path / "out", device="cpu", dtype=torch.float32)
    for layer, dense in weights.items():
        assert torch.equal(dense, loaded.get_submodule(layer).dequantize(torch.float32)), layer


def test_a_variant_that_is_none(tiny: Path) -> None:
    message = refused(("ablate", tiny, "--calibration", "c", "--text", "t", "--variant", "best"), ConfigError)
    assert message.startswith("--variant 'best': must be one of 'absmax', ")


@pytest.mark.parametrize("free", [10**12, 0])
def test_where_predictions_are_kept(calibrated: Any, monkeypatch: Any, tmp_path: Path, free: int) -> None:
    model, _ = calibrated
    monkeypatch.setattr(ablate, "free_memory", lambda device: free)
    tokens = torch.randint(0, 4096, (130,), generator=torch.Generator().manual_seed(0))
    kept = ablate.keep_predictions(model, tokens, 32, 3, tmp_path)
    for index, ids in enumerate(tokens.split(32)[:3]):
        expected = model_reference(model, tokens)(index, ids, 31)
        torch.testing.assert_close(kept(index, ids, 31), expected, rtol=0, atol=1e-3)
    assert len(list(tmp_path.iterdir())) == (0 if free else 3)


def test_the_original_is_named_by_its_dtype(tiny: Path, calibrated: Any, tmp_path: Path) -> None:
    model, calibration = calibrated
    load_model(tiny, device="cpu", dtype=torch.float32).save_pretrained(tmp_path / "wide")
    tokens = torch.randint(0, 4096, (32,), generator=torch.Generator().manual_seed(0))
    expect = model_reference(model, tokens)
    steps = ablate.steps_of(ablate.plans(tmp_path / "wide", [3]), [3], {}, [variant(BASELINE)])
    first, row = ablate.run(model, calibration, tokens, expect, steps, window=32)
    assert (first.variant, first.bits, first.bits_per_weight) == ("fp32", 0, 32)
    result = quality.assemble([first, row], torch.device("cpu"), model="wide", text="text")
    assert quality.table(result, 3)[0][:2] == ["fp32", "32.000"]
    assert quality.chart(result).axes[0].get_xlabel() == "mean KL divergence to fp32, over the baseline's"


def test_an_original_of_several_dtypes(tiny: Path) -> None:
    """Bits are the mean over the weights."""
    plan = ablate.plans(tiny, [3])[3]
    counts = {name: math.prod(plan.source.tensors[f"{plan.names[name]}.weight"].shape) for name in plan.layers.bits}
    wide = next(name for name in plan.layers.bits if name.endswith("down_proj"))
    plan.source.tensors[f"{plan.names[wide]}.weight"] = replace(
        plan.source.tensors[f"{plan.names[wide]}.weight"], dtype=torch.float32
    )
    mean = 16 + 16 * counts[wide] / sum(counts.values())
    assert ablate.original_weights(plan) == ("bf16, fp32", pytest.approx(mean))


# The command and its files


def run(*args: object) -> Any:
    texts = ("--calibration", CALIBRATION_TEXT, "--text", EVALUATION_TEXT, "--windows", 1, "--device", "cpu")
    return CliRunner().invoke(app, [str(arg) for arg in ("ablate", *args, *texts)])


def test_command(tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It takes no fingerprint, for which all of the model is read: what it keeps is for itself."""
    monkeypatch.setattr(logits_cache, "checkpoint_fingerprint", Mock(side_effect=AssertionError))
    out, doc = tmp_path / "results", tmp_path / "docs" / "quality.md"
    doc.parent.mkdir()
    sizes = ("--bits", 3, "--target-bits", 4.5, "--window", 64, "--limit", 2)
    result = run(tiny, *sizes, "--out", out, "--document", doc, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert json.loads((out / "quality-tiny-2-windows.json").read_text()) == printed
    assert [row["variant"] for row in printed["rows"]] == ["bf16", *(v.name for v in VARIANTS), *2 * [FULL]]
    assert [row["bits"] for row in printed["rows"]] == [0, *(3 for _ in VARIANTS), 4, 4.5]
    assert [row["bits_per_weight"] for row in printed["rows"][-2:]] == [4.125, pytest.approx(4.62, abs=0.01)]
    assert {(row["windows"], row["window"], row["tokens"]) for row in printed["rows"]} == {(2, 64, 2 * 63)}
    assert all(math.isfinite(row["kl_divergence"]) for row in printed["rows"])
    assert (out / "quality-tiny-2-windows.png").stat().st_size > 1000
    text = doc.read_text()
    assert "(../results/quality-tiny-2-windows.png)" in text
    assert "Evaluated on 2 windows of 64 tokens of wikitext2.test.excerpt.txt, stride 64, 126 tokens scored" in text
    assert "calibrated on 1 windows of 512 tokens of wikitext2.valid.excerpt.txt" in text
    assert "### 3 bits" in text
    assert "### 4.5 bits on average, each layer's own" in text
    below, mixed = (row["kl_divergence"] for row in printed["rows"][-2:])
    assert f"| {mixed / below:.2f} |" in text.rpartition("| 4.5 on average |")[2]
    assert text.count("| absmax |") == 1
    assert str(tmp_path) not in text
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    for path in (tiny, CALIBRATION_TEXT, EVALUATION_TEXT):
        Path(path.name).symlink_to(path)
    (stated,) = (line for line in text.splitlines() if line.startswith("    polar ablate "))
    again = CliRunner().invoke(app, [*shlex.split(stated)[1:], "--json"])
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["rows"] == printed["rows"]
    rows = {row[0]: row for row in quality.table(printed, 3)}
    assert rows[BASELINE][4] == "1.00"
    by_name = {row["variant"]: row["kl_divergence"] for row in printed["rows"] if row["bits"] == 3}
    assert rows["absmax"][4] == f"{by_name['absmax'] / by_name[BASELINE]:.2f}"


@pytest.mark.parametrize("args", [("bench",), ("bench", "model")])
@pytest.mark.parametrize("as_json", [False, True])
def test_the_benchmarks_print_before_they_write(
    args: tuple[str, ...], as_json: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(report, "describe", lambda *_: {"gpu": "Some GPU"})
    monkeypatch.setattr(kernels, "run", lambda *_, **__: ([], (1e12, 1e12)))
    monkeypatch.setattr(models, "providers", Mock())
    monkeypatch.setattr(models, "run", lambda *_, **__: ([], []))
    for name in ("write", "write_json"):
        monkeypatch.setattr(report, name, Mock(side_effect=OSError(28, "No space left on device")))
    device = ("--device", "cpu") if "model" in args else ()
    shown = ("--json",) if as_json else ()
    result = CliRunner().invoke(app, [*args, *device, *shown, "--out", str(tmp_path)])
    assert type(result.exception) is OutputError, result.exception
    assert "Some GPU" in result.stdout


@pytest.mark.parametrize(
    ("options", "measured"),
    [((), ["Humming"]), (("--quick",), []), (("--quick", "--peers"), ["Humming"]), (("--no-peers",), [])],
)
def test_bench_measures_the_peers_that_are_installed(
    options: tuple[str, ...], measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(report, "describe", lambda *_: {"gpu": "Some GPU"})
    monkeypatch.setattr(peers, "package_version", {"humming-kernels": "0.1.19"}.get)
    run_kernels = Mock(return_value=([], (1e12, 1e12)))
    monkeypatch.setattr(kernels, "run", run_kernels)
    result = CliRunner().invoke(app, ["bench", *options])
    assert result.exit_code == 0, result.output
    assert [peer.name for peer in run_kernels.call_args.args[-1]] == measured
    assert ("not compared with gemlite: not installed" in result.stderr) == bool(measured)


def test_a_model_of_the_hub_is_named_as_there(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_checkpoint", {"Someone/Some-1B": tiny}.__getitem__)
    only = ("--bits", 3, "--variant", BASELINE)
    result = run("Someone/Some-1B", *only, "--window", 64, "--limit", 1, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("*.json")
    assert path.name == "quality-Some-1B-1-windows.json"
    assert quality.command(json.loads(path.read_text())).startswith("polar ablate Someone/Some-1B --calibration ")


def test_cpu_is_what_it_ran_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "describe", lambda: {"gpu": "Some GPU"})
    assert quality.assemble([], torch.device("cpu"))["gpu"] == "CPU"
    assert quality.assemble([], torch.device("cuda"))["gpu"] == "Some GPU"


LONG = (("ablate", MODEL, "--calibration", CALIBRATION_TEXT, "--text", EVALUATION_TEXT), ("bench",), ("bench", "model"))


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever takes long in these commands fails."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module, name in ((ablate, "calibrate_sites"), (ablate, "plans"), (kernels, "run"), (models, "run")):
        monkeypatch.setattr(module, name, Mock(side_effect=AssertionError("measured")))


def refused(args: tuple[object, ...], error: type[PolarError]) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert type(result.exception) is error, result.exception
    return str(result.exception)


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("args", LONG)
def test_results_that_cannot_be_written_are_refused_first(args: tuple[object, ...], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = ("--out", tmp_path / "out")
    assert "name it with --out" in refused((*args, "--document", tmp_path / "results.md"), ConfigError)
    for folder in ("file", "file/results"):
        message = refused((*args, "--out", tmp_path / folder), OutputError)
        assert (
            message == f"--out {tmp_path / folder}: cannot be written: {tmp_path / 'file'} is no folder that this "
            "user may write to"
        )
    for document in ("", "missing/results.md", "file/results.md"):
        message = refused((*args, *out, "--document", tmp_path / document), OutputError)
        assert message == f"--document {tmp_path / document}: must be a file in a folder that is there"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("args", LONG)
def test_a_folder_of_someone_else(args: tuple[object, ...], monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    assert "--out" in refused((*args, "--out", tmp_path / "out"), OutputError)


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("args", LONG[:2])
def test_charts_need_matplotlib(args: tuple[object, ...], monkeypatch: Any, tmp_path: Path) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    message = refused((*args, "--out", tmp_path / "out"), ConfigError)
    assert "matplotlib is missing: pip install 'polar-kernels[bench]'" in message


def test_the_table_comes_before_the_files(tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(quality, "write", Mock(side_effect=OSError(28, "No space left on device")))
    only = ("--bits", 3, "--variant", BASELINE)
    result = run(tiny, *only, "--window", 64, "--limit", 1, "--out", tmp_path / "out")
    assert type(result.exception) is OutputError
    assert "the results could not be written: [Errno 28] No space left" in str(result.exception)
    assert "tiny at 3 bits, 1 windows of" in result.stdout


def test_the_document_is_made_from_the_results(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "bench").symlink_to(ROOT / "bench")
    results = sorted((tmp_path / "bench" / "results").glob("quality-*.json"))
    assert results
    quality.document(results, tmp_path / "docs" / "quality.md")
    assert (tmp_path / "docs" / "quality.md").read_text() == (ROOT / "docs" / "quality.md").read_text()
