"""vLLM itself: tokens a second of its engine, 5-bit and bf16, with random weights of a true shape.

Each engine runs in a process of its own, `vllm_process.py`, so that it leaves no memory behind and its end is not ours.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median, stdev
from typing import Any

import torch
from polar_bench.random_model import random_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, Qwen3_5Config

from model_patch import PolarQuantConfig, load_model
from model_patch.errors import ConfigError, UnsupportedModelError
from model_patch.hf import attach_quantizer
from model_patch.progress import Progress, no_progress
from polar_kernels.errors import PolarError

_PROCESS = Path(__file__).with_name("vllm_process.py")
_ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen3_5": "Qwen3_5ForConditionalGeneration"}
_MAX_ERROR = 0.3  # of log-probabilities; what is computed wrong has more than 1
_COMPARED = 4  # requests of each number
_LOG_LINES = 150

# A tower that vLLM is told to leave out: none of its sizes matters but that of its output.
_VISION = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "num_position_embeddings": 16}


class EngineError(PolarError):
    """vLLM did not start, or did not end; the message has the end of what it wrote."""


@dataclass(frozen=True)
class Load:
    """What an engine is asked for. requests: at a time; prompt: tokens of each; short and long: tokens that each
    writes, whose difference in time is that of decoding alone; runs: of both; eager: without CUDA graphs; memory: what
    vLLM may take of the GPU's."""

    requests: tuple[int, ...] = (1, 8, 32, 128)
    prompt: int = 128
    short: int = 16
    long: int = 272
    runs: int = 5
    eager: bool = False
    memory: float = 0.85


QUICK = Load(requests=(1, 4), prompt=32, short=4, long=12, runs=2, eager=True, memory=0.3)


@dataclass(frozen=True)
class EngineMeasurement:
    """tokens_per_second: of all requests together, median of the runs, None where the tokens are wrong; deviation:
    between them; error: of the log-probabilities of generated tokens against transformers' over the same checkpoint,
    relative to how much logits differ, None of random bf16 weights, which are nowhere but in vLLM; ratio: of the
    tokens a second to those of bf16; start_seconds: of the engine."""

    provider: str
    requests: int
    weight_bytes: int
    error: float | None
    tokens_per_second: float | None
    deviation: float | None
    ratio: float | None
    start_seconds: float


def engine_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of a model that every supported vLLM knows, with the language model of `config`.

    Raises UnsupportedModelError for another model than dense Qwen3 and Qwen3.5.
    """
    if config.model_type == "qwen3_5_text":  # 0.26 knows Qwen3.5 with a vision tower only
        vision = _VISION | {"out_hidden_size": config.hidden_size}
        head = config.tie_word_embeddings
        text = config.to_dict() | {"mamba_ssm_dtype": "float32"}  # as published ones say, for vLLM
        config = Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=head)
    if config.model_type not in _ARCHITECTURES:
        raise UnsupportedModelError(
            f"polar bench vllm --engine knows dense Qwen3 and Qwen3.5, found model_type {config.model_type!r}"
        )
    config.architectures = [_ARCHITECTURES[config.model_type]]
    config.dtype = torch.bfloat16
    return config


def check_vllm() -> None:
    """Raise ConfigError where there is no vLLM."""
    if find_spec("vllm") is None:
        raise ConfigError("polar bench vllm --engine runs vLLM, which is not installed: pip install vllm")


def run(
    config: PreTrainedConfig, load: Load | None = None, bits: int = 5, progress: Progress = no_progress
) -> list[EngineMeasurement]:
    """Measurements of bf16 and of 5 bits for each number of requests.

    The checkpoint goes to a temporary folder. Raises EngineError where vLLM fails.
    """
    load = load or Load()
    shape = engine_config(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        plain, quantized = root / "bfloat16", root / "polar"
        progress(0, 4, "bfloat16")
        shape.save_pretrained(plain)
        nothing: dict[int, float | None] = dict.fromkeys(load.requests)
        measured = measurements("bfloat16", plain_bytes(shape), run_engine(plain, load, dummy=True), nothing, {})
        baseline = {row.requests: row.tokens_per_second for row in measured if row.tokens_per_second}
        progress(1, 4, f"a random model of {bits} bits")
        nbytes = write_random(shape, bits, device, quantized)
        progress(2, 4, f"polar {bits}-bit")
        result = run_engine(quantized, load)
        progress(3, 4, "transformers over the same checkpoint")
        errors = compare(quantized, result, device)
        measured += measurements(f"polar {bits}-bit", nbytes, result, errors, baseline)
        progress(4, 4, "done")
    return measured


def plain_bytes(config: PreTrainedConfig) -> int:
    """Of all weights in bf16, but for the vision tower's."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config.get_text_config())
    return 2 * sum(parameter.numel() for parameter in model.parameters())


def write_random(config: PreTrainedConfig, bits: int, device: torch.device, folder: Path) -> int:
    """Write a quantised checkpoint with random weights; returns its bytes, but for the vision tower's."""
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model = random_model(deepcopy(config), bits, device, auto=auto)  # which is marked as quantised
    attach_quantizer(model, PolarQuantConfig(bits=bits, awq=True))
    model.save_pretrained(folder)
    state = model.state_dict()
    del model
    return sum(tensor.nbytes for name, tensor in state.items() if ".visual." not in name)


def run_engine(folder: Path, load: Load, dummy: bool = False) -> dict[str, Any]:
    """What `vllm_process.py` found. dummy: random weights of vLLM's own, for want of files.

    Raises EngineError.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as place:
        out, log = Path(place) / "result.json", Path(place) / "log"
        job = asdict(load) | {"folder": str(folder), "dummy": dummy, "compared": _COMPARED}
        # -P: without this folder on the path, whose modules have names that others have too
        command = [sys.executable, "-P", str(_PROCESS), json.dumps(job), str(out)]
        with log.open("wb") as file:
            code = subprocess.run(command, stdout=file, stderr=file, env=_environment(), check=False).returncode
        if not out.is_file():
            lines = log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
            raise EngineError("\n".join([f"vLLM ended with {code} over {folder.name}; it wrote at last:", *lines]))
        return json.loads(out.read_text())


def _environment() -> dict[str, str]:
    ours = {
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # not used for what is greedy, but asked for even where it is not installed
    }
    return {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | ours


@torch.inference_mode()
def compare(folder: Path, result: dict[str, Any], device: torch.device) -> dict[int, float | None]:
    """Requests at a time -> the error of the log-probabilities that vLLM gave to its tokens."""
    model = load_model(folder, device=device, dtype=torch.bfloat16)
    errors: dict[int, float | None] = {}
    for point in result["points"]:
        ids = torch.tensor([p + new for p, new in zip(point["prompts"], point["tokens"], strict=True)], device=device)
        new = torch.tensor(point["tokens"], device=device)
        kept = new.shape[1] + 1  # the last is the prediction of a token that is not there
        logits = model(input_ids=ids, logits_to_keep=kept, use_cache=False).logits[:, :-1].float()
        expected = logits.log_softmax(-1).gather(-1, new[..., None])[..., 0]
        difference = torch.tensor(point["logprobs"], device=device) - expected
        errors[point["requests"]] = float(difference.square().mean().sqrt() / logits.std(-1).mean())
    return errors


def measurements(
    provider: str,
    weight_bytes: int,
    result: dict[str, Any],
    errors: dict[int, float | None],
    baseline: dict[int, float],
) -> list[EngineMeasurement]:
    """Rows of what an engine found. baseline: requests -> tokens a second of bf16; its own where it is empty."""
    rows = []
    for point in result["points"]:
        count = point["requests"]
        error = errors[count]
        good = error is None or error <= _MAX_ERROR
        rates = [count * point["steps"] / (long - short) for short, long in point["seconds"]] if good else []
        rate = median(rates) if rates else None
        deviation = stdev(rates) if rates else None
        known = baseline.get(count) if baseline else rate
        ratio = rate / known if rate and known else None
        rows.append(
            EngineMeasurement(provider, count, weight_bytes, error, rate, deviation, ratio, result["start_seconds"])
        )
    return rows


COLUMNS = ["provider", "requests", "tokens/s", "this / bf16", "ms a step", "weights", "error", "started in"]


def table(measured: Sequence[EngineMeasurement]) -> list[list[str]]:
    """Rows for people."""
    return [
        [
            m.provider,
            str(m.requests),
            "-" if m.tokens_per_second is None else f"{m.tokens_per_second:.0f} +- {m.deviation:.0f}",
            "-" if m.ratio is None else f"{m.ratio:.2f}",
            "-" if m.tokens_per_second is None else f"{m.requests / m.tokens_per_second * 1e3:.2f}",
            f"{m.weight_bytes / 1e9:.2f} GB",
            "-" if m.error is None else f"{m.error:.1%}",
            f"{m.start_seconds:.0f} s",
        ]
        for m in measured
    ]
