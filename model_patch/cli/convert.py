"""`polar convert`: a checkpoint of a published layout into this package's format."""

import json
from collections import Counter
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from model_patch.checkpoint.package import DEFAULT_SHARD_SIZE
from model_patch.checkpoint.published import ConvertReport, convert_checkpoint
from model_patch.load import find_checkpoint
from model_patch.progress import progress_bar


class Order(StrEnum):
    """Choices of --bit-order."""

    lsb = "lsb"
    msb = "msb"


def convert(
    source: Annotated[str, typer.Argument(help="Folder or Hub name of an EOQ v3, polar_engine or HLWQ checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    bit_order: Annotated[
        Order | None, typer.Option(help="Bit order of the source, where it states none; else told from the codes.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of a shard.")] = DEFAULT_SHARD_SIZE,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Rewrite a published PolarQuant checkpoint in this package's format, without dequantising it."""
    with progress_bar("convert") as progress:
        report = convert_checkpoint(
            find_checkpoint(source),
            out,
            bit_order=None if bit_order is None else bit_order.value,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            progress=progress,
        )
    typer.echo(json.dumps(asdict(report) | {"out": str(out)}, indent=2) if as_json else _text(report, out))


def _text(report: ConvertReport, out: Path) -> str:
    widths = Counter(report.layers.values())
    layers = ", ".join(f"{count} of {bits} bits" for bits, count in sorted(widths.items()))
    lines = [f"{report.layout}: {len(report.layers)} layers ({layers}) written to {out}", report.decided]
    return "\n".join(lines + [f"warning: {warning}" for warning in report.warnings])
