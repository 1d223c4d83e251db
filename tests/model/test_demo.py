"""`polar demo`: the whole path on the model that comes with the package."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import model_patch
from model_patch.cli.app import app
from model_patch.demo import CALIBRATION_TEXT, EVALUATION_TEXT, MODEL
from model_patch.errors import ConfigError, OutputError


def _polar(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo of this module keeps its checkpoint."""
    return tmp_path_factory.mktemp("demo") / "kept"


@pytest.fixture(scope="module")
def report(kept: Path) -> dict[str, Any]:
    """What the demo says at its defaults, and the time it took the processor."""
    started = time.process_time()
    result = _polar("demo", "--json", "--out", kept)
    assert result.exit_code == 0, result.exception
    return json.loads(result.stdout) | {"processor_seconds": time.process_time() - started}


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo on very little text."""
    monkeypatch.setattr("model_patch.cli.demo.CALIBRATION_WINDOWS", 2)
    monkeypatch.setattr("model_patch.cli.demo.EVALUATION_WINDOWS", 2)


def test_it_takes_less_than_a_minute(report: dict[str, Any]) -> None:
    """On one core, whatever else runs on it."""
    assert report["seconds"] > 0
    assert report["processor_seconds"] < 60


def test_the_quantised_model_is_a_third_of_the_size_and_close(report: dict[str, Any], kept: Path) -> None:
    plain, packed = report["scores"]["bf16"], report["scores"]["5 bits"]
    assert report["bytes"]["5 bits"] < 0.34 * report["bytes"]["bf16"]
    assert report["bytes"]["5 bits"] < (kept / "model.safetensors").stat().st_size < 1.02 * report["bytes"]["5 bits"]
    assert 0 < packed["kl_divergence"] < 0.03
    assert packed["top1_agreement"] > 0.85
    assert plain["kl_divergence"] is None
    assert plain["windows"] == packed["windows"] == 24
    assert abs(packed["perplexity"] / plain["perplexity"] - 1) < 0.03


def test_it_generates(report: dict[str, Any]) -> None:
    assert report["text"].startswith("The kernel is")
    assert len(report["text"].split()) > 10


def test_what_it_keeps_is_sound(report: dict[str, Any], kept: Path) -> None:
    result = _polar("verify", kept, "--against", MODEL, "--json")
    assert result.exit_code == 0, result.exception
    assert len(json.loads(result.stdout)["layers"]) > 20
    assert json.loads((kept / "config.json").read_text())["quantization_config"]["awq"] is True


@pytest.mark.usefixtures("hasty")
def test_in_text() -> None:
    result = _polar("demo", "--bits", 4)
    assert result.exit_code == 0, result.exception
    for expected in ("bf16", "4 bits", "perplexity", "KL to bf16", "11.04 MB", "The kernel is", " s on "):
        assert expected in result.stdout
    assert "checkpoint is in" not in result.stdout


def test_an_existing_folder_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    monkeypatch.setattr("model_patch.cli.demo.plan_checkpoint", None)
    result = _polar("demo", "--out", tmp_path / "out")
    assert isinstance(result.exception, OutputError)
    assert (tmp_path / "out" / "precious").read_text() == "x"


@pytest.mark.parametrize("options", [["--bits", "9"], ["--device", "cuda:99"]])
def test_bad_options_are_refused(options: list[str]) -> None:
    result = _polar("demo", *options)
    assert isinstance(result.exception, ConfigError)
    assert result.exit_code == 1
    assert result.stdout == ""


def test_what_it_needs_is_in_the_package() -> None:
    for path in (MODEL / "model.safetensors", MODEL / "tokenizer.json", CALIBRATION_TEXT, EVALUATION_TEXT):
        assert path.is_file()
        assert path.is_relative_to(Path(model_patch.__path__[0]))
