"""AWQ: per-channel scales that spare the channels with large activations, one vector per input site.

s = mean|x|^a, normalised to geometric mean 1; the exponent a is the one that gives the smallest error of the site's
outputs on sampled activations, quantisation included. a = 0, no scaling, is always a candidate.
Source: J. Lin et al., AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, 2024.
"""

from collections.abc import Callable, Sequence

import torch

from model_patch.quantize.calibrate import SiteStatistics
from polar_kernels import quantize_weight, reference

EXPONENTS = tuple(step / 20 for step in range(21))
_ROWS = 1024  # of each weight, evenly spread, that the search looks at
_EXPERT_WEIGHT_ROWS = 16  # of each expert's at the least
_LIMIT = 1e4  # fp16 keeps scales within 1/LIMIT..LIMIT exact enough and far from its ends

# Weight [N, K], bits, scales [K] -> fp32 [N, K], what is left of the weight once it is quantised.
FakeQuantize = Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]


def _polar(weight: torch.Tensor, bits: int, scales: torch.Tensor) -> torch.Tensor:
    quantized = quantize_weight(weight, bits, awq_scales=scales)
    parts = (quantized.packed, quantized.norms, quantized.awq_scales, quantized.centroids)
    return reference.dequantize(*parts, weight.shape[1], torch.float32)


@torch.no_grad()
def search_awq_scales(
    statistics: SiteStatistics,
    weights: Sequence[torch.Tensor],
    bits: Sequence[int],
    fake_quantize: FakeQuantize = _polar,
) -> tuple[torch.Tensor, float]:
    """The best scales fp16 [K] for a site and their exponent.

    weights: the site's weights [N_i, K], on the device to search on; bits: of each; fake_quantize: the method
    that the scales are for.
    """
    device = weights[0].device
    sample = statistics.sample.to(device)
    rows = [weight[:: max(1, weight.shape[0] // _ROWS)][:_ROWS].float() for weight in weights]
    outputs = [sample @ weight.T for weight in rows]

    def error(scales: torch.Tensor) -> float:
        left = [fake_quantize(weight, b, scales) for weight, b in zip(rows, bits, strict=True)]
        return sum(_error(sample, weight, output) for weight, output in zip(left, outputs, strict=True))

    return _best(statistics, device, error)


@torch.no_grad()
def search_expert_scales(
    statistics: SiteStatistics, weight: torch.Tensor, bits: int, fake_quantize: FakeQuantize = _polar
) -> tuple[torch.Tensor, float]:
    """The same for one projection of experts, weight [E, N, K]: every expert counts alike, by the tokens it saw itself,
    or where those are too few (`rare_experts`) by the site's."""
    device, rare = weight.device, statistics.rare_experts
    count = max(_EXPERT_WEIGHT_ROWS, _ROWS // weight.shape[0])
    rows = weight[:, :: max(1, weight.shape[1] // count)][:, :count].float()
    site = statistics.sample.to(device)
    samples = [site if expert in rare else own.to(device) for expert, own in enumerate(statistics.expert_samples)]
    outputs = [sample @ single.T for sample, single in zip(samples, rows, strict=True)]

    def error(scales: torch.Tensor) -> float:
        left = fake_quantize(rows.flatten(0, 1), bits, scales).view_as(rows)
        return sum(_error(*parts) for parts in zip(samples, left, outputs, strict=True))

    return _best(statistics, device, error)


def _best(
    statistics: SiteStatistics, device: torch.device, error: Callable[[torch.Tensor], float]
) -> tuple[torch.Tensor, float]:
    """The scales of the least error, and their exponent."""
    best, best_error = None, torch.inf
    for exponent in EXPONENTS:
        scales = _scales(statistics.mean_abs.to(device), exponent)
        if (found := error(scales)) < best_error:
            best, best_error = (scales, exponent), found
    assert best is not None  # the error of exponent 0 is finite
    return best


def _scales(mean_abs: torch.Tensor, exponent: float) -> torch.Tensor:
    # A channel that is never active would ask for a scale of 0.
    logs = mean_abs.clamp_min(mean_abs.max() * 1e-6).clamp_min(1e-30).log() * exponent
    return (logs - logs.mean()).exp().clamp(1 / _LIMIT, _LIMIT).half()


def _error(sample: torch.Tensor, weight: torch.Tensor, output: torch.Tensor) -> float:
    """Squared error of the layer's output relative to its size, so that a site's layers count alike."""
    change = sample @ weight.T - output
    return float(change.square().sum() / output.square().sum().clamp_min(1e-30))
