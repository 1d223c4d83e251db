"""`polar dequantize`: a quantised checkpoint back into a plain one."""

from typing import Annotated

import typer

from model_patch.checkpoint.dequantize import dequantize_checkpoint
from model_patch.checkpoint.package import DEFAULT_SHARD_SIZE
from model_patch.cli.options import Device, Folder, Out, Overwrite, ShardSize, parse_dtype, pick_device, warn
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
    with progress_bar("dequantize") as progress:
        warnings = dequantize_checkpoint(
            find_checkpoint(folder),
            out,
            parse_dtype(dtype),
            device=pick_device(device),
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            progress=progress,
        )
    warn(warnings)
    typer.echo(f"written to {out}")
