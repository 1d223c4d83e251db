"""`polar env`: what to put into a bug report."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import typer

from model_patch.cli.options import AsJson, print_json
from polar_kernels.version import __version__

_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "safetensors",
    "huggingface_hub",
    "flash-linear-attention",
)


def env(as_json: AsJson = False) -> None:
    """Show the versions of what this depends on, and the GPUs."""
    found: dict[str, Any] = {"polar": __version__, "python": platform.python_version(), "system": platform.platform()}
    found |= {package: _version(package) for package in _PACKAGES}
    found["cuda"] = torch.version.cuda
    found["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if as_json:
        print_json(found)
        return
    for key, value in found.items():
        typer.echo(f"{key:24}{', '.join(value) or 'none' if isinstance(value, list) else value or 'not installed'}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
