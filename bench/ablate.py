"""What each part of the scheme gives: a model's weights quantised step by step, and what the model then predicts.

Every variant is evaluated by its dequantised weights in one dense model. Those that are in the format come from
`quantize_weight`, as `polar quantize` makes them; the others, baselines without rotation or Lloyd-Max levels, are
rounded here.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from model_patch.config import PolarQuantConfig
from model_patch.evaluate import Evaluation, Reference, check_vocabulary, evaluate
from model_patch.progress import Progress, no_progress
from model_patch.quantize import QuantizePlan, SiteStatistics, calibrate, plan_checkpoint, search_awq_scales
from model_patch.quantize.absmax import absmax_round
from model_patch.quantize.moments import collect_moments
from polar_kernels import lloyd_max_levels, ops, published_levels, quantize_weight
from polar_kernels.hadamard import BLOCK_SIZE, pad_blocks, transform_blocks

# The embedding stays as it is: no calibration speaks of it.
EXCLUDED = ("embed_tokens",)

# Weight [N, K] of any float dtype, bits, AWQ scales [K] or None, moments [K, K] or None -> fp32 [N, K].
Quantize = Callable[[torch.Tensor, int, torch.Tensor | None, torch.Tensor | None], torch.Tensor]
Sites = dict[str, list[str]]


@dataclass(frozen=True)
class Variant:
    """quantize: what is left of a weight; awq, feedback: whether it is given scales, searched for with the variant's
    own error, and moments."""

    name: str
    quantize: Quantize
    awq: bool = False
    feedback: bool = False


@dataclass(frozen=True)
class Measurement:
    """bits_per_weight: of the quantised layers, codes, norms and scales together; bits: 0 for the original, whose
    variant is the dtype of its weights."""

    variant: str
    bits: int
    bits_per_weight: float
    evaluation: Evaluation


@dataclass(frozen=True)
class Calibration:
    """By input site: what the AWQ search and error feedback need."""

    statistics: dict[str, SiteStatistics]
    moments: dict[str, torch.Tensor]


def _scaled(round_weight: Callable[[torch.Tensor, int], torch.Tensor]) -> Quantize:
    """A rounding of weights, after AWQ scales where there are some."""

    def quantize(weight: torch.Tensor, bits: int, scales: torch.Tensor | None, _: torch.Tensor | None) -> torch.Tensor:
        if scales is None:
            return round_weight(weight.float(), bits)
        return round_weight(weight.float() * scales.float(), bits) / scales.float()

    return quantize


def _rotated_absmax(weight: torch.Tensor, bits: int) -> torch.Tensor:
    return transform_blocks(absmax_round(transform_blocks(pad_blocks(weight)), bits))[:, : weight.shape[1]]


def _unrotated_lloyd_max(weight: torch.Tensor, bits: int) -> torch.Tensor:
    blocks = pad_blocks(weight).unflatten(-1, (-1, BLOCK_SIZE))
    deviation = blocks.norm(dim=-1, keepdim=True) / math.sqrt(BLOCK_SIZE)
    table = lloyd_max_levels(bits).to(weight.device)
    unit = blocks / deviation.clamp_min(torch.finfo(torch.float32).tiny)
    levels = table[torch.bucketize(unit, (table[1:] + table[:-1]) / 2)]
    return (levels * deviation).flatten(-2)[:, : weight.shape[1]]


def _polar(
    weight: torch.Tensor,
    bits: int,
    scales: torch.Tensor | None,
    moments: torch.Tensor | None,
    *,
    levels: Callable[[int], torch.Tensor] = lloyd_max_levels,
    least_squares: bool = False,
) -> torch.Tensor:
    made = quantize_weight(
        weight, bits, awq_scales=scales, centroids=levels(bits), least_squares=least_squares, moments=moments
    )
    parts = (made.packed, made.norms, made.awq_scales, made.centroids)
    return ops.dequantize(*parts, made.in_features, torch.float32)


_published = partial(_polar, levels=published_levels)
_whole = partial(_polar, least_squares=True)

BASELINE = "Hadamard + Lloyd-Max (published table) + AWQ"  # what the others are compared with
VARIANTS = (
    Variant("absmax", _scaled(absmax_round)),
    Variant("absmax + AWQ", _scaled(absmax_round), awq=True),
    Variant("Hadamard, uniform levels", _scaled(_rotated_absmax)),
    Variant("Lloyd-Max, no rotation", _scaled(_unrotated_lloyd_max)),
    Variant("Hadamard + Lloyd-Max (published table)", _published),
    Variant(BASELINE, _published, awq=True),
    Variant("Hadamard + Lloyd-Max", _polar),
    Variant("+ least-squares scale", _whole),
    Variant("+ least-squares scale + AWQ", _whole, awq=True),
    Variant("+ least-squares scale + error feedback", _whole, feedback=True),
    Variant("+ least-squares scale + AWQ + error feedback", _whole, awq=True, feedback=True),
)


def plans(source: Path, bits: Sequence[int]) -> dict[int, QuantizePlan]:
    """Bits -> the plan of a checkpoint whose linear layers are all quantised so."""
    return {b: plan_checkpoint(source, PolarQuantConfig(b, modules_to_not_convert=EXCLUDED), awq=False) for b in bits}


def calibrate_sites(
    model: PreTrainedModel, batch: torch.Tensor, sites: Sites, progress: Progress = no_progress
) -> Calibration:
    """Both of token windows `batch` [W, T]."""
    check_vocabulary(batch, model)
    total = 2 * len(batch)
    statistics = calibrate(model, batch, sites, lambda done, _, what: progress(done, total, what))
    moments = collect_moments(model, batch, sites, lambda done, _, what: progress(len(batch) + done, total, what))
    return Calibration(statistics, moments)


def run(
    model: PreTrainedModel,
    calibration: Calibration,
    tokens: torch.Tensor,
    reference: Reference,
    bits: dict[int, QuantizePlan],
    *,
    variants: Sequence[Variant] = VARIANTS,
    window: int = 512,
    limit: int | None = None,
    progress: Progress = no_progress,
) -> list[Measurement]:
    """The original, and every variant at all bits; `model` is the original and is left as it was.

    reference: its predictions for `tokens`, which are scored in windows side by side.
    """
    steps = [(variant, b) for b in bits for variant in variants]
    windows = len(range(0, len(tokens) - window + 1, window)[:limit])
    copy = deepcopy(model)

    def score(index: int, name: str) -> Evaluation:
        done = partial(_report, progress, index * windows, (len(steps) + 1) * windows, name)
        return evaluate(copy, tokens, window=window, limit=limit, reference=reference, progress=done)

    name, size = original_weights(next(iter(bits.values())))
    results = [Measurement(name, 0, size, score(0, name))]
    for index, (variant, b) in enumerate(steps):
        for name, weight in quantized_weights(model, variant, b, bits[b].layers.sites(), calibration):
            copy.get_submodule(name).weight.data.copy_(weight)
        size = bits_per_weight(bits[b], variant.awq)
        results.append(Measurement(variant.name, b, size, score(index + 1, f"{variant.name}, {b} bits")))
    return results


@torch.no_grad()
def quantized_weights(
    model: PreTrainedModel, variant: Variant, bits: int, sites: Sites, calibration: Calibration
) -> Iterator[tuple[str, torch.Tensor]]:
    """Layer -> what `variant` leaves of its weight, of all layers of `sites`."""
    without_moments = lambda weight, b, scales: variant.quantize(weight, b, scales, None)  # noqa: E731
    for site, names in sites.items():
        weights = [model.get_submodule(name).weight for name in names]
        moments = calibration.moments[site] if variant.feedback else None
        scales = None
        if variant.awq:
            widths = [bits] * len(weights)
            scales, _ = search_awq_scales(calibration.statistics[site], weights, widths, without_moments)
        yield from ((n, variant.quantize(w, bits, scales, moments)) for n, w in zip(names, weights, strict=True))


def original_weights(plan: QuantizePlan) -> tuple[str, float]:
    """Of the quantised layers as they were: dtypes, as in "bf16", and bits a weight."""
    weights = [plan.source.tensors[f"{plan.names[name]}.weight"] for name in plan.layers.bits]
    names = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights})
    bits = 8 * sum(weight.nbytes for weight in weights) / sum(math.prod(weight.shape) for weight in weights)
    return ", ".join(name.replace("bfloat", "bf").replace("float", "fp") for name in names), bits


def bits_per_weight(plan: QuantizePlan, awq: bool) -> float:
    """Of the quantised layers, stored as the format has them; `awq`: with scales."""
    weights = [plan.source.tensors[f"{plan.names[name]}.weight"].shape for name in plan.layers.bits]
    stored = sum(plan.layer_bytes(name)[1] for name in plan.layers.bits) + sum(2 * k for _, k in weights) * awq
    return 8 * stored / sum(n * k for n, k in weights)


def _report(progress: Progress, before: int, total: int, name: str, done: int, _: int, __: str) -> None:
    progress(before + done, total, name)
