"""A published checkpoint rewritten in the format as a stream: codes are repacked, not dequantised.

Except in layers that the format leaves in their dtype, such as the GatedDeltaNet gates, which some publishers quantise.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from model_patch.checkpoint.package import DEFAULT_SHARD_SIZE, write_quantized
from model_patch.checkpoint.published.decide import decide
from model_patch.checkpoint.published.layout import SCALES, PublishedLayer, Structure
from model_patch.checkpoint.published.plan import DENSE_DTYPE, ConversionPlan, plan_conversion
from model_patch.checkpoint.published.recognise import read_published
from model_patch.checkpoint.published.values import read_norms, read_packed, read_scales
from model_patch.checkpoint.reader import Checkpoint, read_config
from model_patch.checkpoint.strict import PARTS
from model_patch.checkpoint.writer import check_output
from model_patch.config import METHOD
from model_patch.errors import CheckpointError
from model_patch.load import meta_model
from model_patch.progress import Progress, no_progress
from polar_kernels import ops
from polar_kernels.packing import BitOrder


@dataclass(frozen=True)
class ConvertReport:
    """What `convert_checkpoint` found and did.

    layout: "EOQ v3", "polar_engine_v4", "polar_engine_v5" or "HLWQ". layers: name in the checkpoint -> bits.
    bit_order: of the source's bit streams, None where it has none. decided: how order and table were found.
    """

    layout: str
    layers: dict[str, int]
    bit_order: str | None
    decided: str
    warnings: list[str] = field(default_factory=list)


def convert_checkpoint(
    source: Path,
    out: Path,
    *,
    bit_order: BitOrder | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> ConvertReport:
    """Rewrite the published checkpoint in folder `source` into `out`; what is not quantised passes through.

    bit_order: of the source's bit streams, where it does not state one; None tells it from the codes.

    Raises CheckpointError listing what contradicts the layout, the model or the format, or when a bit order cannot be
    told; UnsupportedModelError for an unknown architecture; OutputError when `out` cannot be written. Then nothing is
    left behind.
    """
    check_output(out, overwrite)
    _refuse_own_format(source)
    model, checkpoint = meta_model(source), Checkpoint.open(source)
    structure = Structure.of(model)
    published = read_published(checkpoint, structure, bit_order)
    decision = decide(checkpoint, published, bit_order)
    plan, warnings = plan_conversion(model, checkpoint, published, structure, decision)
    warnings = decision.warnings + warnings
    warnings += write_quantized(
        source,
        out,
        plan.layout,
        _producer(plan, progress),
        plan.config,
        decision.tables,
        plan.bits,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
    return ConvertReport(published.title, plan.bits, decision.bit_order, decision.text, warnings)


def _refuse_own_format(source: Path) -> None:
    stated = read_config(source).get("quantization_config")
    if isinstance(stated, dict) and stated.get("quant_method") == METHOD and "format_version" in stated:
        raise CheckpointError(source / "config.json", "this checkpoint is in the format already; load it as it is")


def _producer(plan: ConversionPlan, progress: Progress) -> Callable[[str], torch.Tensor]:
    """The function that gives each tensor of the output, read and repacked when it is asked for."""
    done = 0

    def produce(name: str) -> torch.Tensor:
        nonlocal done
        owner, _, part = name.rpartition(".")
        if owner in plan.dense:
            return _dequantized(plan, plan.dense[owner])
        layer = plan.layers.get(owner)
        if layer is None or part not in PARTS:
            return plan.source.read(name)
        if part == "awq_scales":
            return plan.scales[owner]
        if part == "norms":
            return read_norms(plan.source, layer)
        done += 1
        progress(done, len(plan.layers), owner)
        return read_packed(plan.source, layer, plan.decision.bit_order)

    return produce


def _dequantized(plan: ConversionPlan, layer: PublishedLayer) -> torch.Tensor:
    """The dense weight of a layer, [N, K]."""
    packed, norms = read_packed(plan.source, layer, plan.decision.bit_order), read_norms(plan.source, layer)
    scales = read_scales(plan.source, layer) if SCALES in layer.parts else None
    return ops.dequantize(packed, norms, scales, plan.decision.tables[layer.bits], layer.columns, DENSE_DTYPE)
