"""`polar quantize --resume`: interrupted anywhere, it ends with the bytes of a run that was not, and does less."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from typer.testing import CliRunner

from model_patch import CheckpointError, ConfigError, OutputError
from model_patch.checkpoint import package, writer
from model_patch.checkpoint.reader import Checkpoint
from model_patch.cli import quantize as command
from model_patch.cli.app import app
from model_patch.progress import Progress
from model_patch.quantize import checkpoint as quantize_module
from model_patch.quantize import resume, sensitivity

LAYERS = 9  # of the tiny model
PLAIN = ("--no-awq", "--max-shard-size", "200KB")
Run = Callable[..., Any]


def run(source: Path, out: Path, *args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in ("quantize", source, out, "--device", "cpu", *args)])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def at_call(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose call `number`, from 0 on, is interrupted."""
    count = iter(range(1000))

    def called(*args: Any, **kwargs: Any) -> Any:
        if next(count) == number:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return called


def half_saved(number: int) -> Callable[..., None]:
    """save_file, which at shard `number` is interrupted after half of it is on the disk."""
    save, count = writer.save_file, iter(range(1000))

    def called(shard: dict[str, torch.Tensor], file: Path, **kwargs: Any) -> None:
        save(shard, file, **kwargs)
        if next(count) == number:
            os.truncate(file, file.stat().st_size // 2)
            raise KeyboardInterrupt

    return called


INTERRUPTIONS = {
    "first weight": (quantize_module, "quantize_weight", partial(at_call, 0, quantize_module.quantize_weight)),
    "fifth weight": (quantize_module, "quantize_weight", partial(at_call, 4, quantize_module.quantize_weight)),
    "last weight": (quantize_module, "quantize_weight", partial(at_call, LAYERS - 1, quantize_module.quantize_weight)),
    "middle of a shard": (writer, "save_file", partial(half_saved, 1)),
    "name of a shard": (writer.os, "replace", partial(at_call, 3, os.replace)),
    "index": (writer, "write_json", partial(at_call, 0, writer.write_json)),
    "other files": (package, "carry_over", partial(at_call, 0, package.carry_over)),
    "the end": (writer, "_replace", partial(at_call, 0, writer._replace)),
}


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that was not interrupted."""
    out = tmp_path_factory.mktemp("resume") / "out"
    assert run(tiny, out, *PLAIN).exit_code == 0
    return files(out)


@pytest.fixture
def interrupted(tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """A run with --resume into tmp_path/out that is interrupted before its third shard is saved."""

    def interrupted(*args: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(writer, "save_file", at_call(2, writer.save_file))
            assert run(tiny, tmp_path / "out", *args, "--resume").exit_code == 1
        assert [path.name for path in tmp_path.iterdir()] == [".out.resume"]

    return interrupted


@pytest.mark.parametrize("where", INTERRUPTIONS)
def test_the_bytes_are_those_of_an_uninterrupted_run(
    tiny: Path, whole: dict[str, bytes], where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    place, name, make = INTERRUPTIONS[where]
    with monkeypatch.context() as patch:
        patch.setattr(place, name, make())
        result = run(tiny, out, *PLAIN, "--resume")
    assert result.exit_code == 1
    assert "interrupted" in str(result.exception)
    assert not out.exists()
    result = run(tiny, out, *PLAIN, "--resume")
    assert result.exit_code == 0, result.output
    assert files(out) == whole
    assert list(tmp_path.iterdir()) == [out]


def test_a_run_that_is_not_interrupted(tiny: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    assert run(tiny, tmp_path / "out", *PLAIN, "--resume").exit_code == 0
    assert files(tmp_path / "out") == whole
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_finished_shards_are_not_made_again(
    tiny: Path, interrupted: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    args = ("--no-awq", "--max-shard-size", "350KB")  # the first two hold the head and the embedding as a whole
    interrupted(*args)
    work = tmp_path / ".out.resume" / "checkpoint"
    stamps = {path.name: path.stat().st_mtime_ns for path in work.iterdir()}
    assert len(stamps) == 2
    made: list[int] = []
    quantize_weight = quantize_module.quantize_weight
    monkeypatch.setattr(quantize_module, "quantize_weight", lambda *a, **k: made.append(1) or quantize_weight(*a, **k))
    assert run(tiny, tmp_path / "out", *args, "--resume").exit_code == 0
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in stamps} == stamps
    assert len(made) == LAYERS - 2


@pytest.mark.parametrize("options", [("--feedback",), ("--target-bits", 4.5)], ids=str)
def test_calibration_and_choice_of_bits_are_kept(
    tiny: Path,
    interrupted: Run,
    options: tuple[object, ...],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    args = (*options, "--windows", 1, "--max-shard-size", "200KB")
    monkeypatch.setattr(sensitivity, "MEASURED_WINDOWS", 1)
    reference = tmp_path_factory.mktemp("whole") / "out"
    assert run(tiny, reference, *args).exit_code == 0
    interrupted(*args)

    def again(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("calibrated again")

    monkeypatch.setattr(command, "calibrate_plan", again)
    monkeypatch.setattr(command, "measure_parts", again)
    result = run(tiny, tmp_path / "out", *args, "--resume")
    assert result.exit_code == 0, result.exception
    assert files(tmp_path / "out") == files(reference)


# What is refused


def refused(error: type[Exception], source: Path, out: Path, *args: object) -> str:
    before = files(out.parent)
    result = run(source, out, *args, "--resume")
    assert type(result.exception) is error, result.exception
    assert files(out.parent) == before
    return str(result.exception)


@pytest.mark.parametrize(
    ("args", "key"),
    [
        ((*PLAIN, "--bits", 4), "config"),
        ((*PLAIN, "--bits-for", "lm_head=4"), "config, fixed"),
        ((*PLAIN, "--no-embeddings"), "config"),
        (("--no-awq", "--max-shard-size", "300KB"), "max_shard_size"),
        (("--max-shard-size", "200KB"), "calibration text, config"),
        ((*PLAIN, "--feedback"), "calibration text, feedback"),
        ((*PLAIN, "--windows", 3), "windows"),
        ((*PLAIN, "--target-bits", 5), "calibration text, target"),
    ],
)
def test_other_options_are_refused(
    tiny: Path, interrupted: Run, args: tuple[object, ...], key: str, tmp_path: Path
) -> None:
    interrupted(*PLAIN)
    message = refused(ConfigError, tiny, tmp_path / "out", *args)
    assert f"is of another {key}: give the same as then, or delete that folder" in message


def test_another_text_is_refused(tiny: Path, interrupted: Run, prose: Path, tmp_path: Path) -> None:
    args = (*PLAIN, "--feedback", "--windows", 1)
    interrupted(*args)
    message = refused(ConfigError, tiny, tmp_path / "out", *args, "--calibration", prose)
    assert "is of another calibration text:" in message


def test_a_source_with_one_other_number_is_refused(
    tiny: Path, interrupted: Run, zoo: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    interrupted(*PLAIN)
    content = zoo.read(tiny)
    content.tensors["model.norm.weight"][5] += 1
    other = content.write(tmp_path_factory.mktemp("other") / "tiny")
    assert "is of another source:" in refused(ConfigError, other, tmp_path / "out", *PLAIN)


@pytest.mark.parametrize(("place", "key"), [("__version__", "version"), ("torch.__version__", "torch")])
def test_another_version_is_refused(
    tiny: Path, interrupted: Run, monkeypatch: pytest.MonkeyPatch, place: str, key: str, tmp_path: Path
) -> None:
    interrupted(*PLAIN)
    monkeypatch.setattr(f"{resume.__name__}.{place}", "0.0.9")
    assert f"is of another {key}:" in refused(ConfigError, tiny, tmp_path / "out", *PLAIN)


def test_progress_of_reading_the_source(tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[tuple[str, int, int, str]] = []

    @contextmanager
    def bar(description: str) -> Iterator[Progress]:
        yield lambda *step: told.append((description, *step))

    monkeypatch.setattr(command, "progress_bar", bar)
    assert run(tiny, tmp_path / "out", *PLAIN, "--resume").exit_code == 0
    names = ["config.json", *sorted(path.name for path in tiny.glob("*.safetensors"))]
    steps = [("fingerprint", i + 1, len(names), name) for i, name in enumerate(names)]
    assert [step for step in told if step[0] == "fingerprint"] == steps


@pytest.mark.parametrize("name", ["resume.json", "calibrated.safetensors"])
@pytest.mark.parametrize("spoil", [lambda p: p.write_bytes(p.read_bytes()[:-9]), lambda p: p.unlink()])
def test_spoiled_work_is_refused(
    tiny: Path, interrupted: Run, name: str, spoil: Callable[[Path], None], tmp_path: Path
) -> None:
    interrupted(*PLAIN, "--feedback", "--windows", 1)
    spoil(tmp_path / ".out.resume" / name)
    message = refused(CheckpointError, tiny, tmp_path / "out", *PLAIN, "--feedback", "--windows", 1)
    assert name in message
    assert "to begin again" in message


def test_a_shard_that_was_cut_is_made_again(
    tiny: Path, whole: dict[str, bytes], interrupted: Run, tmp_path: Path
) -> None:
    interrupted(*PLAIN)
    shard = sorted((tmp_path / ".out.resume" / "checkpoint").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert run(tiny, tmp_path / "out", *PLAIN, "--resume").exit_code == 0
    assert files(tmp_path / "out") == whole


def test_without_the_option_interrupted_work_is_left_alone(
    tiny: Path, whole: dict[str, bytes], interrupted: Run, tmp_path: Path
) -> None:
    interrupted(*PLAIN)
    before = files(tmp_path / ".out.resume")
    assert run(tiny, tmp_path / "out", *PLAIN).exit_code == 0
    assert files(tmp_path / "out") == whole
    assert files(tmp_path / ".out.resume") == before
    assert "exists and is not empty" in refused(OutputError, tiny, tmp_path / "out", *PLAIN)
    assert run(tiny, tmp_path / "out", *PLAIN, "--resume", "--overwrite").exit_code == 0
    assert files(tmp_path / "out") == whole


def test_one_process_at_a_time(tiny: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    with FileLock(tmp_path / ".out.resume.lock"):
        said = refused(OutputError, tiny, tmp_path / "out", *PLAIN, "--resume")
    assert "another process is at work on it, and holds" in said
    assert run(tiny, tmp_path / "out", *PLAIN, "--resume").exit_code == 0
    assert files(tmp_path / "out") == whole


def test_an_error_before_the_first_shard_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    result = run(tiny, tmp_path / "out", "--resume", "--calibration", tmp_path / "empty.txt")
    assert isinstance(result.exception, CheckpointError)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


@pytest.mark.parametrize("args", [("--method", "absmax"), ("--dry-run",)])
def test_what_cannot_be_resumed(tiny: Path, tmp_path: Path, args: tuple[str, ...]) -> None:
    assert "leave out --resume" in refused(ConfigError, tiny, tmp_path / "out", *args)


def test_a_full_disk_keeps_what_is_finished(
    tiny: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saved = writer.save_file
    count = iter(range(100))

    def full(*args: Any, **kwargs: Any) -> None:
        if next(count) == 2:
            raise OSError(28, "No space left on device")
        saved(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "save_file", full)
        result = run(tiny, tmp_path / "out", *PLAIN, "--resume")
    assert isinstance(result.exception, OutputError)
    assert "No space left on device; what is finished is kept" in str(result.exception)
    assert len(list((tmp_path / ".out.resume" / "checkpoint").glob("*.safetensors"))) == 2
    assert json.loads((tmp_path / ".out.resume" / "resume.json").read_text())["device"] == "cpu"
    assert run(tiny, tmp_path / "out", *PLAIN, "--resume").exit_code == 0
    assert files(tmp_path / "out") == whole
    assert Checkpoint.open(tmp_path / "out").bits_per_tensor()
