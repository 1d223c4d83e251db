"""`polar serve`: a server of its own process, asked over HTTP and by the openai client, spoiled, and stopped."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from model_patch import serve as serve_module
from model_patch.cli.app import app
from model_patch.demo import MODEL
from model_patch.errors import CheckpointError, ConfigError, UnsupportedModelError
from model_patch.load import load_model, load_tokenizer

needs_server = pytest.mark.skipif(
    not (find_spec("fastapi") and find_spec("uvicorn") and find_spec("openai")),
    reason="the extra 'serve' (fastapi, uvicorn, openai) is not installed",
)
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
QUESTION = [{"role": "user", "content": "The kernel is"}]
LENGTH = 64


@dataclass
class Server:
    folder: Path
    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def ask(self, path: str, body: object = None) -> tuple[int, Any]:
        """Status and JSON of the answer; `body` is sent as it is when it is bytes."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def chat(self, **changes: Any) -> tuple[int, Any]:
        body = {"model": str(self.folder), "messages": QUESTION, "max_tokens": 8, "temperature": 0}
        return self.ask("/v1/chat/completions", body | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with a chat template; tests only read it."""
    folder = shutil.copytree(MODEL, tmp_path_factory.mktemp("serve") / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "stderr"
    main = "from model_patch.cli import main; main()"
    options = ["--port", str(port), "--device", "cpu", "--accelerated", "--max-length", str(LENGTH)]
    command = [sys.executable, "-c", main, "serve", str(folder), *options]
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        server = Server(folder, f"http://127.0.0.1:{port}", log, process)
        try:
            _await(server)
            yield server
        finally:
            process.kill()


def _await(server: Server) -> None:
    for _ in range(600):
        assert server.process.poll() is None, server.log.read_text()
        try:
            if server.ask("/health")[0] == 200:
                return
        except OSError:
            time.sleep(0.1)
    pytest.fail(server.log.read_text())


@pytest.fixture(scope="module")
def expected(folder: Path) -> str:
    """Eight tokens by transformers alone."""
    model, tokenizer = load_model(folder, device="cpu", dtype=torch.float32), load_tokenizer(folder)
    ids = tokenizer(QUESTION[0]["content"], return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :])


def text(answer: Any) -> str:
    return answer["choices"][0]["message"]["content"]


@needs_server
def test_models_and_a_whole_answer(server: Server, expected: str) -> None:
    status, models = server.ask("/v1/models")
    assert status == 200
    assert [model["id"] for model in models["data"]] == [str(server.folder)]
    status, answer = server.chat()
    assert status == 200
    assert text(answer).endswith(expected)
    assert answer["usage"]["completion_tokens"] == 8
    assert "without the captured steps" not in server.log.read_text()


@needs_server
def test_a_streamed_answer_by_the_openai_client(server: Server, expected: str) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    options = {"model": str(server.folder), "messages": QUESTION, "max_tokens": 8, "temperature": 0}
    chunks = list(client.chat.completions.create(stream=True, **options))
    parts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(parts) > 2
    assert "".join(parts).endswith(expected)


@needs_server
def test_requests_at_once(server: Server) -> None:
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: server.chat(), range(3)))
    assert [status for status, _ in answers] == [200] * 3
    assert len({text(answer) for _, answer in answers}) == 1


@needs_server
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"messages": []}, "empty conversation"),
        ({"messages": "The kernel is"}, "string indices"),
        ({"max_tokens": -4}, "must be greater than 0"),
        ({"model": "another"}, "pinned to"),
        ({"temperature": -1.0, "seed": "x"}, "invalid literal"),
    ],
)
def test_malformed_requests(server: Server, change: dict[str, Any], named: str) -> None:
    status, answer = server.chat(**change)
    assert 400 <= status < 500, answer
    assert named in json.dumps(answer)
    assert server.chat()[0] == 200


@needs_server
def test_bodies_that_are_none(server: Server) -> None:
    for body in (b"", b'{"model":', b"[1]", b"\xff\xfe"):
        assert server.ask("/v1/chat/completions", body)[0] in (400, 422)
    status, answer = server.ask("/v1/chat/completions", {"model": str(server.folder)})
    assert (status, answer["error"]["message"]) == (400, "'messages' is missing")
    assert server.chat()[0] == 200


@needs_server
def test_a_request_that_does_not_fit_takes_the_plain_path(server: Server) -> None:
    long = [{"role": "user", "content": "The kernel is " * 40}]
    status, answer = server.chat(messages=long)
    assert status == 200
    assert answer["usage"]["prompt_tokens"] > LENGTH
    assert f"more than accelerate(max_length={LENGTH})" in server.log.read_text()
    assert server.chat()[0] == 200


@needs_server
def test_it_stops(server: Server) -> None:  # the last of this server's tests
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(20) == 0
    assert server.log.read_text().rstrip().endswith(("stopped", f"Finished server process [{server.process.pid}]"))
    with pytest.raises(urllib.error.URLError):
        server.ask("/health")


def refused(*args: object) -> BaseException | None:
    return CliRunner().invoke(app, ["serve", *map(str, args), "--device", "cpu"]).exception


def test_without_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_module, "is_serve_available", lambda: False)
    error = refused(folder)
    assert isinstance(error, ConfigError)
    assert "pip install 'polar-kernels[serve]'" in str(error)


def test_checkpoints_it_cannot_serve(folder: Path) -> None:
    error = refused(MODEL)
    assert isinstance(error, CheckpointError)
    assert "no chat template" in str(error)
    error = refused(folder, "--continuous-batching")
    assert isinstance(error, UnsupportedModelError)
    assert "GatedDeltaNet" in str(error)


def test_a_port_that_is_taken(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = refused(folder, "--port", port)
    assert isinstance(error, ConfigError)
    assert f"--port {port}" in str(error)


def test_continuous_batching_goes_without_graphs(folder: Path) -> None:
    error = refused(folder, "--continuous-batching", "--accelerated")
    assert isinstance(error, ConfigError)
    assert "leave out --accelerated" in str(error)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_an_address_of_ipv6(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reaches the server; what cannot be listened on is still refused."""
    reached = []
    monkeypatch.setattr(serve_module, "serve", lambda *args, host, **kwargs: reached.append(host))
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    assert refused(folder, "--host", "::1", "--port", "8791") is None
    assert reached == ["::1"]
    assert isinstance(refused(folder, "--host", "2001:db8::1", "--port", "8791"), ConfigError)


@needs_server
def test_continuous_batching_is_left_to_transformers(
    zoo: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.cli.serving import model_manager

    source = shutil.copytree(zoo.quantized("qwen3"), tmp_path / "qwen3")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, source)
    (source / "chat_template.jinja").write_text(TEMPLATE)
    loaded: list[Any] = []

    def server(force_model: str, continuous_batching: bool, **options: Any) -> None:
        assert continuous_batching
        loaded.append(model_manager.ModelManager(device="cpu", force_model=force_model))

    monkeypatch.setattr("transformers.cli.serve.Serve", server)
    original = model_manager.ModelManager
    assert refused(source, "--continuous-batching") is None
    assert model_manager.ModelManager is original
    (held,) = loaded[0].loaded_models.values()
    assert not hasattr(held.model, "_decoder")
