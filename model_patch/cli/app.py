"""The app: its subcommands, and how their errors become exit codes.

0: done. 1: a `PolarError` or an interruption, in one line; `--debug` anywhere on the line shows the traceback.
2: wrong usage.
"""

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from model_patch.cli.ablate import ablate
from model_patch.cli.bench import bench
from model_patch.cli.chat import chat
from model_patch.cli.convert import convert
from model_patch.cli.demo import demo
from model_patch.cli.dequantize import dequantize
from model_patch.cli.env import env
from model_patch.cli.generate import generate
from model_patch.cli.inspect import inspect
from model_patch.cli.ppl import ppl
from model_patch.cli.quantize import quantize
from model_patch.cli.serve import serve
from model_patch.cli.verify import verify
from polar_kernels import PolarError
from polar_kernels.version import __version__


class _Commands(TyperGroup):
    """The subcommands, whose interruption comes out as a PolarError; Typer itself would leave without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise PolarError("interrupted") from error


app = typer.Typer(
    name="polar", cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
for command in (
    quantize,
    inspect,
    verify,
    generate,
    chat,
    serve,
    ppl,
    ablate,
    dequantize,
    convert,
    env,
    demo,
):
    app.command()(command)
app.add_typer(bench)


def _version(shown: bool) -> None:
    if shown:
        typer.echo(f"polar {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show an error's traceback; anywhere on the line.")] = False,
) -> None:
    """Quantise Qwen models to PolarQuant weights, and look at, load, run and measure what comes out."""


def main() -> None:
    """Entry point of the console script."""
    debug = "--debug" in sys.argv
    try:
        app(args=[arg for arg in sys.argv[1:] if arg != "--debug"])
    except PolarError as error:
        if debug:
            raise
        typer.echo(f"polar: {error}", err=True)
        sys.exit(1)
