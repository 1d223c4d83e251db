"""AWQ: per-channel scales that spare the channels with large activations, one vector per input site.

s = mean|x|^a, normalised to geometric mean 1; the exponent a is the one that gives the smallest error of the site's
outputs on sampled activations, quantisation included. a = 0, no scaling, is always a candidate.
Source: J. Lin et al., AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, 2024.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from model_patch.errors import CheckpointError
from model_patch.evaluate import text_windows, tokenize_file
from model_patch.load import load_model, load_tokenizer
from model_patch.progress import Progress, no_progress
from model_patch.quantize.calibrate import SiteStatistics, calibrate
from model_patch.quantize.checkpoint import QuantizePlan
from model_patch.quantize.moments import collect_moments
from polar_kernels import quantize_weight, reference

WINDOW = 512  # tokens
EXPONENTS = tuple(step / 20 for step in range(21))
_ROWS = 1024  # of each weight, evenly spread, that the search looks at
_LIMIT = 1e4  # fp16 keeps scales within 1/LIMIT..LIMIT exact enough and far from its ends


@torch.no_grad()
def search_awq_scales(
    statistics: SiteStatistics, weights: Sequence[torch.Tensor], bits: Sequence[int]
) -> tuple[torch.Tensor, float]:
    """The best scales fp16 [K] for a site and their exponent.

    weights: the site's weights [N_i, K], on the device to search on; bits: of each.
    """
    device = weights[0].device
    sample = statistics.sample.to(device)
    rows = [weight[:: max(1, weight.shape[0] // _ROWS)][:_ROWS].float() for weight in weights]
    outputs = [sample @ weight.T for weight in rows]
    best, best_error = None, torch.inf
    for exponent in EXPONENTS:
        scales = _scales(statistics.mean_abs.to(device), exponent)
        error = sum(_error(sample, *args, scales) for args in zip(rows, outputs, bits, strict=True))
        if error < best_error:
            best, best_error = (scales, exponent), error
    assert best is not None  # the error of exponent 0 is finite
    return best


def calibrated_scales(
    plan: QuantizePlan, text: Path, device: torch.device | str, windows: int, progress: Progress = no_progress
) -> dict[str, torch.Tensor]:
    """Layer name in the model -> AWQ scales, from the first `windows` windows of 512 tokens of a text file.

    Loads the source model as a whole, in its own dtype on a GPU and in fp32 on a CPU.
    """
    model, batch = load_for_calibration(plan, text, device, windows)
    sites = plan.layers.sites()
    total = len(batch) + len(sites)
    statistics = calibrate(model, batch, sites, lambda done, _, what: progress(done, total, what))
    scales: dict[str, torch.Tensor] = {}
    for index, (site, names) in enumerate(sites.items()):
        weights = [model.get_submodule(name).weight for name in names]
        found, _ = search_awq_scales(statistics[site], weights, [plan.layers.bits[name] for name in names])
        scales |= dict.fromkeys(names, found)
        progress(len(batch) + index + 1, total, site)
    return scales


def calibrated_moments(
    plan: QuantizePlan, text: Path, device: torch.device | str, windows: int, progress: Progress = no_progress
) -> dict[str, torch.Tensor]:
    """Layer name in the model -> moments fp32 [K, K] for error feedback, one tensor a site, from the same windows."""
    model, batch = load_for_calibration(plan, text, device, windows)
    sites = plan.layers.sites()
    found = collect_moments(model, batch, sites, progress)
    return {name: found[site] for site, names in sites.items() for name in names}


def load_for_calibration(
    plan: QuantizePlan, text: Path, device: torch.device | str, windows: int
) -> tuple[PreTrainedModel, torch.Tensor]:
    """The source model, and token windows [W, 512] of a text. Raises CheckpointError for a text too short for one."""
    folder = plan.source.where
    tokens = tokenize_file(load_tokenizer(folder), text)
    batch = text_windows(tokens, WINDOW, windows)
    if not len(batch):
        raise CheckpointError(text, f"it has {len(tokens)} tokens, fewer than one window of {WINDOW}")
    device = torch.device(device)
    return load_model(folder, device=device, dtype=torch.float32 if device.type == "cpu" else "auto"), batch


def _scales(mean_abs: torch.Tensor, exponent: float) -> torch.Tensor:
    # A channel that is never active would ask for a scale of 0.
    logs = mean_abs.clamp_min(mean_abs.max() * 1e-6).clamp_min(1e-30).log() * exponent
    return (logs - logs.mean()).exp().clamp(1 / _LIMIT, _LIMIT).half()


def _error(sample: torch.Tensor, weight: torch.Tensor, output: torch.Tensor, bits: int, scales: torch.Tensor) -> float:
    """Squared error of the layer's output relative to its size, so that a site's layers count alike."""
    quantized = quantize_weight(weight, bits, awq_scales=scales)
    parts = (quantized.packed, quantized.norms, quantized.awq_scales, quantized.centroids)
    change = sample @ reference.dequantize(*parts, weight.shape[1], torch.float32).T - output
    return float(change.square().sum() / output.square().sum().clamp_min(1e-30))
