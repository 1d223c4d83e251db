"""Bits for a target: what each input site's quantisation costs, measured, and the plan that this and a budget give.

Layers that read the same activation get the same bits, so that engines can still make one product of them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from model_patch.architectures import weight_name
from model_patch.config import PolarQuantConfig, matches
from model_patch.errors import ConfigError
from model_patch.evaluate import evaluate, windows_at_a_time
from model_patch.logits_cache import MemoryCache
from model_patch.progress import Progress, no_progress
from model_patch.quantize.budget import LARGEST, SMALLEST, Part, choose_bits
from model_patch.quantize.calibrated import Calibrated, calibration_batch, load_for_calibration
from model_patch.quantize.checkpoint import QuantizePlan, plan_checkpoint, quantize_layer
from polar_kernels import ops

MEASURED_WINDOWS = 8  # of the calibration text; a divergence is far steadier from window to window than a perplexity


@dataclass(frozen=True)
class Target:
    """Exactly one of the two. bits: mean over the weights of all quantised layers, norms and scales not counted, as in
    `bits` of a layer. size: bytes of all tensors together.

    Raises ConfigError for bits outside 3 to 8.
    """

    bits: float | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.size is None):
            raise ConfigError("a target is either bits or a size")
        if self.bits is not None and not SMALLEST <= self.bits <= LARGEST:
            raise ConfigError(f"target bits must be from {SMALLEST} to {LARGEST}, found {self.bits}")

    @property
    def start(self) -> int:
        """Bits to calibrate and measure at."""
        return 4 if self.bits is None else int(self.bits)

    def budget(self, plan: QuantizePlan) -> int:
        """Bytes for the codes of all quantised layers."""
        if self.size is not None:
            return self.size - (plan.output_bytes - sum(plan.code_bytes(name) for name in plan.layers.bits))
        assert self.bits is not None
        return int(self.bits * sum(plan.code_bytes(name) // bits for name, bits in plan.layers.bits.items()))


def measure_parts(
    plan: QuantizePlan,
    fixed: Iterable[str],
    calibrated: Calibrated,
    text: Path,
    device: torch.device | str,
    *,
    progress: Progress = no_progress,
) -> dict[str, Part]:
    """What quantising each input site as planned costs on the beginning of a text; a layer without one is by itself.

    fixed: patterns of layers that are left out, since their bits are given. calibrated: of the plan.
    """
    batch = calibration_batch(plan.source.where, text, MEASURED_WINDOWS)
    return measure_parts_of(load_for_calibration(plan.source.where, device), plan, fixed, calibrated, batch, progress)


def measure_parts_of(
    model: PreTrainedModel,
    plan: QuantizePlan,
    fixed: Iterable[str],
    calibrated: Calibrated,
    batch: torch.Tensor,
    progress: Progress = no_progress,
) -> dict[str, Part]:
    """The same of the loaded model, which is left as it was, on token windows `batch` [W, T]."""
    given = _named(plan, fixed)
    layers = {part: [name for name in names if name not in given] for part, names in _parts(plan).items()}
    layers = {part: names for part, names in layers.items() if names}
    losses = measure_losses(model, plan, layers, calibrated, batch, progress)
    per_bit = {name: plan.code_bytes(name) // bits for name, bits in plan.layers.bits.items()}
    return {
        part: Part(losses[part], plan.config.bits, sum(per_bit[name] for name in names), tuple(names))
        for part, names in layers.items()
    }


def plan_for_target(
    plan: QuantizePlan, fixed: Mapping[str, int], target: Target, parts: Mapping[str, Part]
) -> QuantizePlan:
    """The plan of the same checkpoint that keeps within `target` at the smallest loss.

    fixed: patterns of layers whose bits are given, as in `bits_per_layer`. parts: what `measure_parts` found.
    Raises ConfigError for a target that cannot be met.
    """
    taken = sum(plan.code_bytes(name) for name in _named(plan, fixed))
    chosen = choose_bits(parts, target.budget(plan) - taken)
    layers = {name: chosen[key] for key, part in parts.items() for name in part.layers}
    config = PolarQuantConfig(plan.config.bits, {**fixed, **layers}, plan.config.modules_to_not_convert)
    return plan_checkpoint(plan.source.where, config, plan.config.awq, plan.source)


def _named(plan: QuantizePlan, patterns: Iterable[str]) -> set[str]:
    patterns = list(patterns)
    return {name for name in plan.layers.bits if any(matches(pattern, name) for pattern in patterns)}


def _parts(plan: QuantizePlan) -> dict[str, list[str]]:
    """Input sites, and each layer without one by itself."""
    sites = plan.layers.sites()
    within = {name for names in sites.values() for name in names}
    return sites | {name: [name] for name in plan.layers.bits if name not in within}


def measure_losses(
    model: PreTrainedModel,
    plan: QuantizePlan,
    parts: Mapping[str, list[str]],
    calibrated: Calibrated,
    batch: torch.Tensor,
    progress: Progress = no_progress,
) -> dict[str, float]:
    """Part -> mean KL divergence, nats a token, that quantising its layers alone, as planned, causes on `batch` [W, T].

    The model is the original and is so again afterwards.
    """
    tokens, window = batch.flatten(), batch.shape[1]
    reference, at_a_time = MemoryCache(model, batch), windows_at_a_time(model, window)
    progress(1, len(parts) + 1, "the original")
    losses: dict[str, float] = {}
    for index, (part, names) in enumerate(parts.items()):
        with _quantized(model, plan, names, calibrated):
            found = evaluate(model, tokens, window=window, reference=reference, batch_size=at_a_time).kl_divergence
        assert found is not None  # there is a reference
        losses[part] = max(found, 0.0)  # which rounding may leave below
        progress(index + 2, len(parts) + 1, part)
    return losses


@contextmanager
def _quantized(
    model: PreTrainedModel, plan: QuantizePlan, names: Sequence[str], calibrated: Calibrated
) -> Iterator[None]:
    """The model with the weights of some layers as the plan would leave them."""
    weights = {name: model.get_parameter(weight_name(name)).data for name in names}
    originals = {name: weight.clone() for name, weight in weights.items()}
    try:
        for name, weight in weights.items():
            made = quantize_layer(
                plan.source,
                plan.names[name],
                plan.layers.bits[name],
                calibrated.awq_scales.get(name),
                calibrated.moments.get(name),
                weight.device,
            )
            parts = (made.packed, made.norms, made.awq_scales, made.centroids)
            weight.copy_(ops.dequantize(*parts, made.in_features, torch.float32).view_as(weight))
        yield
    finally:
        for name, weight in weights.items():
            weight.copy_(originals[name])
