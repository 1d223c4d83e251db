"""Whole models: time to read a prompt and to write tokens, and the memory both take."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from polar_bench.random_model import random_model
from transformers import PreTrainedConfig, PreTrainedModel

from model_patch.groups import group_projections
from model_patch.progress import Progress, no_progress

PREFILL = (512, 2048, 8192)
DECODE_CONTEXTS, BATCHES = (128, 2048, 8192), (1, 4, 16)
_RUNS = 5
_STEPS = 32  # tokens a run of decoding writes


@dataclass(frozen=True)
class ModelMeasurement:
    """phase: prefill or decode. tokens_per_second: of the whole batch, mean over the runs; deviation: between them.
    weight_bytes: of all parameters and buffers; peak_bytes: allocated on the GPU at the most, None on a CPU;
    load_seconds: to build the model."""

    model: str
    provider: str
    phase: str
    context: int
    batch: int
    tokens_per_second: float
    deviation: float
    weight_bytes: int
    peak_bytes: int | None
    load_seconds: float


Make = Callable[[], PreTrainedModel]


def providers(config: PreTrainedConfig, bits: int, device: torch.device, dtype: torch.dtype) -> dict[str, Make]:
    """Name -> what builds the model: ours, ours with grouped projections, and the plain one."""

    def grouped() -> PreTrainedModel:
        model = random_model(config, bits, device, dtype)
        group_projections(model)
        return model

    return {
        f"polar {bits}-bit": lambda: random_model(config, bits, device, dtype),
        f"polar {bits}-bit, grouped": grouped,
        str(dtype).removeprefix("torch."): lambda: random_model(config, None, device, dtype),
    }


def run(
    name: str,
    makes: dict[str, Make],
    *,
    prefill: Sequence[int] = PREFILL,
    contexts: Sequence[int] = DECODE_CONTEXTS,
    batches: Sequence[int] = BATCHES,
    progress: Progress = no_progress,
) -> list[ModelMeasurement]:
    """Each provider's model built, measured and freed, one after the other."""
    results: list[ModelMeasurement] = []
    total = len(makes) * (len(prefill) + len(contexts) * len(batches))
    for provider, make in makes.items():
        started = time.perf_counter()
        model = make()
        _finish(model.device)
        loaded = time.perf_counter() - started
        points = [("prefill", context, 1) for context in prefill]
        points += [("decode", context, batch) for context in contexts for batch in batches]
        for phase, context, batch in points:
            rates, peak = _rates(model, phase, context, batch)
            deviation = statistics.stdev(rates) if len(rates) > 1 else 0.0
            results.append(
                ModelMeasurement(
                    name,
                    provider,
                    phase,
                    context,
                    batch,
                    statistics.mean(rates),
                    deviation,
                    weight_bytes(model),
                    peak,
                    loaded,
                )
            )
            progress(len(results), total, f"{provider}: {phase} {context} x {batch}")
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results


COLUMNS = ["provider", "phase", "context", "batch", "tokens/s", "weights", "peak", "built in"]


def table(measurements: Sequence[ModelMeasurement]) -> list[list[str]]:
    """Rows for people."""
    return [
        [
            m.provider,
            m.phase,
            str(m.context),
            str(m.batch),
            f"{m.tokens_per_second:.1f} +- {m.deviation:.1f}",
            f"{m.weight_bytes / 1e9:.2f} GB",
            "-" if m.peak_bytes is None else f"{m.peak_bytes / 1e9:.2f} GB",
            f"{m.load_seconds:.1f} s",
        ]
        for m in measurements
    ]


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the storages of all parameters and buffers, those that several share once."""
    storages = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@torch.inference_mode()
def _rates(model: PreTrainedModel, phase: str, context: int, batch: int) -> tuple[list[float], int | None]:
    """Tokens a second of each run after a first one that is not counted, and the most bytes allocated meanwhile."""
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    ids = torch.randint(0, model.config.vocab_size, (batch, context), device=model.device)
    measure = _prefill if phase == "prefill" else _decode
    rates = [measure(model, ids) for _ in range(_RUNS + 1)][1:]
    return rates, torch.cuda.max_memory_allocated(model.device) if on_gpu else None


def _prefill(model: PreTrainedModel, ids: torch.Tensor) -> float:
    _finish(ids.device)
    started = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    _finish(ids.device)
    return ids.numel() / (time.perf_counter() - started)


def _decode(model: PreTrainedModel, ids: torch.Tensor) -> float:
    out = model(ids, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    _finish(ids.device)
    started = time.perf_counter()
    for _ in range(_STEPS):
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    _finish(ids.device)
    return _STEPS * len(ids) / (time.perf_counter() - started)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
