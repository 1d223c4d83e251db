"""`polar convert`: a checkpoint of a published layout into this package's format."""

from collections import Counter
from dataclasses import asdict
from enum import StrEnum
from typing import Annotated

import typer

from model_patch.checkpoint.package import DEFAULT_SHARD_SIZE
from model_patch.checkpoint.published import convert_checkpoint
from model_patch.cli.options import AsJson, Folder, Out, Overwrite, ShardSize, print_json, warn
from model_patch.load import find_checkpoint
from model_patch.progress import progress_bar


class Order(StrEnum):
    """Choices of --bit-order."""

    lsb = "lsb"
    msb = "msb"


def convert(
    folder: Folder,
    out: Out,
    bit_order: Annotated[
        Order | None, typer.Option(help="Bit order of the codes, where DIR states none; told from them by default.")
    ] = None,
    max_shard_size: ShardSize = DEFAULT_SHARD_SIZE,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Rewrite the EOQ v3, polar_engine or HLWQ checkpoint in DIR in this package's format, code for code."""
    with progress_bar("convert") as progress:
        report = convert_checkpoint(
            find_checkpoint(folder),
            out,
            bit_order=None if bit_order is None else bit_order.value,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            progress=progress,
        )
    warn(report.warnings)
    if as_json:
        print_json(asdict(report) | {"out": str(out)})
        return
    widths = sorted(Counter(report.layers.values()).items())
    layers = ", ".join(f"{count} of {bits} bits" for bits, count in widths)
    typer.echo(f"{report.layout}: {len(report.layers)} layers ({layers}) written to {out}\n{report.decided}")
