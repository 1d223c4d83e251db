"""Checking a quantised checkpoint tensor by tensor, and its weights against the ones it was made from."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from model_patch.architectures import Kind, canonical, role_of, weight_name
from model_patch.checkpoint.reader import Checkpoint
from model_patch.checkpoint.strict import value_problems
from model_patch.errors import CheckpointError
from model_patch.progress import Progress, no_progress
from model_patch.stored import open_quantized
from polar_kernels import PolarWeight, ops


@dataclass(frozen=True)
class Verification:
    """layers: name -> bits. layer_errors: name -> squared error of the weight relative to its square; linear_error:
    the same over all linear layers and the head together; both only with a source to compare with."""

    layers: dict[str, int]
    plain_tensors: int
    layer_errors: dict[str, float] = field(default_factory=dict)
    linear_error: float | None = None


def verify_checkpoint(
    folder: Path, source: Path | None = None, device: torch.device | str = "cpu", progress: Progress = no_progress
) -> Verification:
    """Check names, dtypes, shapes, metadata and values of a checkpoint of the format.

    Raises CheckpointError listing all that is wrong.
    """
    stored = open_quantized(folder)
    original = None if source is None else Checkpoint.open(source)
    plain = [name for name in stored.checkpoint.tensors if name.rpartition(".")[0] not in stored.bits]
    problems = _plain_problems(stored.checkpoint, plain)
    errors: dict[str, tuple[float, float]] = {}
    for index, layer in enumerate(stored.bits):
        weight = stored.read(layer, device)
        problems += value_problems(layer, weight, stored.checkpoint)
        if original is not None:
            errors[layer] = _squared_error(weight, _original_weight(original, layer, stored.shapes[layer], device))
        progress(index + 1, len(stored.bits), layer)
    if problems:
        raise CheckpointError(folder, problems)
    if original is None:
        return Verification(stored.bits, len(plain))
    layer_errors = {layer: error / size if size else error for layer, (error, size) in errors.items()}
    return Verification(stored.bits, len(plain), layer_errors, _linear_error(errors))


def _linear_error(errors: dict[str, tuple[float, float]]) -> float | None:
    linear = [pair for layer, pair in errors.items() if (role := role_of(layer)) and role.kind is not Kind.EMBEDDING]
    size = sum(size for _, size in linear)
    return sum(error for error, _ in linear) / size if size else None


def _plain_problems(checkpoint: Checkpoint, names: list[str]) -> list[str]:
    return [
        f"{checkpoint.tensors[name].file.name}: {name} has NaN or infinite elements"
        for name in names
        if not checkpoint.read(name).isfinite().all()
    ]


def _original_weight(
    source: Checkpoint, layer: str, shape: tuple[int, ...], device: torch.device | str
) -> torch.Tensor:
    by_short = {canonical(name): name for name in source.tensors}
    wanted = weight_name(layer)
    name = by_short.get(canonical(wanted))
    if name is None:
        raise CheckpointError(source.where, f"{wanted} is missing: is this the checkpoint it was made from?")
    if (found := source.tensors[name].shape) != shape:
        shapes = f"{list(found)} in the source, {list(shape)} here"
        raise CheckpointError(source.where, f"{name} has the shape {shapes}: is this the checkpoint it was made from?")
    return source.read(name, device)


def _squared_error(weight: PolarWeight, original: torch.Tensor) -> tuple[float, float]:
    """Squared error of the dequantised weight, and the original's square; of experts all together."""
    parts = (weight.packed, weight.norms, weight.awq_scales, weight.centroids)
    dense = ops.dequantize(*parts, weight.in_features, torch.float32)
    error = dense - original.flatten(0, -2).float()
    return float(error.double().square().sum()), float(original.double().square().sum())
