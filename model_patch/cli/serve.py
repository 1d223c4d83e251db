"""`polar serve`: an OpenAI-compatible server."""

import socket
from typing import Annotated

import typer
from transformers import PreTrainedModel

from model_patch.cli.decoding import load_for_decoding
from model_patch.cli.options import (
    Accelerated,
    Device,
    DType,
    Exact,
    Folder,
    pick_device,
    pick_dtype,
    warn,
)
from model_patch.errors import ConfigError

_LOCAL = ("127.0.0.1", "::1", "localhost")


def serve(
    folder: Folder,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 8000,
    max_length: Annotated[
        int, typer.Option(min=2, help="Tokens of prompt and answer together that are decoded by graphs, if any are.")
    ] = 8192,
    continuous_batching: Annotated[
        bool, typer.Option("--continuous-batching", help="Decode requests together, by transformers; not Qwen3.5.")
    ] = False,
    device: Device = None,
    dtype: DType = None,
    exact: Exact = False,
    accelerated: Accelerated = None,
) -> None:
    """Serve the model in DIR at http://HOST:PORT/v1: chat completions, streamed or whole. Ctrl-C stops."""
    from model_patch.serve import serve as run

    if continuous_batching and accelerated:
        raise ConfigError("--continuous-batching decodes by transformers' own paged cache: leave out --accelerated")
    target = pick_device(device)
    as_dtype = pick_dtype(dtype, target)
    _check_free(host, port)
    if host not in _LOCAL:
        warn([f"anyone who reaches {host} can use this server: it asks for no key"])

    def load() -> PreTrainedModel:
        by_steps = False if continuous_batching else accelerated
        model = load_for_decoding(folder, target, as_dtype, exact=exact, accelerated=by_steps, max_length=max_length)
        typer.echo(f"{folder} at http://{f'[{host}]' if ':' in host else host}:{port}/v1, Ctrl-C stops", err=True)
        return model

    try:
        run(folder, load, host=host, port=port, continuous_batching=continuous_batching)
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)


def _check_free(host: str, port: int) -> None:
    """Raise ConfigError when nothing can listen there, before a model is loaded."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: {error.strerror or error}") from error
