"""`polar verify`: is a quantised checkpoint whole, and how far is it from its source."""

from dataclasses import asdict
from typing import Annotated

import typer

from model_patch.cli.options import AsJson, Device, Folder, pick_device, print_json, print_table
from model_patch.load import find_checkpoint
from model_patch.progress import progress_bar
from model_patch.verify import Verification, verify_checkpoint


def verify(
    folder: Folder,
    against: Annotated[str | None, typer.Option(metavar="SOURCE", help="The checkpoint it was made from.")] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Check every tensor of a quantised checkpoint, and with --against the squared error of its weights.

    Exit code 1 and the list of problems when anything is wrong.
    """
    source = None if against is None else find_checkpoint(against)
    with progress_bar("verify") as progress:
        result = verify_checkpoint(find_checkpoint(folder), source, pick_device(device), progress)
    if as_json:
        print_json(asdict(result))
    else:
        _print(folder, result)


def _print(folder: str, result: Verification) -> None:
    if result.layer_errors:
        rows = [[name, str(result.layers[name]), f"{error:.6f}"] for name, error in result.layer_errors.items()]
        print_table("Squared error of the weights, relative to their square", ["layer", "bits", "error"], rows)
        typer.echo(f"linear weights together: {result.linear_error:.6f}")
    typer.echo(f"{folder}: {len(result.layers)} quantised layers and {result.plain_tensors} plain tensors are sound")
