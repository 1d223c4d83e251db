"""A quantised checkpoint opened for reading layer by layer, checked against the model its config describes."""

from dataclasses import dataclass
from pathlib import Path

import torch

from model_patch.architectures import canonical, weight_name
from model_patch.checkpoint.reader import Checkpoint, read_config
from model_patch.checkpoint.strict import check_checkpoint
from model_patch.errors import CheckpointError
from model_patch.load import meta_model, quantization_config
from model_patch.patch import plan_model, swap_to_empty
from polar_kernels import PolarError, PolarWeight


@dataclass(frozen=True)
class StoredLayers:
    """bits: layer name in the checkpoint -> bits; shapes: -> that of its dense weight; tied_head: name of the head that
    shares the embedding's tensors, or None."""

    checkpoint: Checkpoint
    bits: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    tables: dict[int, torch.Tensor]
    tied_head: str | None

    def read(self, layer: str, device: torch.device | str = "cpu") -> PolarWeight:
        """One layer's stored weight; experts [E, N, K] as one of [E * N, K].

        Raises CheckpointError naming it when its parts do not fit together.
        """
        has_scales = f"{layer}.awq_scales" in self.checkpoint.tensors
        scales = self.checkpoint.read(f"{layer}.awq_scales", device) if has_scales else None
        packed, norms = (self.checkpoint.read(f"{layer}.{part}", device).flatten(0, -2) for part in ("packed", "norms"))
        try:
            return PolarWeight(packed, norms, scales, self.tables[self.bits[layer]].to(device), self.shapes[layer][-1])
        except PolarError as error:
            raise CheckpointError(self.checkpoint.where, f"{layer}: {error}") from error


def open_quantized(folder: Path, checkpoint: Checkpoint | None = None) -> StoredLayers:
    """Open a checkpoint of the format by its headers: those in `folder`, or those given.

    Raises CheckpointError listing all that is wrong with them.
    """
    config = quantization_config(read_config(folder))
    if config is None:
        raise CheckpointError(folder, "not a quantised checkpoint: config.json has no quantization_config")
    model, checkpoint = meta_model(folder), checkpoint or Checkpoint.open(folder)
    plan = plan_model(model, config)
    shapes = {name: tuple(model.get_parameter(weight_name(name)).shape) for name in plan.bits}
    swap_to_empty(model, plan, config.awq)
    check_checkpoint(model, checkpoint)
    by_short = {
        canonical(name): name.removesuffix(".packed") for name in checkpoint.tensors if name.endswith(".packed")
    }
    stored = {name: by_short[canonical(f"{name}.packed")] for name in plan.bits}
    return StoredLayers(
        checkpoint,
        {stored[name]: bits for name, bits in plan.bits.items()},
        {stored[name]: shape for name, shape in shapes.items()},
        checkpoint.centroids(),
        plan.tied_head,
    )
