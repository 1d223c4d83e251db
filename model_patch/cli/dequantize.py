"""`polar dequantize`: a quantised checkpoint back into a plain one."""

from typing import Annotated

import typer

from model_patch.checkpoint.dequantize import dequantize_checkpoint
from model_patch.checkpoint.package import DEFAULT_SHARD_SIZE
from model_patch.cli.options import Device, Folder, Out, Overwrite, ShardSize, pick_device, pick_dtype, warn
from model_patch.load import find_checkpoint
from model_patch.progress import progress_bar


def dequantize(
    folder: Folder,
    out: Out,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    max_shard_size: ShardSize = DEFAULT_SHARD_SIZE,
    overwrite: Overwrite = False,
    device: Device = None,
) -> None:
    """Write the model in DIR as a plain checkpoint, on a GPU by the one-shot kernel."""
    target = pick_device(device)
    picked = pick_dtype(dtype, target)
    options = {"device": target, "max_shard_size": max_shard_size, "overwrite": overwrite}
    with progress_bar("dequantize") as progress:
        warn(dequantize_checkpoint(find_checkpoint(folder), out, picked, progress=progress, **options))
    typer.echo(f"written to {out}")
