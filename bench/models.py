"""Whole models: time to read a prompt and to write tokens, time to load, and the memory they take."""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev

import torch
from polar_bench.model_phases import LONG_STEPS, STEPS, finish, measure_load, measure_phase
from polar_bench.random_model import random_model
from polar_bench.step_profile import KindOfWork, profile_step
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from model_patch.checkpoint.reader import read_config
from model_patch.config import PolarQuantConfig
from model_patch.decode import accelerate, decelerate
from model_patch.errors import UnsupportedModelError
from model_patch.load import find_checkpoint, load_model, quantization_config
from model_patch.patch import dequantize_model, patch_model
from model_patch.progress import Progress, no_progress

PREFILL = (512, 2048, 8192)
DECODE_CONTEXTS, BATCHES = (128, 2048, 8192), (1, 4, 16)
_RUNS = 3
_PLAIN_STEPS = 8  # of decoding a run without accelerate, which takes long

Point = tuple[str, int, int]  # phase, context, batch


@dataclass(frozen=True)
class ModelMeasurement:
    """phase: prefill, a prompt through the model; first token, the same through `generate`; decode, the tokens that it
    writes beyond the first, by their arrival; generate, a prompt and 512 tokens, with a cache for no more; load, from
    files that the host has in memory. tokens_per_second: of the whole batch, of the prompt where none but the first
    token is written, mean over the runs; deviation: between them; None of load. weight_bytes: of all parameters and
    buffers; read_bytes: of those that a step reads; peak_bytes: allocated on the GPU at the most, None on a CPU;
    load_seconds: to build the model, and to accelerate it; of load, to load it."""

    model: str
    provider: str
    phase: str
    context: int
    batch: int
    tokens_per_second: float | None
    deviation: float | None
    weight_bytes: int
    read_bytes: int
    peak_bytes: int | None
    load_seconds: float


Make = Callable[[], PreTrainedModel]


def providers(
    config: PreTrainedConfig, bits: int, device: torch.device, dtype: torch.dtype, plain: bool = True
) -> dict[str, Make]:
    """Name -> what builds the model: ours, and the plain one if asked for."""
    makes: dict[str, Make] = {f"polar {bits}-bit": lambda: random_model(config, bits, device, dtype)}
    if plain:
        makes[str(dtype).removeprefix("torch.")] = lambda: random_model(config, None, device, dtype)
    return makes


def checkpoint_providers(
    source: str, bits: int, device: torch.device, dtype: torch.dtype, plain: bool = True
) -> dict[str, Make]:
    """The same with a checkpoint's own weights: a quantised one as it is and dequantised, a plain one quantised by
    least squares and as it is. bits: of the latter."""
    folder = find_checkpoint(source)
    stored = quantization_config(read_config(folder))

    def load() -> PreTrainedModel:
        return load_model(folder, device=device, dtype=dtype)

    def quantized() -> PreTrainedModel:
        model = load()
        patch_model(model, PolarQuantConfig(bits=bits))
        return model

    def dense() -> PreTrainedModel:
        model = load()
        dequantize_model(model, dtype)
        return model

    name = str(dtype).removeprefix("torch.")
    if stored is None:
        makes = {f"polar {bits}-bit": quantized, name: load}
    else:
        makes = {f"polar {stored.bits}-bit": load, name: dense}
    return makes if plain else dict(list(makes.items())[:1])


@dataclass
class _Rows:
    """What has been measured of one model."""

    model: str
    runs: int
    total: int
    progress: Progress
    measured: list[ModelMeasurement] = field(default_factory=list)

    def measure(
        self, model: PreTrainedModel, provider: str, seconds: float, points: Sequence[Point], steps: int
    ) -> None:
        for phase, context, batch in points:
            try:
                rates, peak = measure_phase(model, phase, context, batch, self.runs, steps)
            except torch.OutOfMemoryError as error:
                what = f"{provider}: {phase} {context} x {batch}"
                warnings.warn(f"{what} is left out: {str(error).splitlines()[0]}", stacklevel=2)
                torch.cuda.empty_cache()
                continue
            self._add(model, provider, phase, context, batch, rates, peak, seconds)

    def measure_load(self, model: PreTrainedModel, provider: str) -> None:
        seconds, peak = measure_load(model, self.runs)
        self._add(model, provider, "load", 0, 0, [], peak, mean(seconds))

    def _add(
        self,
        model: PreTrainedModel,
        provider: str,
        phase: str,
        context: int,
        batch: int,
        rates: Sequence[float],
        peak: int | None,
        seconds: float,
    ) -> None:
        rate, deviation = (mean(rates), stdev(rates)) if rates else (None, None)
        sizes = weight_bytes(model), read_bytes(model, batch)
        row = ModelMeasurement(self.model, provider, phase, context, batch, rate, deviation, *sizes, peak, seconds)
        self.measured.append(row)
        self.progress(len(self.measured), self.total, f"{provider}: {phase} {context} x {batch}")


def run(
    name: str,
    makes: dict[str, Make],
    *,
    prefill: Sequence[int] = PREFILL,
    contexts: Sequence[int] = DECODE_CONTEXTS,
    batches: Sequence[int] = BATCHES,
    runs: int = _RUNS,
    load: bool = False,
    profile: bool = False,
    progress: Progress = no_progress,
) -> tuple[list[ModelMeasurement], list[KindOfWork]]:
    """Each provider's model built, measured and freed, one by one: prompts and decoding by `generate`, as it is
    and after `accelerate`, which groups projections too; with load, what is quantised saved and loaded as well; with
    profile, where the time of an accelerated step goes.

    Without it decoding is measured at the shortest context only: it takes the host's time, whatever the context. What
    cannot be measured is left out with a warning: a model or a batch that does not fit, one that accelerate does not
    take.
    """
    decoding = [("decode", context, batch) for context in contexts for batch in batches]
    prompts = [("prefill", context, 1) for context in sorted({*prefill, *contexts})]
    plain = prompts + [point for point in decoding if point[1] == min(contexts)]
    first = [("first token", context, 1) for context in contexts]
    total = len(makes) * (len(plain) + len(prompts) + len(first) + len(decoding) + 1) + load
    rows = _Rows(name, runs, total, progress)
    works: list[KindOfWork] = []
    for provider, make in makes.items():
        started = time.perf_counter()
        try:
            model = make()
        except torch.OutOfMemoryError as error:
            warnings.warn(f"{provider} is left out: {str(error).splitlines()[0]}", stacklevel=2)
            continue
        finish(model.device)
        built = time.perf_counter() - started
        rows.measure(model, provider, built, plain, _PLAIN_STEPS)
        if load and provider.startswith("polar"):
            rows.measure_load(model, provider)
        accelerated = f"{provider}, accelerated"
        try:
            seconds = built + _accelerate(model, min(contexts) + LONG_STEPS, 1)
            rows.measure(model, accelerated, seconds, [("generate", min(contexts), 1)], STEPS)
            decelerate(model)
            _accelerate(model, max(contexts) + STEPS + 1, max(batches))
            rows.measure(model, accelerated, seconds, prompts + first + decoding, STEPS)
        except UnsupportedModelError as error:
            warnings.warn(f"{accelerated}, is left out: {error}", stacklevel=2)
        else:
            if profile:
                works += [work for batch in (1, max(batches)) for work in profile_step(model, provider, batch)]
            decelerate(model)
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return rows.measured, works


def _accelerate(model: PreTrainedModel, max_length: int, batch_size: int) -> float:
    """Seconds that it takes."""
    started = time.perf_counter()
    accelerate(model, max_length=max_length, batch_size=batch_size)
    finish(model.device)
    return time.perf_counter() - started


COLUMNS = ["provider", "phase", "context", "batch", "tokens/s", "GB/s", "weights", "peak", "built or loaded in"]


def table(measurements: Sequence[ModelMeasurement]) -> list[list[str]]:
    """Rows for people; GB/s are those at which decoding reads the weights, once a step."""
    return [
        [
            m.provider,
            m.phase,
            str(m.context) if m.context else "-",
            str(m.batch) if m.batch else "-",
            "-" if m.tokens_per_second is None else f"{m.tokens_per_second:.1f} +- {m.deviation:.1f}",
            f"{m.read_bytes * m.tokens_per_second / m.batch / 1e9:.0f}"
            if m.phase == "decode" and m.tokens_per_second is not None
            else "-",
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
    config = model.config.get_text_config()
    if not (model.config.tie_word_embeddings or config.tie_word_embeddings):
        read -= weight_bytes(model.get_input_embeddings())
    for name, module in model.named_modules():
        if name.endswith(".mlp.experts"):
            left_out = (1 - config.num_experts_per_tok / config.num_experts) ** batch
            read -= round(left_out * weight_bytes(module))
    return read
