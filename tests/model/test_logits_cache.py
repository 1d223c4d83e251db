"""A reference's predictions on disk: the same comparison, no second run of the model, and nothing of another one."""

import json
from collections.abc import Callable
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from model_patch import CheckpointError, ConfigError, OutputError, PolarQuantConfig, patch_model
from model_patch.checkpoint import writer
from model_patch.evaluate import Convention, evaluate
from model_patch.logits_cache import LogitsCache, _decode, _encode, open_cache
from model_patch.quantize import plan_checkpoint, quantize_checkpoint

Open = Callable[..., LogitsCache]
WINDOW = 20


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 500, (70,), generator=torch.Generator().manual_seed(4))


@pytest.fixture
def quantized(zoo: Any) -> PreTrainedModel:
    model = zoo.model("qwen3")
    patch_model(model, PolarQuantConfig(3))
    return model


@pytest.fixture
def open_in(zoo: Any, tokens: torch.Tensor) -> Open:
    """Opens the cache in a folder; options replace those of the first run."""

    def opened(folder: Path, load: Any = None, **changed: Any) -> LogitsCache:
        options = {"window": WINDOW, "stride": None, "convention": Convention.hugging_face, "dtype": torch.float32}
        options |= {"device": zoo.device, "activation": "int8"}
        source = changed.pop("source", zoo.checkpoint("qwen3"))
        text = changed.pop("tokens", tokens)
        return open_cache(folder, source, text, load or (lambda: zoo.model("qwen3")), **options | changed)

    return opened


def never() -> PreTrainedModel:
    raise AssertionError("the reference was loaded")


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("stride", [None, 7])
def test_the_comparison_is_that_with_the_model(
    zoo: Any, quantized: PreTrainedModel, tokens: torch.Tensor, open_in: Open, stride: int | None, tmp_path: Path
) -> None:
    score = partial(evaluate, quantized, tokens, window=WINDOW, stride=stride)
    direct = score(reference=zoo.model("qwen3"))
    first = score(reference=open_in(tmp_path / "cache", stride=stride))
    assert astuple(first)[:-3] == astuple(direct)[:-3]
    assert first.kl_divergence == pytest.approx(direct.kl_divergence, rel=1e-5)
    assert first.kl_divergence_99 == pytest.approx(direct.kl_divergence_99, rel=1e-4)
    assert first.top1_agreement == pytest.approx(direct.top1_agreement, abs=0.02)  # rounded ties
    assert score(reference=open_in(tmp_path / "cache", never, stride=stride)) == first


def test_rounding_costs_a_model_next_to_nothing_against_itself(
    zoo: Any, tokens: torch.Tensor, open_in: Open, tmp_path: Path
) -> None:
    result = evaluate(zoo.model("qwen3"), tokens, window=WINDOW, reference=open_in(tmp_path / "cache"))
    assert abs(result.kl_divergence) < 1e-7


def test_impossible_and_certain_tokens() -> None:
    """Log-probabilities of minus infinity, and a token whose probability is all but 1."""
    expected = torch.tensor([[-torch.inf, -1.0, -2.0, -3.0], [0.0, 50.0, -1.0, -torch.inf]]).log_softmax(-1)
    found = _decode(_encode(expected))
    assert found.isfinite().all()
    torch.testing.assert_close(found.exp(), expected.exp(), rtol=1e-3, atol=1e-30)


def test_a_reference_with_nan_is_refused(
    zoo: Any, quantized: PreTrainedModel, tokens: torch.Tensor, open_in: Open, tmp_path: Path
) -> None:
    broken = zoo.model("qwen3")
    broken.model.norm.weight.data[0] = float("nan")
    for reference in (broken, open_in(tmp_path, lambda: broken)):
        with pytest.raises(CheckpointError, match="reference: its predictions have NaN"):
            evaluate(quantized, tokens, window=WINDOW, reference=reference)
    assert files(tmp_path) == ["cache.json"]


def test_windows_that_are_missing_are_added(
    quantized: PreTrainedModel, tokens: torch.Tensor, open_in: Open, tmp_path: Path
) -> None:
    evaluate(quantized, tokens, window=WINDOW, limit=1, reference=open_in(tmp_path))
    assert files(tmp_path) == ["cache.json", "window-000000.safetensors"]
    whole = evaluate(quantized, tokens, window=WINDOW, reference=open_in(tmp_path))
    assert files(tmp_path) == ["cache.json", *(f"window-{i:06d}.safetensors" for i in range(3))]
    (tmp_path / "window-000001.safetensors").unlink()
    assert evaluate(quantized, tokens, window=WINDOW, reference=open_in(tmp_path)) == whole


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("window", 21),
        ("stride", 3),
        ("convention", Convention.llama_cpp),
        ("dtype", torch.bfloat16),
        ("device", torch.device("meta")),
        ("tokens", torch.arange(70)),
    ],
)
def test_a_cache_of_something_else_is_refused(open_in: Open, key: str, value: Any, tmp_path: Path) -> None:
    open_in(tmp_path / "cache")
    with pytest.raises(ConfigError, match=f"predictions are of another .*{key}"):
        open_in(tmp_path / "cache", **{key: value})


def test_the_activation_matters_to_a_quantised_reference(tiny: Path, open_in: Open, tmp_path: Path) -> None:
    quantize_checkpoint(plan_checkpoint(tiny, PolarQuantConfig(4), awq=False), tmp_path / "quantised")
    open_in(tmp_path / "cache", source=tmp_path / "quantised")
    with pytest.raises(ConfigError, match="predictions are of another activation: "):
        open_in(tmp_path / "cache", source=tmp_path / "quantised", activation="exact")
    open_in(tmp_path / "of a plain one")
    open_in(tmp_path / "of a plain one", activation="exact")


def test_a_source_with_one_other_number_is_refused(zoo: Any, open_in: Open, tmp_path: Path) -> None:
    content = zoo.read(zoo.checkpoint("qwen3"))
    open_in(tmp_path / "cache", source=content.write(tmp_path / "one"))
    content.tensors["model.norm.weight"][0] += 1
    with pytest.raises(ConfigError, match="predictions are of another source"):
        open_in(tmp_path / "cache", source=content.write(tmp_path / "other"))


def test_progress_of_reading_the_source(zoo: Any, open_in: Open, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    open_in(tmp_path / "cache", progress=lambda *step: told.append(step))
    names = sorted(path.name for path in zoo.checkpoint("qwen3").glob("*.safetensors"))
    names = ["config.json", *names]
    assert told == [(i + 1, len(names), name) for i, name in enumerate(names)]


def test_a_folder_of_something_else_is_refused_and_untouched(open_in: Open, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(ConfigError, match="is no cache of predictions, and not empty"):
        open_in(tmp_path)
    assert files(tmp_path) == ["precious"]


@pytest.mark.parametrize("record", ["", "[]", "{}", json.dumps({"window": WINDOW})])
def test_a_spoiled_record_is_refused(open_in: Open, record: str, tmp_path: Path) -> None:
    (tmp_path / "cache.json").write_text(record)
    with pytest.raises((CheckpointError, ConfigError), match=r"delete the folder|are of another"):
        open_in(tmp_path)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _in_another_dtype(path: Path) -> None:
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)


def _shorter(path: Path) -> None:
    save_file({name: tensor[1:].clone() for name, tensor in load_file(path).items()}, path)


def _renamed(path: Path) -> None:
    save_file({f"{name}_": tensor for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize("spoil", [_cut, _in_another_dtype, _shorter, _renamed])
def test_a_spoiled_file_is_named(
    quantized: PreTrainedModel, tokens: torch.Tensor, open_in: Open, spoil: Callable[[Path], None], tmp_path: Path
) -> None:
    evaluate(quantized, tokens, window=WINDOW, reference=open_in(tmp_path))
    spoil(tmp_path / "window-000001.safetensors")
    with pytest.raises(CheckpointError, match=r"window-000001\.safetensors: .*delete it to make it again"):
        evaluate(quantized, tokens, window=WINDOW, reference=open_in(tmp_path, never))


def test_another_vocabulary_is_refused(
    zoo: Any, quantized: PreTrainedModel, tokens: torch.Tensor, open_in: Open, tmp_path: Path
) -> None:
    evaluate(quantized, tokens, window=WINDOW, reference=open_in(tmp_path))
    path = tmp_path / "window-000000.safetensors"
    save_file({name: tensor[..., :500].clone() for name, tensor in load_file(path).items()}, path)
    with pytest.raises(CheckpointError, match="its vocabulary has 500 tokens, that of the model 512"):
        evaluate(quantized, tokens, window=WINDOW, reference=open_in(tmp_path, never))


@pytest.fixture
def fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From then on only half of what is written at once fits."""
    write = Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        write(self, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    def fill() -> None:
        monkeypatch.setattr(Path, "write_bytes", full)
        monkeypatch.setattr(Path, "write_text", lambda self, text, encoding=None: full(self, text.encode()))

    return fill


def test_a_full_disk_leaves_no_half_record(open_in: Open, fill_the_disk: Callable[[], None], tmp_path: Path) -> None:
    fill_the_disk()
    with pytest.raises(OutputError, match="cannot be written: No space left"):
        open_in(tmp_path)
    assert files(tmp_path) == []


def test_what_a_killed_run_had_in_work_is_no_hindrance(
    open_in: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as killed:
        killed.setattr(writer.os, "replace", Mock(side_effect=OSError))
        killed.setattr(Path, "unlink", Mock())
        with pytest.raises(OutputError):
            open_in(tmp_path)
    (left,) = files(tmp_path)
    assert left.startswith(".unfinished-")
    open_in(tmp_path)
    assert "cache.json" in files(tmp_path)


def test_a_full_disk_leaves_nothing_half_written(
    quantized: PreTrainedModel, tokens: torch.Tensor, open_in: Open, fill_the_disk: Callable[[], None], tmp_path: Path
) -> None:
    cache = open_in(tmp_path)
    fill_the_disk()
    with pytest.raises(OutputError, match=r"window-000000\.safetensors: could not be written: .*No space left"):
        evaluate(quantized, tokens, window=WINDOW, reference=cache)
    assert files(tmp_path) == ["cache.json"]
