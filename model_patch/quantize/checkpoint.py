"""A checkpoint quantised as a stream: one source tensor and one output shard in memory at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from model_patch.architectures import LayerPlan, canonical, weight_name
from model_patch.checkpoint.package import DEFAULT_SHARD_SIZE, write_quantized
from model_patch.checkpoint.reader import Checkpoint, read_config
from model_patch.checkpoint.strict import PARTS, check_checkpoint
from model_patch.checkpoint.writer import check_output, passthrough
from model_patch.config import PolarQuantConfig
from model_patch.errors import UnsupportedModelError
from model_patch.load import meta_model
from model_patch.patch import plan_model
from model_patch.progress import Progress, no_progress
from polar_kernels import BLOCK_SIZE, PolarError, PolarWeight, lloyd_max_levels, quantize_weight
from polar_kernels.errors import ArgumentError
from polar_kernels.experts import quantize_experts
from polar_kernels.hadamard import padded_size
from polar_kernels.packing import packed_size


@dataclass(frozen=True)
class QuantizePlan:
    """What quantising a checkpoint will write, known from its headers.

    layers: what becomes of each layer, by its name in the model. names: layer name in the model -> in the checkpoint.
    layout: tensor name -> meta tensor of the output, in order. source: the checkpoint read.
    """

    layers: LayerPlan
    names: dict[str, str]
    layout: dict[str, torch.Tensor]
    source: Checkpoint
    config: PolarQuantConfig

    @property
    def source_bytes(self) -> int:
        return sum(info.nbytes for info in self.source.tensors.values())

    @property
    def output_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.layout.values())

    def layer_bytes(self, name: str) -> tuple[int, int]:
        """Bytes of the layer `name` before and after."""
        stored = self.names[name]
        after = sum(self.layout[key].nbytes for part in PARTS if (key := f"{stored}.{part}") in self.layout)
        return self.source.tensors[weight_name(stored)].nbytes, after

    def code_bytes(self, name: str) -> int:
        """Bytes of the codes of the layer `name`."""
        return self.layout[f"{self.names[name]}.packed"].nbytes

    @property
    def mean_bits(self) -> float:
        """Bits a code, mean over all that are stored."""
        codes = {name: self.code_bytes(name) for name in self.layers.bits}
        return sum(codes.values()) / sum(count / self.layers.bits[name] for name, count in codes.items())


def plan_checkpoint(
    source: Path, config: PolarQuantConfig, awq: bool, checkpoint: Checkpoint | None = None
) -> QuantizePlan:
    """Read headers and config of a plain checkpoint and decide what is written.

    checkpoint: the headers, where they are not in the folder `source`.
    Raises CheckpointError for a source that is not whole, UnsupportedModelError for an unknown or quantised one,
    ConfigError for a pattern that matches nothing.
    """
    if "quantization_config" in read_config(source):
        raise UnsupportedModelError(f"{source} is quantised already: quantise the original checkpoint")
    model, checkpoint = meta_model(source), checkpoint or Checkpoint.open(source)
    check_checkpoint(model, checkpoint)
    layers = plan_model(model, config)
    by_short = {canonical(name): name for name in checkpoint.tensors}
    names = {name: by_short[canonical(weight_name(name))].removesuffix(".weight") for name in layers.bits}
    awq_layers = {name for members in layers.sites().values() for name in members} if awq else set()
    stored_bits = {names[name]: bits for name, bits in layers.bits.items()}
    second_copies = {canonical(name) for name in model.all_tied_weights_keys}
    layout: dict[str, torch.Tensor] = {}
    for name in checkpoint.tensors:
        if canonical(name) in second_copies:
            continue
        layer = name.removesuffix(".weight")
        if layer in stored_bits and name == weight_name(layer):
            scaled = layer in {names[n] for n in awq_layers}
            layout |= _parts(layer, checkpoint.tensors[name].shape, stored_bits[layer], scaled)
        else:
            layout[name] = passthrough(checkpoint, name)
    return QuantizePlan(layers, names, layout, checkpoint, config.resolved(layers, awq))


def quantize_checkpoint(
    plan: QuantizePlan,
    out: Path,
    *,
    awq_scales: Mapping[str, torch.Tensor] | None = None,
    moments: Mapping[str, torch.Tensor] | None = None,
    device: torch.device | str = "cpu",
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    kept: Path | None = None,
    progress: Progress = no_progress,
) -> list[str]:
    """Carry out `plan` into the folder `out`; returns warnings.

    awq_scales: layer name in the model -> fp16 [K]; needed for each linear layer when the plan was made with `awq`.
    moments: layer name in the model -> [K, K] of its inputs, for error feedback; layers without go without.
    kept: a folder to work in, beside `out`: shards that are whole in it are not made again, and when it fails it stays.
    Raises QuantizationError naming the tensor whose weight cannot be quantised, OutputError when `out` cannot be
    written; then nothing is left behind, but for `kept`.
    """
    check_output(out, overwrite)
    scales = {plan.names[name]: value for name, value in _wanted_scales(plan, awq_scales or {}).items()}
    seconds = {plan.names[name]: value for name, value in (moments or {}).items()}
    bits = {plan.names[name]: b for name, b in plan.layers.bits.items()}
    ready: dict[str, torch.Tensor] = {}  # parts of a layer quantised already and not yet asked for
    places = {layer: index + 1 for index, layer in enumerate(_in_order(plan.layout, bits))}

    def produce(name: str) -> torch.Tensor:
        layer, _, part = name.rpartition(".")
        if layer not in bits or part not in PARTS:
            return plan.source.read(name)
        if name not in ready:
            weight = quantize_layer(plan.source, layer, bits[layer], scales.get(layer), seconds.get(layer), device)
            parts = {f"{layer}.{key}": part for key in PARTS if (part := getattr(weight, key)) is not None}
            ready.update({key: part.view(plan.layout[key].shape) for key, part in parts.items()})
            progress(places[layer], len(bits), layer)
        return ready.pop(name)

    tables = {b: lloyd_max_levels(b) for b in set(bits.values())}
    return write_quantized(
        plan.source.where,
        out,
        plan.layout,
        produce,
        plan.config,
        tables,
        bits,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        kept=kept,
    )


def _in_order(layout: Mapping[str, torch.Tensor], layers: Mapping[str, int]) -> list[str]:
    """The layers in the order in which their tensors are written."""
    return list(dict.fromkeys(layer for name in layout if (layer := name.rpartition(".")[0]) in layers))


def _wanted_scales(plan: QuantizePlan, given: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """The given AWQ scales, which must be those of the layers that the plan stores some of."""
    wanted = {name for name, stored in plan.names.items() if f"{stored}.awq_scales" in plan.layout}
    if wanted != given.keys():
        missing, unknown = sorted(wanted - given.keys()), sorted(given.keys() - wanted)
        raise ArgumentError(f"awq_scales must be those of the plan's layers: missing {missing}, not planned {unknown}")
    return given


def quantize_layer(
    source: Checkpoint,
    layer: str,
    bits: int,
    awq_scales: torch.Tensor | None,
    moments: torch.Tensor | None,
    device: torch.device | str,
) -> PolarWeight:
    """One layer of a checkpoint, by its name there; experts [E, N, K] as one weight [E * N, K].

    Raises QuantizationError naming the file and the tensor.
    """
    name = weight_name(layer)
    weight = source.read(name, device)
    try:
        if weight.dim() == 3:
            return quantize_experts(weight, bits, awq_scales=awq_scales, moments=moments)
        return quantize_weight(weight, bits, awq_scales=awq_scales, moments=moments)
    except PolarError as error:
        raise type(error)(f"{source.tensors[name].file}: {name}: {error}") from error


def _parts(layer: str, shape: tuple[int, ...], bits: int, scaled: bool) -> dict[str, torch.Tensor]:
    """Meta tensors of a quantised layer; shape: of its weight."""
    *rows, columns = shape
    padded = padded_size(columns)
    parts = {
        f"{layer}.packed": torch.empty(*rows, packed_size(padded, bits), dtype=torch.uint8, device="meta"),
        f"{layer}.norms": torch.empty(*rows, padded // BLOCK_SIZE, dtype=torch.float16, device="meta"),
    }
    if scaled:
        parts[f"{layer}.awq_scales"] = torch.empty(columns, dtype=torch.float16, device="meta")
    return parts
