"""How each phase of a whole model is timed: prompts, first tokens, tokens after them, and loading."""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from model_patch import PolarQuantConfig, load_model
from model_patch.hf import attach_quantizer
from polar_kernels import PolarModule

STEPS = 32  # tokens a run of decoding writes beyond the first
LONG_STEPS = 512  # tokens a run of generating writes


@torch.inference_mode()
def measure_phase(
    model: PreTrainedModel, phase: str, context: int, batch: int, runs: int, steps: int
) -> tuple[list[float], int | None]:
    """Tokens a second of each run after a first one that is not counted, and the most bytes allocated meanwhile.

    steps: of decoding.
    """
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (batch, context), device=model.device)
    run = partial(_decode, steps=steps) if phase == "decode" else _PHASES[phase]
    rates = [run(model, ids) for _ in range(runs + 1)][1:]
    return rates, torch.cuda.max_memory_allocated(model.device) if on_gpu else None


def measure_load(model: PreTrainedModel, runs: int) -> tuple[list[float], int | None]:
    """Seconds of each run of loading a quantised model from files that were just written, after a first one that is not
    counted, and the most bytes that the GPU held for it at a time."""
    device = model.device
    if getattr(model, "hf_quantizer", None) is None:  # a random one, built without
        attach_quantizer(model, PolarQuantConfig(bits=_bits(model), awq=True))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        found = [_load(Path(folder), device, model.dtype) for _ in range(runs + 1)][1:]
    peaks = [peak for _, peak in found if peak is not None]
    return [seconds for seconds, _ in found], max(peaks, default=None)


def _bits(model: PreTrainedModel) -> int:
    return next(module.bits for module in model.modules() if isinstance(module, PolarModule))


def _load(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[float, int | None]:
    """Seconds, and bytes beyond those that were allocated before."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    started = time.perf_counter()
    load_model(folder, device=device, dtype=dtype)
    finish(device)
    seconds = time.perf_counter() - started
    return seconds, torch.cuda.max_memory_allocated(device) - before if on_gpu else None


def _prefill(model: PreTrainedModel, ids: torch.Tensor) -> float:
    finish(ids.device)
    started = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    finish(ids.device)
    return ids.numel() / (time.perf_counter() - started)


def _first_token(model: PreTrainedModel, ids: torch.Tensor) -> float:
    return ids.numel() / _generate(model, ids, 1)


def _decode(model: PreTrainedModel, ids: torch.Tensor, steps: int) -> float:
    """From the first token's arrival at the host to the last one's, so that the prompt is not in it."""
    clock = _Clock()
    _generate(model, ids, steps + 1, clock)
    _, first, *_, last = clock.times  # the prompt's own comes before
    return steps * len(ids) / (last - first)


class _Clock(BaseStreamer):
    """When tokens arrived."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _long(model: PreTrainedModel, ids: torch.Tensor) -> float:
    return LONG_STEPS * len(ids) / _generate(model, ids, LONG_STEPS)


def _generate(model: PreTrainedModel, ids: torch.Tensor, tokens: int, clock: _Clock | None = None) -> float:
    """Seconds of a call that writes so many."""
    mask = torch.ones_like(ids)
    finish(ids.device)
    started = time.perf_counter()
    model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        streamer=clock,
    )
    finish(ids.device)
    return time.perf_counter() - started


def finish(device: torch.device) -> None:
    """Wait for what the device has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


_PHASES: dict[str, Callable[[PreTrainedModel, torch.Tensor], float]] = {
    "prefill": _prefill,
    "first token": _first_token,
    "generate": _long,
}
