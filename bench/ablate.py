"""What each part of the scheme gives: a model's weights quantised step by step, and what the model then predicts.

Every variant is evaluated by its dequantised weights in one dense model.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from polar_bench.variants import FULL, VARIANTS, Variant
from transformers import PreTrainedModel

from model_patch.architectures import Kind, LayerPlan, kind_of, weight_name
from model_patch.config import PolarQuantConfig
from model_patch.evaluate import Evaluation, Reference, check_vocabulary, evaluate, text_windows, windows_at_a_time
from model_patch.logits_cache import LogitsCache, MemoryCache, cache_bytes
from model_patch.progress import Progress, no_progress
from model_patch.quantize import (
    Calibrated,
    QuantizePlan,
    SiteStatistics,
    Target,
    calibrate,
    plan_checkpoint,
    plan_for_target,
    search_awq_scales,
)
from model_patch.quantize.awq import search_expert_scales
from model_patch.quantize.moments import collect_moments
from model_patch.quantize.sensitivity import MEASURED_WINDOWS, measure_parts_of
from model_patch.quantize.storage import free_memory

# The embedding stays as it is: no calibration speaks of it.
EXCLUDED = ("embed_tokens",)

_SHARE = 0.5  # of the free memory that predictions may take

Sites = dict[str, list[str]]


@dataclass(frozen=True)
class Measurement:
    """bits_per_weight: of the quantised layers, codes, norms and scales together; bits: 0 for the original, whose
    variant is the dtype of its weights; uniform: or else a mean, each layer having its own."""

    variant: str
    bits: float
    bits_per_weight: float
    evaluation: Evaluation
    uniform: bool = True


@dataclass(frozen=True)
class Step:
    """One measurement to be made."""

    variant: Variant
    bits: float
    plan: QuantizePlan
    uniform: bool = True


@dataclass(frozen=True)
class Calibration:
    """By input site: what the AWQ search and error feedback need. rare_experts: as in `Calibrated`."""

    statistics: dict[str, SiteStatistics]
    moments: dict[str, torch.Tensor]
    rare_experts: dict[str, list[int]] = field(default_factory=dict)


def plans(source: Path, bits: Sequence[int]) -> dict[int, QuantizePlan]:
    """Bits -> the plan of a checkpoint whose linear layers, experts among them, are all quantised so."""
    return {b: plan_checkpoint(source, PolarQuantConfig(b, modules_to_not_convert=EXCLUDED), awq=False) for b in bits}


def calibrate_sites(
    model: PreTrainedModel, batch: torch.Tensor, sites: Sites, progress: Progress = no_progress
) -> Calibration:
    """Both of token windows `batch` [W, T]."""
    check_vocabulary(batch, model)
    statistics = calibrate(model, batch, sites, lambda done, total, what: progress(done, 3 * total, what))
    told = lambda done, total, what: progress(total // 2 + done, 3 * total // 2, what)  # noqa: E731
    moments = collect_moments(model, batch, sites, told)
    return Calibration(statistics, moments.of_site, moments.rare_experts)


def choose_plans(
    model: PreTrainedModel,
    plans: Mapping[int, QuantizePlan],
    targets: Sequence[Target],
    calibration: Calibration,
    batch: torch.Tensor,
    progress: Progress = no_progress,
) -> dict[float, QuantizePlan]:
    """Target bits -> the plan with bits of each layer's own, as `polar quantize --target-bits` chooses them.

    plans: uniform ones, of each target's `start` among others; batch: calibration windows [W, T].
    """
    found: dict[float, QuantizePlan] = {}
    for target in targets:
        plan = plans[target.start]
        moments = {n: calibration.moments[site] for site, names in plan.layers.sites().items() for n in names}
        parts = measure_parts_of(model, plan, {}, Calibrated(moments=moments), batch[:MEASURED_WINDOWS], progress)
        assert target.bits is not None  # there are no others here
        found[target.bits] = plan_for_target(plan, {}, target, parts)
    return found


def keep_predictions(
    model: PreTrainedModel, tokens: torch.Tensor, window: int, limit: int | None, scratch: Path
) -> Reference:
    """The original's, for scoring windows side by side: in memory, or in the folder `scratch` where they are large."""
    windows = text_windows(tokens, window, limit)
    vocabulary = model.config.get_text_config().vocab_size
    if cache_bytes(len(windows), window, vocabulary) < _SHARE * free_memory(model.device):
        return MemoryCache(model, windows)
    return LogitsCache(scratch, tokens, lambda: model)


def run(
    model: PreTrainedModel,
    calibration: Calibration,
    tokens: torch.Tensor,
    reference: Reference,
    steps: Sequence[Step],
    *,
    window: int = 512,
    limit: int | None = None,
    progress: Progress = no_progress,
) -> list[Measurement]:
    """The original, and every step; `model` is the original and is left as it was.

    reference: its predictions for `tokens`, which are scored in windows side by side.
    """
    windows = len(range(0, len(tokens) - window + 1, window)[:limit])
    copy, at_a_time = deepcopy(model), windows_at_a_time(model, window)

    def score(index: int, name: str) -> Evaluation:
        told = partial(_report, progress, index * windows, (len(steps) + 1) * windows, name)
        return evaluate(
            copy, tokens, window=window, limit=limit, reference=reference, batch_size=at_a_time, progress=told
        )

    name, size = original_weights(steps[0].plan)
    results = [Measurement(name, 0, size, score(0, name))]
    for index, step in enumerate(steps):
        for name, weight in quantized_weights(model, step.variant, step.plan.layers, calibration):
            copy.get_parameter(weight_name(name)).data.copy_(weight)
        size = bits_per_weight(step.plan, step.variant.awq)
        found = score(index + 1, f"{step.variant.name}, {step.bits} bits")
        results.append(Measurement(step.variant.name, step.bits, size, found, step.uniform))
    return results


def steps_of(
    plans: Mapping[int, QuantizePlan],
    bits: Sequence[int],
    mixed: Mapping[float, QuantizePlan],
    variants: Sequence[Variant],
) -> list[Step]:
    """Every variant at all `bits`; each plan of mixed ones with `FULL`, as is that of the whole bits below its mean."""
    steps = [Step(variant, b, plans[b]) for b in bits for variant in variants]
    full = next(variant for variant in VARIANTS if variant.name == FULL)
    for mean, plan in mixed.items():
        below = Step(full, int(mean), plans[int(mean)])
        steps += [*([] if below in steps else [below]), Step(full, mean, plan, uniform=False)]
    return steps


@torch.no_grad()
def quantized_weights(
    model: PreTrainedModel, variant: Variant, layers: LayerPlan, calibration: Calibration
) -> Iterator[tuple[str, torch.Tensor]]:
    """Layer -> what `variant` leaves of its weight, of all layers that read a site."""
    without_moments = lambda weight, b, scales: variant.quantize(weight, b, scales, None)  # noqa: E731
    for site, names in layers.sites().items():
        weights = [model.get_parameter(weight_name(name)) for name in names]
        bits = [layers.bits[name] for name in names]
        moments = calibration.moments[site] if variant.feedback else None
        scales = None
        if variant.awq and kind_of(names[0]) is Kind.EXPERTS:
            scales, _ = search_expert_scales(calibration.statistics[site], weights[0], bits[0], without_moments)
        elif variant.awq:
            scales, _ = search_awq_scales(calibration.statistics[site], weights, bits, without_moments)
        for name, weight, b in zip(names, weights, bits, strict=True):
            yield name, variant.quantize(weight, b, scales, moments)


def original_weights(plan: QuantizePlan) -> tuple[str, float]:
    """Of the quantised layers as they were: dtypes, as in "bf16", and bits a weight."""
    weights = [plan.source.tensors[weight_name(plan.names[name])] for name in plan.layers.bits]
    names = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights})
    bits = 8 * sum(weight.nbytes for weight in weights) / sum(math.prod(weight.shape) for weight in weights)
    return ", ".join(name.replace("bfloat", "bf").replace("float", "fp") for name in names), bits


def bits_per_weight(plan: QuantizePlan, awq: bool) -> float:
    """Of the quantised layers, stored as the format has them; `awq`: with scales."""
    shapes = [plan.source.tensors[weight_name(plan.names[name])].shape for name in plan.layers.bits]
    stored = sum(plan.layer_bytes(name)[1] for name in plan.layers.bits) + sum(2 * shape[-1] for shape in shapes) * awq
    return 8 * stored / sum(math.prod(shape) for shape in shapes)


def _report(progress: Progress, before: int, total: int, name: str, done: int, _: int, __: str) -> None:
    progress(before + done, total, name)
