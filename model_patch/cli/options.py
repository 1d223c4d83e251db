"""Arguments and options that several subcommands share, and how they print."""

import importlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from model_patch.checkpoint.writer import shard_bytes
from model_patch.errors import ConfigError, OutputError
from model_patch.quantize.calibrate import EXPERT_ROWS


def _check_shard_size(size: str) -> str:
    shard_bytes(size)  # before any work, not when the first shard is written
    return size


Folder = Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint folder or Hub name.", show_default=False)]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; the GPU where there is one by default.")]
DType = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16; float32 on a CPU and the checkpoint's own on a GPU by default."),
]
Exact = Annotated[bool, typer.Option("--exact", help="Do not round activations to int8 where a GPU would.")]
Accelerated = Annotated[
    bool | None,
    typer.Option("--accelerated/--plain", help="Decode by CUDA graphs, or by transformers alone; graphs on a GPU."),
]
ShardSize = Annotated[str, typer.Option(help="Largest size of a shard.", callback=_check_shard_size)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]


def pick_device(device: str | None) -> torch.device:
    """The asked device, or the GPU where there is one. Raises ConfigError for one that is not there."""
    try:
        picked = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"--device {device}: {str(error).splitlines()[0]}") from error
    if picked.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device}: only cpu and cuda devices are supported")
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {device}: this machine has {torch.cuda.device_count()} GPUs that torch can use")
    return picked


def pick_dtype(dtype: str | None, device: torch.device) -> torch.dtype | str:
    """The asked dtype, or the default for the device. Raises ConfigError for an unknown one."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    return parse_dtype(dtype)


def parse_dtype(dtype: str) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise ConfigError(f"--dtype must be one of {', '.join(known)}, found {dtype!r}")
    return known[dtype]


def check_results(out: Path | None, document: Path | None, *, charts: bool) -> None:
    """To be called before what takes long: whether its results can be written to the folder and the file asked for.

    Raises ConfigError for a document without a folder, and when matplotlib, which draws charts, is missing;
    OutputError for what cannot be written.
    """
    if out is None:
        if document is not None:
            raise ConfigError("--document is made from the results in a folder: name it with --out")
        return
    if charts:
        try:
            importlib.import_module("matplotlib.figure")
        except ImportError as error:
            install = "pip install 'polar-kernels[bench]'"
            raise ConfigError(f"--out draws charts, for which matplotlib is missing: {install} ({error})") from error
    _check_folder("--out", out)
    if document is not None:
        if os.path.isdir(document) or not (os.path.isdir(document.parent) or document.parent == out):
            raise OutputError(f"--document {document}: must be a file in a folder that is there")
        _check_folder("--document", document.parent)


def _check_folder(option: str, folder: Path) -> None:
    """Raise OutputError when a folder cannot be written to, or not be made.

    By os.path, which unlike Path says False, and does not raise, of what lies in a folder that may not be read.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(f"{option} {folder}: cannot be written: {there} is no folder that this user may write to")


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Raise OutputError when what is written in the block could not be."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{out}: the results could not be written: {error}") from error


def print_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=2))


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on stdout; all but the first column are right-aligned."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    console = Console()
    # A pipe or a file has no width to fit; a cut name in it would be useless.
    Console(width=None if console.is_terminal else 200).print(table)


def warn(warnings: list[str]) -> None:
    for warning in warnings:
        typer.echo(f"polar: warning: {warning}", err=True)


def rare_experts_warning(layer: str, experts: list[int]) -> str:
    listed = ", ".join(map(str, experts))
    return f"{layer}: experts {listed} saw fewer than {EXPERT_ROWS} tokens each, and were judged by all experts' tokens"


def megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"
