"""The command `polar`: every subcommand in text and JSON, and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError, NotASafetensorsRepoError
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata
from huggingface_hub.utils import TensorInfo as HubTensor
from safetensors import safe_open
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner, Result

from model_patch import cli
from model_patch.checkpoint.reader import INDEX_NAME, SINGLE_NAME, Checkpoint, read_config
from model_patch.checkpoint.writer import new_folder
from model_patch.cli import ppl as ppl_module
from model_patch.cli.app import app
from model_patch.demo import EVALUATION_TEXT, MODEL
from model_patch.errors import CheckpointError, ConfigError, OutputError, UnsupportedModelError
from model_patch.load import load_model
from model_patch.progress import Progress
from polar_kernels import PolarError, PolarModule
from polar_kernels.version import __version__

COMMANDS = (
    "quantize",
    "inspect",
    "verify",
    "generate",
    "chat",
    "serve",
    "ppl",
    "ablate",
    "dequantize",
    "convert",
    "env",
    "demo",
)
MAIN = "from model_patch.cli import main; main()"
DOWN, HEAD, EMBEDDING = "model.layers.0.mlp.down_proj", "lm_head", "model.embed_tokens"


def _run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def _text(*args: object) -> str:
    """The stdout of a command that succeeds."""
    result = _run(*args)
    if result.exception is not None:
        raise result.exception
    assert result.exit_code == 0
    return result.stdout


def _json(*args: object) -> Any:
    """The JSON of a command that succeeds; stdout holds nothing else."""
    return json.loads(_text(*args, "--json"))


def _refused(error: type[PolarError], *args: object) -> str:
    """The message of a command that fails with the project's own error."""
    result = _run(*args)
    assert type(result.exception) is error, result.exception
    assert result.exit_code == 1
    assert result.stdout == ""
    return str(result.exception)


def _usage_error(*args: object) -> str:
    result = _run(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    return result.stderr


def _main(monkeypatch: pytest.MonkeyPatch, *args: object) -> int | str | None:
    """The exit code of the console script, run here."""
    monkeypatch.setattr(sys, "argv", ["polar", *map(str, args)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


def _process(*args: object, code: str = MAIN, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env, timeout=120)


@pytest.fixture(scope="module")
def packed(tiny: Path) -> Path:
    """The tiny model at 5 bits without AWQ; tests only read it."""
    out = tiny.parent / "packed"
    _text("quantize", tiny, out, "--no-awq", "--device", "cpu")
    return out


@pytest.fixture(scope="module")
def packed_model(tiny: Path) -> Path:
    """The embedded model at 5 bits without AWQ; tests only read it."""
    out = tiny.parent / "packed-model"
    _text("quantize", MODEL, out, "--no-awq")
    return out


def _layers(folder: Path) -> dict[str, int]:
    """Layer name -> bits, as the checkpoint states them."""
    return Checkpoint.open(folder).bits_per_tensor()


def _stated(folder: Path) -> dict[str, Any]:
    return read_config(folder)["quantization_config"]


# The command as a whole ----------------------------------------------------------------------------------------------


def test_version() -> None:
    assert _text("--version") == f"polar {__version__}\n"


def test_without_arguments_it_shows_its_commands() -> None:
    result = _run()
    assert result.exit_code == 2
    shown = result.stdout + result.stderr
    assert "Usage" in shown
    assert [name for name in COMMANDS if f" {name} " not in shown] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    text = _text(command, "--help")
    assert f"Usage: polar {command}" in text


@pytest.mark.parametrize(
    "args",
    [
        ["nonsense"],
        ["--nonsense"],
        ["quantize"],
        ["quantize", "a"],
        ["quantize", "a", "b", "c"],
        ["quantize", "a", "b", "--nonsense"],
        ["quantize", "a", "b", "--bits", "five"],
        ["quantize", "a", "b", "--method", "gptq"],
        ["quantize", "a", "b", "--windows", "0"],
        ["generate", "a"],
        ["generate", "a", "b", "--max-new-tokens", "0"],
        ["generate", "a", "b", "--temperature", "-1"],
        ["chat"],
        ["serve"],
        ["serve", "a", "--port", "0"],
        ["chat", "a", "--max-new-tokens", "0"],
        ["ppl", "a"],
        ["ppl", "a", "--text", "t", "--window", "1"],
        ["ppl", "a", "--text", "t", "--stride", "0"],
        ["ppl", "a", "--text", "t", "--limit", "0"],
    ],
)
def test_wrong_usage(args: list[str]) -> None:
    assert "Usage" in _usage_error(*args)


def test_an_error_is_one_line_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert _main(monkeypatch, "inspect", tmp_path) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"polar: {tmp_path}: no {SINGLE_NAME}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("args", [["--debug", "inspect"], ["inspect", "--debug"]])
def test_debug_lets_the_error_through(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, args: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["polar", *args, str(tmp_path)])
    with pytest.raises(CheckpointError, match=SINGLE_NAME):
        cli.main()


def test_debug_shows_a_traceback(tmp_path: Path) -> None:
    result = _process("verify", tmp_path, "--debug")
    assert result.returncode == 1
    assert result.stdout == ""
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("model_patch.errors.CheckpointError: ")


def test_success_is_exit_code_0(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(monkeypatch, "env", "--json") == 0
    assert json.loads(capsys.readouterr().out)["polar"] == __version__


def test_an_interruption_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("model_patch.quantize.checkpoint.quantize_weight", interrupt)
    assert _main(monkeypatch, "quantize", tiny, tmp_path / "out", "--no-awq") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.strip() == "polar: interrupted"
    assert os.listdir(tmp_path) == []


SLOWLY = f"""
import signal, time
import model_patch.quantize.checkpoint as module

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
quantize = module.quantize_weight
module.quantize_weight = lambda *args, **kwargs: (time.sleep(1), quantize(*args, **kwargs))[1]
{MAIN}
"""


def test_ctrl_c_while_it_quantises_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOWLY, "quantize", str(tiny), str(tmp_path / "out"), "--no-awq"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not os.listdir(tmp_path) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert any(".partial" in name for name in os.listdir(tmp_path))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == ""
    assert err.splitlines()[-1] == "polar: interrupted"
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == []


def test_an_interrupt_as_soon_as_the_folder_is_there_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(folder: Path, pattern: str) -> Any:
        assert os.listdir(tmp_path) == [folder.name]
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "glob", interrupt)
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out", overwrite=False):
        pass
    assert os.listdir(tmp_path) == []


def test_a_folder_of_that_name_that_somebody_else_has_made_stays(tmp_path: Path) -> None:
    others = tmp_path / f".out.partial-{os.getpid()}"
    others.mkdir()
    with pytest.raises(OutputError, match="cannot be written"), new_folder(tmp_path / "out", overwrite=False):
        pass
    assert others.exists()


FULL = f"""
import resource

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
{MAIN}
"""


def test_files_that_may_not_grow_leave_nothing(tiny: Path, tmp_path: Path) -> None:
    """The kernel's limit on a file's size, which fails a write as a full disk does."""
    result = _process("quantize", tiny, tmp_path / "out", "--no-awq", code=FULL)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith(f"polar: {tmp_path / 'out'}: could not be written: ")
    assert "Traceback" not in result.stderr
    assert os.listdir(tmp_path) == []


def test_progress_goes_to_stderr_and_json_alone_to_stdout(tiny: Path, prose: Path, tmp_path: Path) -> None:
    """With a terminal pretended, so that the bars are drawn."""
    options = ("--calibration", prose, "--windows", 1, "--json")
    result = _process("quantize", tiny, tmp_path / "out", *options, FORCE_COLOR="1")
    assert result.returncode == 0
    assert json.loads(result.stdout)["out"] == str(tmp_path / "out")
    assert "calibrate" in result.stderr
    assert "quantize" in result.stderr


# env -----------------------------------------------------------------------------------------------------------------


def test_env() -> None:
    found = _json("env")
    assert (found["polar"], found["torch"]) == (__version__, torch.__version__)
    assert len(found["gpus"]) == torch.cuda.device_count()
    text = _text("env")
    assert all(key in text for key in found)
    assert torch.__version__ in text


# quantize ------------------------------------------------------------------------------------------------------------


def test_quantize_tells_the_peak_memory(tiny: Path, tmp_path: Path) -> None:
    """In a process whose memory is known: it holds this much at the least before it begins."""
    held = f"held = bytearray(b'x') * 500_000_000; del held; {MAIN}"
    result = _process("quantize", tiny, tmp_path / "out", "--no-awq", "--device", "cpu", "--json", code=held)
    peak = json.loads(result.stdout)["peak_bytes"]
    assert 500e6 < peak["host"] < 3e9
    assert peak["gpu"] is None
    assert result.stderr.splitlines()[-1] == f"peak memory: {peak['host'] / 1e6:.2f} MB (host)"


def test_quantize_with_the_default_calibration(tiny: Path, tmp_path: Path) -> None:
    report = _json("quantize", tiny, tmp_path / "out", "--windows", 1)
    assert _stated(tmp_path / "out")["awq"] is True
    assert _layers(tmp_path / "out") == {name: layer["bits"] for name, layer in report["layers"].items()}
    assert set(_layers(tmp_path / "out").values()) == {5}
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert f"{DOWN}.awq_scales" in checkpoint.tensors
    assert report["bytes_after"] == sum(info.nbytes for info in checkpoint.tensors.values())
    assert report["bytes_before"] == sum(info.nbytes for info in Checkpoint.open(tiny).tensors.values())
    assert report["method"] == "polar"
    assert load_model(tmp_path / "out") is not None


def test_quantize_calibrates_on_the_given_text(tiny: Path, prose: Path, tmp_path: Path) -> None:
    _text("quantize", tiny, tmp_path / "given", "--awq", "--calibration", prose, "--windows", 1)
    other = tmp_path / "other.txt"
    other.write_text("the kernel " * 600)
    _text("quantize", tiny, tmp_path / "other", "--awq", "--calibration", other, "--windows", 1)
    given, different = (Checkpoint.open(tmp_path / name).read(f"{HEAD}.awq_scales") for name in ("given", "other"))
    assert not torch.equal(given, different)


def test_quantize_in_text(tiny: Path, tmp_path: Path) -> None:
    text = _text("quantize", tiny, tmp_path / "out", "--no-awq")
    assert f"written to {tmp_path / 'out'}" in text
    assert "9 layers of 5.00 bits, 0 kept" in text


def test_quantize_without_awq(packed: Path) -> None:
    assert _stated(packed)["awq"] is False
    assert not [name for name in Checkpoint.open(packed).tensors if name.endswith("awq_scales")]


def test_quantize_carries_the_tokenizer_over(packed: Path, tiny: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (packed / name).read_bytes() == (tiny / name).read_bytes()


def test_quantize_twice_gives_the_same_bytes(tiny: Path, packed: Path, tmp_path: Path) -> None:
    _text("quantize", tiny, tmp_path / "out", "--no-awq", "--device", "cpu")
    for path in packed.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_quantize_bits(tiny: Path, tmp_path: Path) -> None:
    _text("quantize", tiny, tmp_path / "out", "--no-awq", "--bits", 3)
    assert _stated(tmp_path / "out")["bits"] == 3
    assert set(_layers(tmp_path / "out").values()) == {3}


def test_quantize_bits_for_the_last_match_wins(tiny: Path, tmp_path: Path) -> None:
    options = ("--bits-for", "*_proj=6", "--bits-for", "*.mlp.*=4", "--bits-for", "lm_head=8")
    _text("quantize", tiny, tmp_path / "out", "--no-awq", *options)
    bits = _layers(tmp_path / "out")
    assert bits[DOWN] == 4
    assert bits["model.layers.0.self_attn.q_proj"] == 6
    assert (bits[HEAD], bits[EMBEDDING]) == (8, 5)
    assert load_model(tmp_path / "out") is not None


def test_quantize_leaves_what_it_is_told_to(tiny: Path, tmp_path: Path) -> None:
    options = ("--no-embeddings", "--no-lm-head", "--exclude", "*.q_proj", "--exclude", "*.mlp.up_proj")
    report = _json("quantize", tiny, tmp_path / "out", "--no-awq", *options)
    left = {EMBEDDING, HEAD, "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"}
    assert report["kept"] == dict.fromkeys(report["kept"], "excluded")
    assert set(report["kept"]) == left
    assert not left & _layers(tmp_path / "out").keys()
    tensors = Checkpoint.open(tmp_path / "out").tensors
    assert all(tensors[f"{name}.weight"].dtype == torch.bfloat16 for name in left)
    assert load_model(tmp_path / "out") is not None


def test_quantize_in_shards(tiny: Path, tmp_path: Path) -> None:
    _text("quantize", tiny, tmp_path / "out", "--no-awq", "--max-shard-size", "200KB")
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert (tmp_path / "out" / INDEX_NAME).is_file()
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            assert {"centroids", "bits_per_tensor", "bit_order"} <= file.metadata().keys()
    assert load_model(tmp_path / "out") is not None


def test_quantize_by_absmax_writes_a_plain_checkpoint(tiny: Path, tmp_path: Path) -> None:
    report = _json("quantize", tiny, tmp_path / "out", "--method", "absmax", "--bits", 3)
    assert report["method"] == "absmax"
    assert report["bytes_after"] == report["bytes_before"]
    assert "quantization_config" not in read_config(tmp_path / "out")
    block = Checkpoint.open(tmp_path / "out").read(f"{DOWN}.weight")[0, :128]
    assert 2 < len(block.unique()) <= 7
    assert load_model(tmp_path / "out") is not None
    assert "absmax to 3 bits" in _text("quantize", tiny, tmp_path / "text", "--method", "absmax", "--bits", 3)


def test_quantize_dry_run_writes_nothing(tiny: Path, packed: Path, tmp_path: Path) -> None:
    report = _json("quantize", tiny, tmp_path / "out", "--no-awq", "--dry-run")
    assert report["out"] is None
    assert report["bytes_after"] == sum(info.nbytes for info in Checkpoint.open(packed).tensors.values())
    assert report["layers"][DOWN] == {"bits": 5, "bytes_before": 128 * 256 * 2, "bytes_after": 128 * (160 + 4)}
    text = _text("quantize", tiny, tmp_path / "out", "--dry-run")
    assert DOWN in text
    assert "nothing written" in text
    assert os.listdir(tmp_path) == []


def test_quantize_overwrites_only_when_told_to(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    message = _refused(OutputError, "quantize", tiny, tmp_path / "out", "--no-awq")
    assert str(tmp_path / "out") in message
    assert os.listdir(tmp_path / "out") == ["precious"]
    _text("quantize", tiny, tmp_path / "out", "--no-awq", "--overwrite")
    assert "precious" not in os.listdir(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", 9], "bits must be an integer from 2 to 8, found 9"),
        (["--bits", 1], "bits must be an integer from 2 to 8, found 1"),
        (["--bits", 0], "bits must be an integer from 2 to 8, found 0"),
        (["--bits-for", "*q_proj=9"], "'*q_proj'"),
        (["--bits-for", "q_proj"], "'q_proj'"),
        (["--bits-for", "=4"], "'=4'"),
        (["--bits-for", "q_proj="], "'q_proj='"),
        (["--bits-for", "q_proj=-4"], "'q_proj=-4'"),
        (["--bits-for", "q_proj=4.0"], "'q_proj=4.0'"),
        (["--bits-for", "q_proj=²"], "'q_proj=²'"),
        (["--bits-for", "nothing=4"], "nothing"),
        (["--exclude", "nothing*"], "nothing*"),
        (["--method", "absmax", "--awq"], "absmax"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "nonsense"], "nonsense"),
        (["--device", "meta"], "meta"),
        (["--max-shard-size", "5XB"], "5XB"),
        (["--max-shard-size", "-5GB"], "-5GB"),
        (["--max-shard-size", "0"], "0"),
    ],
)
def test_quantize_refuses_options(tiny: Path, tmp_path: Path, options: list[object], message: str) -> None:
    awq = [] if "absmax" in options else ["--no-awq"]
    assert message in _refused(ConfigError, "quantize", tiny, tmp_path / "out", *awq, *options)
    assert os.listdir(tmp_path) == []


def test_quantize_refuses_to_leave_everything(tiny: Path, tmp_path: Path) -> None:
    message = _refused(UnsupportedModelError, "quantize", tiny, tmp_path / "out", "--no-awq", "--exclude", "*")
    assert "no layer to quantise" in message


def test_quantize_refuses_a_quantised_checkpoint(packed: Path, tmp_path: Path) -> None:
    assert "quantised already" in _refused(UnsupportedModelError, "quantize", packed, tmp_path / "out")


def test_quantize_refuses_a_folder_that_is_not_there(tmp_path: Path) -> None:
    missing = tmp_path / "a" / "b"
    for options in ([], ["--dry-run"]):
        message = _refused(CheckpointError, "quantize", missing, tmp_path / "out", *options)
        assert message.startswith(f"{missing}: no such folder")
    assert os.listdir(tmp_path) == []


def test_quantize_refuses_a_calibration_text_it_cannot_use(tiny: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    for text, problem in ((short, "fewer than one window of 512"), (tmp_path / "missing.txt", "cannot be read")):
        message = _refused(CheckpointError, "quantize", tiny, tmp_path / "out", "--calibration", text)
        assert str(text) in message
        assert problem in message
    assert os.listdir(tmp_path) == ["short.txt"]


def test_quantize_with_awq_needs_a_tokenizer(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    message = _refused(CheckpointError, "quantize", tmp_path / "bare", tmp_path / "out")
    assert f"{tmp_path / 'bare'}: no tokenizer" in message
    result = _run("quantize", tmp_path / "bare", tmp_path / "out", "--no-awq")
    assert result.exit_code == 0
    assert "polar: warning: " in result.stderr
    assert "has no tokenizer (tokenizer.json)" in result.stderr


# inspect and verify --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fixture", "bits"), [("tiny", 16), ("packed", 5)])
def test_inspect(request: pytest.FixtureRequest, fixture: str, bits: int) -> None:
    folder = request.getfixturevalue(fixture)
    found = _json("inspect", folder)
    assert found["bytes"] == sum(info.nbytes for info in Checkpoint.open(folder).tensors.values())
    assert len(found["layers"]) == 9
    assert {layer["bits"] for layer in found["layers"].values()} == {bits}
    assert found["layers"][DOWN]["quantized"] is (bits == 5)
    assert found["layers"][DOWN]["shape"] == ([128, 160] if bits == 5 else [128, 256])
    assert found["layers"][EMBEDDING]["kind"] == "embedding"
    assert (found["quantization_config"] is None) is (bits == 16)
    text = _text("inspect", folder)
    assert all(name in text for name in found["layers"])
    assert ("not quantised" in text) is (bits == 16)


def test_inspect_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    assert SINGLE_NAME in _refused(CheckpointError, "inspect", tmp_path)


def test_verify(packed: Path) -> None:
    found = _json("verify", packed)
    assert found["layers"] == _layers(packed)
    assert (found["layer_errors"], found["linear_error"]) == ({}, None)
    assert "9 quantised layers and 5 plain tensors are sound" in _text("verify", packed)


def test_verify_against_the_source(packed_model: Path) -> None:
    found = _json("verify", packed_model, "--against", MODEL)
    assert 0.0020 < found["linear_error"] <= 0.00246
    assert found["layer_errors"].keys() == found["layers"].keys()
    assert all(0.0015 < error < 0.0035 for error in found["layer_errors"].values())
    text = _text("verify", packed_model, "--against", MODEL)
    assert f"linear weights together: {found['linear_error']:.6f}" in text
    assert all(name in text for name in found["layers"])


def test_verify_refuses_another_source(packed: Path, packed_model: Path, tmp_path: Path) -> None:
    message = _refused(CheckpointError, "verify", packed, "--against", MODEL)
    assert str(MODEL) in message
    assert "model.embed_tokens.weight" in message
    assert "[4096, 256] in the source, [4096, 128] here" in message
    assert "is missing" in _refused(CheckpointError, "verify", packed, "--against", packed_model)
    assert "no such folder" in _refused(CheckpointError, "verify", packed, "--against", tmp_path / "a" / "b")


def test_verify_refuses_a_plain_checkpoint(tiny: Path) -> None:
    assert "not a quantised checkpoint" in _refused(CheckpointError, "verify", tiny)


# generate ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixture", ["tiny", "packed"])
def test_generate(request: pytest.FixtureRequest, fixture: str) -> None:
    folder = request.getfixturevalue(fixture)
    result = _run("generate", folder, "The kernel is", "--max-new-tokens", 5)
    assert result.exit_code == 0
    assert result.stdout.startswith("The kernel is")
    assert len(result.stdout) > len("The kernel is\n")
    assert "tok/s" in result.stderr
    found = _json("generate", folder, "The kernel is", "--max-new-tokens", 5)
    assert found["new_tokens"] == 5
    assert found["text"].strip() == result.stdout.strip()


def test_generate_from_the_quantised_embedded_model(packed_model: Path) -> None:
    text = _text("generate", packed_model, "The kernel is", "--max-new-tokens", 12)
    assert len(text.split()) > 5


def test_generate_samples_at_a_temperature(tiny: Path) -> None:
    found = set()
    for seed in range(4):
        torch.manual_seed(seed)
        found.add(_json("generate", tiny, "The", "--max-new-tokens", 5, "--temperature", 1.0)["text"])
    assert len(found) > 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_generate_in_a_dtype(packed: Path, dtype: str) -> None:
    assert _json("generate", packed, "The", "--max-new-tokens", 2, "--dtype", dtype)["new_tokens"] == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generate_accelerated_writes_the_same(packed_model: Path, temperature: float) -> None:
    args = ("generate", packed_model, "The kernel is", "--max-new-tokens", 12, "--temperature", temperature, "--exact")
    texts = []
    for way in ("--plain", "--accelerated"):
        torch.manual_seed(3)
        texts.append(_json(*args, way)["text"])
    assert texts[0] == texts[1]


def test_generate_refuses(tiny: Path, tmp_path: Path) -> None:
    assert "prompt has no tokens" in _refused_any("generate", tiny, "")
    assert "'int8'" in _refused(ConfigError, "generate", tiny, "The", "--dtype", "int8")
    assert "cuda:99" in _refused(ConfigError, "generate", tiny, "The", "--device", "cuda:99")
    shutil.copytree(tiny, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    assert "no tokenizer" in _refused(CheckpointError, "generate", tmp_path / "bare", "The")
    (tmp_path / "bare" / "tokenizer.json").write_text("{")
    message = _refused(CheckpointError, "generate", tmp_path / "bare", "The")
    assert "no tokenizer could be loaded" in message


def _refused_any(*args: object) -> str:
    result = _run(*args)
    assert isinstance(result.exception, PolarError)
    assert result.exit_code == 1
    return str(result.exception)


# ppl -----------------------------------------------------------------------------------------------------------------


def test_ppl_of_the_embedded_model_against_itself() -> None:
    options = ("--text", EVALUATION_TEXT, "--limit", 24, "--against", MODEL, "--dtype", "float32")
    found = _json("ppl", MODEL, *options)
    assert (found["windows"], found["window"], found["stride"], found["tokens"]) == (24, 512, 512, 24 * 511)
    assert found["perplexity"] == pytest.approx(48.60, abs=0.02)
    assert found["kl_divergence"] == pytest.approx(0, abs=1e-6)
    assert found["top1_agreement"] == 1.0


def test_ppl_of_a_quantised_model(tiny: Path, packed: Path, prose: Path) -> None:
    options = ("--text", prose, "--window", 64, "--limit", 3)
    found = _json("ppl", packed, *options, "--against", tiny)
    assert (found["model"], found["against"], found["text"]) == (str(packed), str(tiny), str(prose))
    assert 0 < found["kl_divergence"] < 0.1
    assert 0 < found["top1_agreement"] <= 1
    assert found["perplexity_error"] > 0
    text = _text("ppl", packed, *options, "--against", tiny)
    assert f"perplexity  {found['perplexity']:.4f}" in text
    assert f"same top-1  {found['top1_agreement']:.2%}" in text


def test_ppl_states_its_windows(tiny: Path, prose: Path) -> None:
    options = ("--text", prose, "--window", 64, "--limit", 3)
    text = _text("ppl", tiny, *options, "--stride", 32)
    assert "3 of 64 tokens, stride 32, each scoring what no earlier one has (Hugging Face)" in text
    text = _text("ppl", tiny, *options, "--convention", "llama.cpp")
    assert "3 of 64 tokens, stride 64, each scoring its second half (llama.cpp)" in text
    found = _json("ppl", tiny, *options, "--convention", "llama.cpp")
    assert (found["convention"], found["tokens"]) == ("llama.cpp", 3 * 31)
    message = _refused(ConfigError, "ppl", tiny, *options, "--convention", "llama.cpp", "--stride", 32)
    assert "side by side" in message


def test_ppl_refuses_a_window_of_which_nothing_is_scored(prose: Path, tmp_path: Path) -> None:
    """Before a model is looked for."""
    options = ("--text", prose, "--window", 2, "--convention", "llama.cpp")
    message = _refused(ConfigError, "ppl", tmp_path / "none", *options)
    assert message == "window: with llama.cpp it must have at least 3 tokens, found 2: none would be scored"


def test_ppl_with_kept_predictions(
    tiny: Path, packed: Path, prose: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ("--text", prose, "--window", 64, "--limit", 3, "--against", tiny)
    first = _json("ppl", packed, *options, "--logits-cache", tmp_path / "cache")
    assert first["kl_divergence"] == pytest.approx(_json("ppl", packed, *options)["kl_divergence"], rel=1e-3)
    assert len(list((tmp_path / "cache").glob("window-*.safetensors"))) == 3
    loaded: list[object] = []
    load = ppl_module.load_model
    monkeypatch.setattr(ppl_module, "load_model", lambda source, **kw: loaded.append(source) or load(source, **kw))
    assert _json("ppl", packed, *options, "--logits-cache", tmp_path / "cache") == first
    assert loaded == [str(packed)]
    message = _refused(ConfigError, "ppl", packed, *options, "--stride", 32, "--logits-cache", tmp_path / "cache")
    assert "predictions are of another stride" in message
    message = _refused(ConfigError, "ppl", packed, "--text", prose, "--logits-cache", tmp_path / "cache")
    assert "name it with --against" in message


@pytest.mark.parametrize(("options", "activation"), [(("--exact",), "exact"), ((), "int8")])
@pytest.mark.parametrize("kept", [False, True])
def test_ppl_sets_the_activation_of_both_models(
    packed: Path, prose: Path, options: tuple[str], activation: str, kept: bool, monkeypatch: Any, tmp_path: Path
) -> None:
    loaded: list[PreTrainedModel] = []
    load = ppl_module.load_model
    monkeypatch.setattr(ppl_module, "load_model", lambda source, **kw: loaded.append(load(source, **kw)) or loaded[-1])
    cache = ("--logits-cache", tmp_path / "cache") if kept else ()
    _text("ppl", packed, "--text", prose, "--window", 64, "--limit", 1, "--against", packed, *options, *cache)
    found = [{module.activation for module in model.modules() if isinstance(module, PolarModule)} for model in loaded]
    assert found == [{activation}, {activation}]
    if kept:
        record = json.loads((tmp_path / "cache" / "cache.json").read_text())
        assert (record["activation"], record["device"]) == (activation, loaded[1].device.type)


def test_ppl_shows_progress_of_reading_the_reference(
    tiny: Path, prose: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: list[str] = []

    @contextmanager
    def bar(description: str) -> Iterator[Progress]:
        yield lambda done, total, what: told.append(f"{description} {done} {total} {what}")

    monkeypatch.setattr(ppl_module, "progress_bar", bar)
    options = ("--text", prose, "--window", 64, "--limit", 1, "--against", tiny)
    _text("ppl", tiny, *options, "--logits-cache", tmp_path / "cache")
    assert told == ["fingerprint 1 2 config.json", "fingerprint 2 2 model.safetensors", "score 1 1 scoring"]


def test_ppl_without_a_reference(tiny: Path, prose: Path) -> None:
    found = _json("ppl", tiny, "--text", prose, "--window", 64, "--limit", 1)
    assert (found["against"], found["kl_divergence"], found["top1_agreement"]) == (None, None, None)
    assert (found["tokens"], found["perplexity_error"]) == (63, 0.0)
    assert "mean KL" not in _text("ppl", tiny, "--text", prose, "--window", 64, "--limit", 1)


def test_ppl_with_a_stride_scores_each_token_once(tiny: Path, prose: Path) -> None:
    found = _json("ppl", tiny, "--text", prose, "--window", 64, "--stride", 32, "--limit", 4)
    assert (found["windows"], found["stride"], found["tokens"]) == (4, 32, 63 + 3 * 32)
    whole = _json("ppl", tiny, "--text", prose, "--window", 64)
    tokens = whole["tokens"] // 63 * 64
    assert tokens > 600
    assert whole["windows"] == tokens // 64


def test_ppl_refuses_a_text_it_cannot_use(tiny: Path, tmp_path: Path) -> None:
    short, binary = tmp_path / "short.txt", tmp_path / "binary.txt"
    short.write_text("too short")
    binary.write_bytes(b"\xff\xfe\x00")
    assert "fewer than one window of 512" in _refused(CheckpointError, "ppl", tiny, "--text", short)
    for text in (binary, tmp_path / "missing.txt", tmp_path):
        message = _refused(CheckpointError, "ppl", tiny, "--text", text)
        assert message.startswith(f"{text}: cannot be read")


def test_ppl_refuses_models_that_do_not_fit(tiny: Path, prose: Path, tmp_path: Path) -> None:
    config = Qwen3Config.from_pretrained(tiny)
    for name, size in (("small", 300), ("large", 5000)):
        config.vocab_size = size
        Qwen3ForCausalLM(config).bfloat16().save_pretrained(tmp_path / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny / file, tmp_path / name)
    options = ("--text", prose, "--window", 64, "--limit", 1)
    message = _refused(CheckpointError, "ppl", tmp_path / "small", *options)
    assert "another tokenizer?" in message
    message = _refused(CheckpointError, "ppl", tiny, *options, "--against", tmp_path / "large")
    assert "5000" in message
    assert "4096" in message


# dequantize ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _logits(folder: Path) -> torch.Tensor:
    model = load_model(folder, device="cpu", dtype=torch.float32)
    return model(torch.arange(40, 60)[None]).logits


def test_dequantize_gives_the_model_that_was_quantised(packed_model: Path, tmp_path: Path) -> None:
    text = _text("dequantize", packed_model, tmp_path / "out", "--dtype", "float32", "--max-shard-size", "5MB")
    assert text == f"written to {tmp_path / 'out'}\n"
    assert "quantization_config" not in read_config(tmp_path / "out")
    checkpoint, source = Checkpoint.open(tmp_path / "out"), Checkpoint.open(MODEL)
    assert {n: i.shape for n, i in checkpoint.tensors.items()} == {n: i.shape for n, i in source.tensors.items()}
    assert {info.dtype for info in checkpoint.tensors.values()} == {torch.float32}
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    actual, expected = _logits(tmp_path / "out"), _logits(packed_model)
    assert (actual - expected).norm() / expected.norm() < 1e-5
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (MODEL / "tokenizer.json").read_bytes()


def test_dequantize_in_bf16_by_default(packed: Path, tmp_path: Path) -> None:
    _text("dequantize", packed, tmp_path / "out")
    assert {info.dtype for info in Checkpoint.open(tmp_path / "out").tensors.values()} == {torch.bfloat16}


def test_dequantize_refuses(tiny: Path, packed: Path, tmp_path: Path) -> None:
    assert "not a quantised checkpoint" in _refused(CheckpointError, "dequantize", tiny, tmp_path / "out")
    assert "'int8'" in _refused(ConfigError, "dequantize", packed, tmp_path / "out", "--dtype", "int8")
    assert "5XB" in _refused(ConfigError, "dequantize", packed, tmp_path / "out", "--max-shard-size", "5XB")
    assert os.listdir(tmp_path) == []
    _refused(OutputError, "dequantize", packed, packed)
    _text("dequantize", packed, tmp_path / "out")
    _refused(OutputError, "dequantize", packed, tmp_path / "out")
    _text("dequantize", packed, tmp_path / "out", "--overwrite")


# Names on the Hub ----------------------------------------------------------------------------------------------------

NAME = "someone/some-model"


def _forbidden(*args: object, **kwargs: object) -> str:
    raise AssertionError("the weights must not be downloaded")


def _hub_headers(folder: Path) -> SafetensorsRepoMetadata:
    """The headers of a single-file checkpoint as the Hub gives them."""
    names = {torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}
    checkpoint = Checkpoint.open(folder)
    tensors = {
        name: HubTensor(dtype=names[info.dtype], shape=list(info.shape), data_offsets=(0, info.nbytes))
        for name, info in checkpoint.tensors.items()
    }
    file = SafetensorsFileMetadata(metadata=checkpoint.metadata, tensors=tensors)
    weight_map = dict.fromkeys(tensors, SINGLE_NAME)
    return SafetensorsRepoMetadata(
        metadata=None, sharded=False, weight_map=weight_map, files_metadata={SINGLE_NAME: file}
    )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Path], None]:
    """Make a local checkpoint the one that the Hub has under NAME; its weights cannot be downloaded."""

    def serve(folder: Path) -> None:
        (tmp_path / "cache").mkdir()
        config = shutil.copy(folder / "config.json", tmp_path / "cache")
        headers = _hub_headers(folder)
        monkeypatch.setattr("model_patch.load.hf_hub_download", _by_name(str(config)))
        monkeypatch.setattr(
            "model_patch.load.get_safetensors_metadata", lambda name, revision: headers if name == NAME else None
        )
        monkeypatch.setattr("model_patch.load.snapshot_download", _forbidden)

    return serve


def _by_name(config: str) -> Callable[..., str]:
    def download(name: str, file: str, revision: str | None) -> str:
        assert (name, file, revision) == (NAME, "config.json", None)
        return config

    return download


def test_dry_run_of_a_hub_name_reads_headers_only(hub: Callable[[Path], None], tiny: Path, tmp_path: Path) -> None:
    expected = _json("quantize", tiny, tmp_path / "out", "--dry-run")
    hub(tiny)
    assert _json("quantize", NAME, tmp_path / "out", "--dry-run") == expected
    assert os.listdir(tmp_path) == ["cache"]
    assert os.listdir(tmp_path / "cache") == ["config.json"]


def test_inspect_of_a_hub_name_reads_headers_only(hub: Callable[[Path], None], packed: Path) -> None:
    expected = _json("inspect", packed)
    hub(packed)
    assert _json("inspect", NAME) == expected


def test_quantize_of_a_hub_name_downloads_it(monkeypatch: pytest.MonkeyPatch, tiny: Path, tmp_path: Path) -> None:
    calls = []

    def download(name: str, ignore_patterns: list[str]) -> str:
        calls.append((name, ignore_patterns))
        return str(tiny)

    monkeypatch.setattr("model_patch.load.snapshot_download", download)
    _text("quantize", NAME, tmp_path / "out", "--no-awq")
    ((name, ignored),) = calls
    assert name == NAME
    assert {"*.bin", "*.pt", "*.py"} <= set(ignored)
    assert _layers(tmp_path / "out")[DOWN] == 5


HUB_ERRORS = [
    LocalEntryNotFoundError("cannot reach it\nand more lines\nof advice"),
    HTTPError("connection refused"),
    HTTPError(""),
    OSError("no route to host"),
]


@pytest.mark.parametrize("error", HUB_ERRORS, ids=lambda error: repr(error)[:30])
@pytest.mark.parametrize("args", [["quantize", NAME, "OUT"], ["verify", NAME], ["generate", NAME, "The"]])
def test_a_hub_that_cannot_be_reached(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, args: list[str]
) -> None:
    def download(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr("model_patch.load.snapshot_download", download)
    assert _main(monkeypatch, *args) == 1
    _one_line_about_the_hub(capsys)


@pytest.mark.parametrize(
    "error", [*HUB_ERRORS, NotASafetensorsRepoError("no safetensors here")], ids=lambda error: repr(error)[:30]
)
@pytest.mark.parametrize("args", [["quantize", NAME, "OUT", "--dry-run"], ["inspect", NAME]])
def test_a_hub_that_gives_no_headers(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny: Path,
    hub: Callable[[Path], None],
    error: Exception,
    args: list[str],
) -> None:
    def headers(*args: object, **kwargs: object) -> SafetensorsRepoMetadata:
        raise error

    hub(tiny)
    monkeypatch.setattr("model_patch.load.get_safetensors_metadata", headers)
    assert _main(monkeypatch, *args) == 1
    _one_line_about_the_hub(capsys)


def _one_line_about_the_hub(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.strip()]
    assert line.startswith(f"polar: {NAME}: no such folder, and the Hub did not give it")


def test_a_name_the_hub_cannot_have(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: object, **kwargs: object) -> str:
        raise HFValidationError("Repo id must be ...")

    monkeypatch.setattr("model_patch.load.snapshot_download", download)
    message = _refused(CheckpointError, "verify", "a/b/c")
    assert message == "a/b/c: no such folder, and not the name of a model on the Hub"
