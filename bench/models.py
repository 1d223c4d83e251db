"""Whole models: time to read a prompt and to write tokens, and the memory both take."""

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from polar_bench.random_model import random_model
from polar_bench.step_profile import KindOfWork, profile_step
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from model_patch.decode import accelerate, decelerate
from model_patch.errors import UnsupportedModelError
from model_patch.progress import Progress, no_progress

PREFILL = (512, 2048, 8192)
DECODE_CONTEXTS, BATCHES = (128, 2048, 8192), (1, 4, 16)
_RUNS = 3
_STEPS = 32  # tokens a run of decoding writes


@dataclass(frozen=True)
class ModelMeasurement:
    """phase: prefill or decode. tokens_per_second: of the whole batch, mean over the runs; deviation: between them.
    weight_bytes: of all parameters and buffers; read_bytes: of those that a step reads; peak_bytes: allocated on the
    GPU at the most, None on a CPU; load_seconds: to build the model, and to accelerate it."""

    model: str
    provider: str
    phase: str
    context: int
    batch: int
    tokens_per_second: float
    deviation: float
    weight_bytes: int
    read_bytes: int
    peak_bytes: int | None
    load_seconds: float


Make = Callable[[], PreTrainedModel]


def providers(config: PreTrainedConfig, bits: int, device: torch.device, dtype: torch.dtype) -> dict[str, Make]:
    """Name -> what builds the model: ours and the plain one."""
    return {
        f"polar {bits}-bit": lambda: random_model(config, bits, device, dtype),
        str(dtype).removeprefix("torch."): lambda: random_model(config, None, device, dtype),
    }


def run(
    name: str,
    makes: dict[str, Make],
    *,
    prefill: Sequence[int] = PREFILL,
    contexts: Sequence[int] = DECODE_CONTEXTS,
    batches: Sequence[int] = BATCHES,
    runs: int = _RUNS,
    profile: bool = False,
    progress: Progress = no_progress,
) -> tuple[list[ModelMeasurement], list[KindOfWork]]:
    """Each provider's model built, measured and freed, one by one: prompts and decoding by `generate`, as it is
    and after `accelerate`, which groups projections too; with profile, where the time of an accelerated step goes.

    What cannot be measured is left out with a warning: a model that does not fit, one that accelerate does not take.
    """
    results: list[ModelMeasurement] = []
    works: list[KindOfWork] = []
    decoding = [("decode", context, batch) for context in contexts for batch in batches]
    prompts = [("prefill", context, 1) for context in prefill]
    points = prompts + decoding
    total = 2 * len(makes) * len(points)

    def measure(model: PreTrainedModel, provider: str, seconds: float) -> None:
        for phase, context, batch in points:
            rates, peak = _rates(model, phase, context, batch, runs)
            results.append(
                ModelMeasurement(
                    name,
                    provider,
                    phase,
                    context,
                    batch,
                    statistics.mean(rates),
                    statistics.stdev(rates),
                    weight_bytes(model),
                    read_bytes(model, batch),
                    peak,
                    seconds,
                )
            )
            progress(len(results), total, f"{provider}: {phase} {context} x {batch}")

    for provider, make in makes.items():
        started = time.perf_counter()
        try:
            model = make()
        except torch.OutOfMemoryError as error:
            warnings.warn(f"{provider} is left out: {str(error).splitlines()[0]}", stacklevel=2)
            continue
        _finish(model.device)
        measure(model, provider, time.perf_counter() - started)
        started = time.perf_counter()
        try:
            accelerate(model, max_length=max(contexts) + _STEPS, batch_size=max(batches))
        except UnsupportedModelError as error:
            warnings.warn(f"{provider}, accelerated, is left out: {error}", stacklevel=2)
            del model
            continue
        _finish(model.device)
        seconds = results[-1].load_seconds + time.perf_counter() - started
        measure(model, f"{provider}, accelerated", seconds)
        if profile:
            works += [work for batch in (1, max(batches)) for work in profile_step(model, provider, batch)]
        decelerate(model)
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results, works


COLUMNS = ["provider", "phase", "context", "batch", "tokens/s", "GB/s", "weights", "peak", "built in"]


def table(measurements: Sequence[ModelMeasurement]) -> list[list[str]]:
    """Rows for people; GB/s are those at which decoding reads the weights, once a step."""
    return [
        [
            m.provider,
            m.phase,
            str(m.context),
            str(m.batch),
            f"{m.tokens_per_second:.1f} +- {m.deviation:.1f}",
            f"{m.read_bytes * m.tokens_per_second / m.batch / 1e9:.0f}" if m.phase == "decode" else "-",
            f"{m.weight_bytes / 1e9:.2f} GB",
            "-" if m.peak_bytes is None else f"{m.peak_bytes / 1e9:.2f} GB",
            f"{m.load_seconds:.1f} s",
        ]
        for m in measurements
    ]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the storages of all parameters and buffers, those that several share once."""
    storages = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def read_bytes(model: PreTrainedModel, batch: int = 1) -> int:
    """Weight bytes without what a step of `batch` tokens does not read: the embedding, of which it reads a row a token,
    unless it is the head too; and experts, of which tokens that choose evenly leave out this share."""
    read = weight_bytes(model)
    if not model.config.tie_word_embeddings:
        read -= weight_bytes(model.get_input_embeddings())
    for name, module in model.named_modules():
        if name.endswith(".mlp.experts"):
            left_out = (1 - model.config.num_experts_per_tok / model.config.num_experts) ** batch
            read -= round(left_out * weight_bytes(module))
    return read


@torch.inference_mode()
def _rates(model: PreTrainedModel, phase: str, context: int, batch: int, runs: int) -> tuple[list[float], int | None]:
    """Tokens a second of each run after a first one that is not counted, and the most bytes allocated meanwhile."""
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    ids = torch.randint(0, model.config.vocab_size, (batch, context), device=model.device)
    measure = _prefill if phase == "prefill" else _decode
    rates = [measure(model, ids) for _ in range(runs + 1)][1:]
    return rates, torch.cuda.max_memory_allocated(model.device) if on_gpu else None


def _prefill(model: PreTrainedModel, ids: torch.Tensor) -> float:
    _finish(ids.device)
    started = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    _finish(ids.device)
    return ids.numel() / (time.perf_counter() - started)


def _decode(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """From the time that more tokens take beyond the first, so that the prompt is not in it."""
    seconds = _generate(model, ids, _STEPS + 1) - _generate(model, ids, 1)
    return _STEPS * len(ids) / max(seconds, 1e-9)  # of a tiny model the noise can be more than the steps


def _generate(model: PreTrainedModel, ids: torch.Tensor, tokens: int) -> float:
    """Seconds of a call that writes so many."""
    mask = torch.ones_like(ids)
    _finish(ids.device)
    started = time.perf_counter()
    model.generate(
        ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    _finish(ids.device)
    return time.perf_counter() - started


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
