"""What a plan needs of a calibration text: AWQ scales, and moments for error feedback, from one load of the model."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from model_patch.architectures import Kind, kind_of, weight_name
from model_patch.errors import CheckpointError
from model_patch.evaluate import check_vocabulary, text_windows, tokenize_file
from model_patch.load import load_model, load_tokenizer
from model_patch.progress import Progress, no_progress
from model_patch.quantize.awq import search_awq_scales, search_expert_scales
from model_patch.quantize.calibrate import calibrate
from model_patch.quantize.checkpoint import QuantizePlan
from model_patch.quantize.moments import collect_moments
from model_patch.quantize.streamed import load_streamed

WINDOW = 512  # tokens


@dataclass(frozen=True)
class Calibrated:
    """awq_scales, moments: by the layer's name in the model, the layers of a site with the same tensor. The scales are
    fp16 [K], none where the plan has none; the moments fp32 [K, K] of the inputs, or [E, K, K] of each expert's, none
    where not asked for.

    rare_experts: layers.N.mlp.experts -> those that saw too few tokens to be judged by their own; empty after a resumed
    run.
    """

    awq_scales: dict[str, torch.Tensor] = field(default_factory=dict)
    moments: dict[str, torch.Tensor] = field(default_factory=dict)
    rare_experts: dict[str, list[int]] = field(default_factory=dict)


def calibrate_plan(
    plan: QuantizePlan,
    text: Path,
    device: torch.device | str,
    windows: int,
    *,
    feedback: bool = False,
    streamed: bool = False,
    progress: Progress = no_progress,
) -> Calibrated:
    """Calibrate on the first `windows` windows of 512 tokens of a text file.

    streamed: read each layer when it is run, in place of loading the model as a whole; what comes out is the same.
    Raises CheckpointError for a text shorter than one window, or with tokens that the model does not know.
    """
    batch = calibration_batch(plan.source.where, text, windows)
    model = load_for_calibration(plan.source.where, device, streamed)
    check_vocabulary(batch, model)
    sites = plan.layers.sites()
    passes = len(model.get_decoder().layers) * len(batch)
    awq_steps = passes + len(sites) if plan.config.awq else 0
    total = awq_steps + (2 * passes if feedback else 0)
    result = Calibrated()
    if plan.config.awq:
        _find_scales(result, plan, model, batch, partial(_tell, progress, 0, total))
    if feedback:
        told = partial(_tell, progress, awq_steps, total)
        found = collect_moments(model, batch, sites, told, plan.source)
        result.moments.update({name: found.of_site[site] for site, names in sites.items() for name in names})
        result.rare_experts.update(found.rare_experts)
    return result


def calibration_batch(source: Path, text: Path, windows: int) -> torch.Tensor:
    """Token ids [W, 512], W <= `windows`, of a text. Raises CheckpointError for a text shorter than one window."""
    tokens = tokenize_file(load_tokenizer(source), text)
    batch = text_windows(tokens, WINDOW, windows)
    if not len(batch):
        raise CheckpointError(text, f"it has {len(tokens)} tokens, fewer than one window of {WINDOW}")
    return batch


def load_for_calibration(source: Path, device: torch.device | str, streamed: bool = False) -> PreTrainedModel:
    """The model, in its own dtype on a GPU and in fp32 on a CPU; as a whole, or its layers when they are run."""
    device = torch.device(device)
    dtype = torch.float32 if device.type == "cpu" else "auto"
    return load_streamed(source, device, dtype) if streamed else load_model(source, device=device, dtype=dtype)


def _tell(progress: Progress, before: int, total: int, done: int, of: int, what: str) -> None:
    progress(before + done, total, what)


def _find_scales(
    result: Calibrated,
    plan: QuantizePlan,
    model: PreTrainedModel,
    batch: torch.Tensor,
    progress: Progress,
) -> None:
    """Fill in the AWQ scales of each layer; progress counts windows through layers, then the sites."""
    sites = plan.layers.sites()
    statistics = calibrate(model, batch, sites, progress, plan.source)
    passes, device = len(model.get_decoder().layers) * len(batch), model.get_output_embeddings().weight.device
    for index, (site, names) in enumerate(sites.items()):
        weights = [plan.source.read(weight_name(plan.names[name]), device) for name in names]
        bits = [plan.layers.bits[name] for name in names]
        if kind_of(names[0]) is Kind.EXPERTS:
            found, _ = search_expert_scales(statistics[site], weights[0], bits[0])
            if rare := statistics[site].rare_experts:
                result.rare_experts[site.rpartition(".")[0]] = rare
        else:
            found, _ = search_awq_scales(statistics[site], weights, bits)
        result.awq_scales.update(dict.fromkeys(names, found))
        progress(passes + index + 1, passes + len(sites), site)
