"""The baseline everyone starts from: round to nearest on a uniform grid, one absmax scale per 128 weights.

It has no rotation and so no place in the format; `polar quantize --method absmax` writes the rounded weights as a
plain checkpoint, to be compared with and not to be served.
"""

from pathlib import Path

import torch

from model_patch.architectures import weight_name
from model_patch.checkpoint.package import DEFAULT_SHARD_SIZE, write_plain
from model_patch.checkpoint.writer import check_output, passthrough
from model_patch.progress import Progress, no_progress
from model_patch.quantize.checkpoint import QuantizePlan
from polar_kernels.hadamard import BLOCK_SIZE, pad_blocks


def absmax_round(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """weight [..., K] rounded to `bits` bits: 2^bits - 1 levels, symmetric, the outermost at a block's absmax."""
    blocks = pad_blocks(weight.float()).unflatten(-1, (-1, BLOCK_SIZE))
    top = (1 << (bits - 1)) - 1
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / top
    rounded = (blocks / scale).round() * scale
    return rounded.flatten(-2)[..., : weight.shape[-1]].to(weight.dtype)


def write_absmax(
    plan: QuantizePlan,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> list[str]:
    """Write the checkpoint that `plan` read with its planned layers rounded by absmax; returns warnings."""
    check_output(out, overwrite)
    bits = {weight_name(plan.names[name]): b for name, b in plan.layers.bits.items()}
    done = 0

    def produce(name: str) -> torch.Tensor:
        nonlocal done
        if name not in bits:
            return plan.source.read(name)
        done += 1
        progress(done, len(bits), name)
        return absmax_round(plan.source.read(name, device), bits[name])

    layout = {name: passthrough(plan.source, name) for name in plan.source.tensors}
    return write_plain(plan.source.where, out, layout, produce, max_shard_size=max_shard_size, overwrite=overwrite)
