"""A quantised checkpoint written back as a plain one, a tensor and a shard at a time."""

from pathlib import Path

import torch

from model_patch.architectures import weight_name
from model_patch.checkpoint.package import DEFAULT_SHARD_SIZE, write_plain
from model_patch.checkpoint.strict import value_problems
from model_patch.checkpoint.writer import check_output, passthrough
from model_patch.errors import CheckpointError
from model_patch.progress import Progress, no_progress
from model_patch.stored import open_quantized
from polar_kernels import ops


def dequantize_checkpoint(
    folder: Path,
    out: Path,
    dtype: torch.dtype = torch.bfloat16,
    *,
    device: torch.device | str = "cpu",
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> list[str]:
    """Write the checkpoint in `folder` with dense weights in `dtype` into `out`; returns warnings.

    On a GPU each weight is made by the one-shot kernel. Raises CheckpointError when the source is not sound.
    """
    check_output(out, overwrite)
    stored = open_quantized(folder)
    layout: dict[str, torch.Tensor] = {}
    layers = {weight_name(layer): layer for layer in stored.shapes}
    for name in stored.checkpoint.tensors:
        layer, _, _ = name.rpartition(".")
        if layer in stored.shapes:
            layout[weight_name(layer)] = torch.empty(stored.shapes[layer], dtype=dtype, device="meta")
        else:
            plain = passthrough(stored.checkpoint, name)
            layout[name] = plain.to(dtype) if plain.is_floating_point() else plain
    done = 0

    def produce(name: str) -> torch.Tensor:
        nonlocal done
        if (layer := layers.get(name)) is None:
            return stored.checkpoint.read(name).to(layout[name].dtype)
        done += 1
        progress(done, len(stored.shapes), layer)
        weight = stored.read(layer, device)
        if problems := value_problems(layer, weight, stored.checkpoint):
            raise CheckpointError(folder, problems)
        parts = (weight.packed, weight.norms, weight.awq_scales, weight.centroids)
        return ops.dequantize(*parts, weight.in_features, dtype).view(stored.shapes[layer])

    return write_plain(folder, out, layout, produce, max_shard_size=max_shard_size, overwrite=overwrite)
