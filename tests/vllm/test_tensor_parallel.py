"""vLLM on two ranks: each holds its half, and the numbers are those of transformers."""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from shutil import copy
from typing import Any

import pytest

from model_patch.demo import MODEL

NEW = 12
START_SECONDS = 300


@pytest.fixture(scope="module")
def folder(engine: Any) -> Path:
    """A mixture with the tokenizer of the embedded model."""
    folder = engine.quantized.folder("qwen3_moe_large_vocabulary")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        copy(MODEL / name, folder)
    return folder


@pytest.fixture(scope="module")
def url(engine: Any, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of `vllm serve` over it on two ranks in fp32, which is exact."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "log"
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(folder), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "float32", "--tensor-parallel-size", "2", "--max-model-len", "64"]
    environment = engine.environment() | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    command.append("--enforce-eager")
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as process:
        try:
            _await(process, f"http://127.0.0.1:{port}/health", log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def _await(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
    pytest.fail(f"vllm serve did not start:\n{log.read_text()[-10000:]}")


def test_an_openai_client_gets_transformers_tokens_and_logprobs(engine: Any, folder: Path, url: str) -> None:
    from openai import OpenAI

    job = engine.job("qwen3_moe_large_vocabulary")
    answer = OpenAI(base_url=url, api_key="none").completions.create(
        model=str(folder),
        prompt=job.prompts,
        max_tokens=NEW,
        temperature=0,
        logprobs=1,
        extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
    )
    tokens = [[int(token.removeprefix("token_id:")) for token in c.logprobs.tokens] for c in answer.choices]
    assert [len(new) for new in tokens] == [NEW] * len(job.prompts)
    engine.check_exact(job, engine.result(tokens, [choice.logprobs.token_logprobs for choice in answer.choices]))


@pytest.mark.all_of_vllm
def test_two_ranks(engine: Any) -> None:
    exact = [engine.job(name, tensor_parallel=2) for name in ("qwen3", "qwen2_tied")]
    exact.append(engine.job("qwen3_moe", single_experts=True, tensor_parallel=2))
    rounded = [engine.job(n, dtype="bfloat16", tensor_parallel=2) for n in ("qwen3_5_text_tied", "qwen3_5_moe_text")]
    results = engine.run(exact + rounded)
    for job, result in zip(exact, results, strict=False):
        engine.check_exact(job, result)
    for job, result in zip(rounded, results[len(exact) :], strict=True):
        engine.check_rounded(job, result)
    for job, result in zip(exact + rounded, results, strict=True):
        engine.check_bytes(job, result)


@pytest.mark.all_of_vllm
def test_ranks_that_would_split_a_block_are_refused(engine: Any) -> None:
    (result,) = engine.run([engine.job("qwen3_narrow", tensor_parallel=2)])
    assert result.error is not None
    said = "model.layers.0.mlp.down_proj: 384 in_features over 2 ranks are 192 each, which must be a multiple of 128"
    assert said in result.log
