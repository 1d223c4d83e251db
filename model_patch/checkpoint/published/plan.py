"""What a conversion will write, checked against the model it will be loaded into before anything is written."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from model_patch.architectures import LayerPlan, canonical
from model_patch.checkpoint.published.decide import Decision
from model_patch.checkpoint.published.layout import NORMS, SCALES, Published, PublishedLayer, Structure
from model_patch.checkpoint.published.values import read_scales, refuse_scaled
from model_patch.checkpoint.reader import Checkpoint, TensorInfo
from model_patch.checkpoint.strict import check_checkpoint
from model_patch.checkpoint.writer import passthrough, polar_metadata
from model_patch.config import PolarQuantConfig
from model_patch.errors import CheckpointError
from model_patch.patch import plan_model, swap_to_empty
from polar_kernels.hadamard import BLOCK_SIZE
from polar_kernels.packing import packed_size

DENSE_DTYPE = torch.bfloat16  # of the checkpoints that the published ones were made from


@dataclass(frozen=True)
class ConversionPlan:
    """What will be written: `layout` in order, made from `layers` (by name) and `scales` (layer name -> fp16 [K]).

    dense: layers that the format leaves in their dtype, by name; they become plain weights.
    """

    source: Checkpoint
    layers: dict[str, PublishedLayer]
    dense: dict[str, PublishedLayer]
    scales: dict[str, torch.Tensor]
    layout: dict[str, torch.Tensor]
    config: PolarQuantConfig
    decision: Decision

    @property
    def bits(self) -> dict[str, int]:
        return {name: layer.bits for name, layer in self.layers.items()}


def plan_conversion(
    model: PreTrainedModel, checkpoint: Checkpoint, published: Published, structure: Structure, decision: Decision
) -> tuple[ConversionPlan, list[str]]:
    """What to write of a source, and warnings. model: unpatched, on the meta device; it is patched on the way.

    Raises CheckpointError for bad AWQ scales, and for all tensors that the model lacks or that it would not take.
    """
    dense = {layer.name: layer for layer in published.layers if canonical(layer.name) in structure.kept}
    layers = {layer.name: layer for layer in published.layers if layer.name not in dense}
    if not layers:
        problem = f"the format leaves all its quantised layers plain: {_why(dense, structure)}"
        raise CheckpointError(checkpoint.where, problem)
    config, plan = _config(model, layers)
    scales, warnings = _scales(checkpoint, layers, plan)
    config = config.resolved(plan, awq=bool(scales))
    second_copies = {canonical(name).rpartition(".")[0] for name in model.all_tied_weights_keys}
    layout, files = _layout(checkpoint, layers, dense, scales, second_copies)
    conversion = ConversionPlan(checkpoint, layers, dense, scales, layout, config, decision)
    described = {name: TensorInfo(files[name], tensor.dtype, tuple(tensor.shape)) for name, tensor in layout.items()}
    metadata = polar_metadata(decision.tables, conversion.bits)
    swap_to_empty(model, plan, config.awq)
    check_checkpoint(model, Checkpoint(checkpoint.where, described, metadata))
    if dense:
        warnings.append(f"{len(dense)} layers were made plain, as the format has them: {_why(dense, structure)}")
    return conversion, warnings + _rounding_warnings(checkpoint, layers)


def _config(model: PreTrainedModel, layers: Mapping[str, PublishedLayer]) -> tuple[PolarQuantConfig, LayerPlan]:
    """The config by which just `layers` are quantised, and the plan it makes."""
    bits = {canonical(name): layer.bits for name, layer in layers.items()}
    common = Counter(bits.values()).most_common(1)[0][0]
    names = plan_model(model, PolarQuantConfig()).bits
    special = {name: b for name in names if (b := bits.get(canonical(name), common)) != common}
    config = PolarQuantConfig(common, special, [name for name in names if canonical(name) not in bits])
    return config, plan_model(model, config)


def _scales(
    checkpoint: Checkpoint, layers: Mapping[str, PublishedLayer], plan: LayerPlan
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """AWQ scales of every linear layer where any has them, ones for the others; and warnings."""
    by_short = {canonical(name): name for name in layers}
    sites = [[by_short[canonical(name)] for name in names] for names in plan.sites().values()]
    linear = [name for names in sites for name in names]
    for name in layers.keys() - linear:
        refuse_scaled(checkpoint, layers[name])
    if not any(SCALES in layers[name].parts for name in linear):
        return {}, []
    scales = {
        name: read_scales(checkpoint, layers[name])
        if SCALES in layers[name].parts
        else torch.ones(layers[name].columns, dtype=torch.float16)
        for name in linear
    }
    uneven = [names for names in sites if not all(torch.equal(scales[names[0]], scales[name]) for name in names)]
    return scales, [
        f"{', '.join(names)} read the same activation but differ in their awq_scales: "
        "engines that fuse these layers cannot load them"
        for names in uneven
    ]


def _layout(
    checkpoint: Checkpoint,
    layers: Mapping[str, PublishedLayer],
    dense: Mapping[str, PublishedLayer],
    scales: Mapping[str, torch.Tensor],
    second_copies: set[str],
) -> tuple[dict[str, torch.Tensor], dict[str, Path]]:
    """Name -> meta tensor of the output in the source's order, and name -> the file it comes from."""
    made = [(layer, _parts(layer, scales)) for layer in layers.values()]
    made += [(layer, {f"{layer.name}.weight": _dense_weight(layer)}) for layer in dense.values()]
    owners = {tensor: parts for layer, parts in made for tensor in layer.parts.values()}
    layout: dict[str, torch.Tensor] = {}
    files: dict[str, Path] = {}
    for name, info in checkpoint.tensors.items():
        if canonical(name).rpartition(".")[0] in second_copies:
            continue
        added = owners[name] if name in owners else {name: passthrough(checkpoint, name)}
        layout |= added
        files |= dict.fromkeys(added, info.file)
    return layout, files


def _parts(layer: PublishedLayer, scales: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Meta tensors of a layer in the format."""
    packed = (layer.rows, packed_size(layer.padded, layer.bits))
    parts = {
        f"{layer.name}.packed": torch.empty(packed, dtype=torch.uint8, device="meta"),
        f"{layer.name}.norms": torch.empty(layer.rows, layer.padded // BLOCK_SIZE, dtype=torch.float16, device="meta"),
    }
    if layer.name in scales:
        parts[f"{layer.name}.awq_scales"] = torch.empty(layer.columns, dtype=torch.float16, device="meta")
    return parts


def _why(dense: Mapping[str, PublishedLayer], structure: Structure) -> str:
    return ", ".join(f"{name} ({structure.kept[canonical(name)]})" for name in dense)


def _dense_weight(layer: PublishedLayer) -> torch.Tensor:
    """Meta tensor of a layer that becomes a plain weight."""
    return torch.empty(layer.rows, layer.columns, dtype=DENSE_DTYPE, device="meta")


def _rounding_warnings(checkpoint: Checkpoint, layers: Mapping[str, PublishedLayer]) -> list[str]:
    wider = [
        tensor
        for layer in layers.values()
        for part, tensor in layer.parts.items()
        if part in (NORMS, SCALES) and checkpoint.tensors[tensor].dtype != torch.float16
    ]
    if not wider:
        return []
    return [f"{len(wider)} tensors of norms and scales were rounded to fp16, the first of them {wider[0]}"]
