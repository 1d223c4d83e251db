"""`polar chat`: a conversation over stdin, with a template, a limit, and an answer that is stopped."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from model_patch.cli import chat as chat_module
from model_patch.cli import decoding
from model_patch.cli.app import app
from model_patch.demo import MODEL
from model_patch.errors import CheckpointError, UnsupportedModelError
from model_patch.load import load_model, load_tokenizer
from polar_kernels import ArgumentError

TEMPLATE = """{% for m in messages %}<{{ m.role }}> {{ m.content }}
{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with a chat template; tests only read it."""
    folder = shutil.copytree(MODEL, tmp_path_factory.mktemp("chat") / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def talk(folder: Path, typed: str, *options: object) -> Result:
    args = ["chat", folder, "--temperature", 0, "--max-new-tokens", 8, "--exact", *options]
    return CliRunner().invoke(app, [str(arg) for arg in args], input=typed)


def answer(folder: Path, prompt: str) -> str:
    """What the model goes on with after `prompt`, by transformers alone."""
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, dtype=torch.float32 if not torch.cuda.is_available() else "auto")
    ids = tokenizer(prompt, return_tensors="pt").to(model.device)
    out = model.generate(**ids, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("way", ["--plain", "--accelerated"])
def test_answers_know_what_was_said_before(folder: Path, way: str) -> None:
    result = talk(folder, "The kernel is\n\n  \nAnd then\n", "--system", "Be brief.", way)
    assert result.exit_code == 0, result.exception
    so_far = "<system> Be brief.\n<user> The kernel is\n<assistant> "
    first = answer(folder, so_far)
    second = answer(folder, f"{so_far}{first}\n<user> And then\n<assistant> ")
    assert result.stdout == f"{first}\n{second}\n"
    speeds = [line for line in result.stderr.splitlines() if line.endswith("tok/s")]
    assert [line.split()[0] for line in speeds] == ["8", "8"]


def test_a_stopped_answer_is_forgotten(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answers(model: Any, tokenizer: Any, inputs: Any, options: Any) -> str:
        asked.append(tokenizer.decode(inputs["input_ids"][0]))
        if len(asked) == 1:
            raise KeyboardInterrupt
        return "yes"

    monkeypatch.setattr(chat_module, "_answer", answers)
    result = talk(folder, "one\ntwo\nthree\n")
    assert result.exit_code == 0, result.exception
    assert "(stopped)" in result.stderr
    assert asked[2] == "<user> two\n<assistant> yes\n<user> three\n<assistant> "


def test_without_a_template(tmp_path: Path) -> None:
    result = talk(MODEL, "hello\n")
    assert isinstance(result.exception, CheckpointError)
    assert "no chat template" in str(result.exception)
    assert "polar generate" in str(result.exception)


def test_a_conversation_that_is_too_long(folder: Path) -> None:
    result = talk(folder, "The kernel is\n", "--max-length", 4)
    assert isinstance(result.exception, ArgumentError)
    assert "more --max-length" in str(result.exception)
    length = len(load_tokenizer(folder)("<user> The kernel is\n<assistant> ")["input_ids"])
    fits = talk(folder, "The kernel is\n", "--max-length", length + 3, "--accelerated")
    assert fits.exit_code == 0, fits.exception
    assert "3 tokens in" in fits.stderr


@pytest.mark.parametrize(("accelerated", "raised"), [(None, False), (True, True), (False, False)])
def test_a_model_that_accelerate_does_not_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], accelerated: bool | None, raised: bool
) -> None:
    """Goes without, and says so; unless it was asked for."""
    asked = []

    def refuses(model: object, **options: object) -> None:
        asked.append(options)
        raise UnsupportedModelError("some layer")

    monkeypatch.setattr(decoding, "accelerate", refuses)
    monkeypatch.setattr(decoding, "load_model", lambda *args, **kwargs: torch.nn.Module())
    arguments = ("folder", torch.device("cuda"), "auto")
    options = {"exact": False, "accelerated": accelerated, "max_length": 9}
    if raised:
        with pytest.raises(UnsupportedModelError):
            decoding.load_for_decoding(*arguments, **options)
    else:
        assert isinstance(decoding.load_for_decoding(*arguments, **options), torch.nn.Module)
    assert asked == ([] if accelerated is False else [{"max_length": 9, "compile": True}])
    assert ("without captured steps, slower: some layer" in capsys.readouterr().err) == (accelerated is None)
