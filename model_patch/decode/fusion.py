"""The elementwise code between the products of a step, as few kernels, by torch.compile.

Only small regions are compiled, each once for all layers: the whole step would take minutes. They are put in place for
the time of a capture, which records the kernels they launch; nothing of the compiler runs from token to token.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel

BACKEND = "inductor"
_CLASSES = ("RMSNorm", "RMSNormGated", "MLP")
# Function of a modelling file -> the package whose kernel takes its place where it is installed.
_FUNCTIONS = {
    "apply_rotary_pos_emb": None,
    "torch_recurrent_gated_delta_rule": "fla",
    "causal_conv1d_update": "causal_conv1d",
}
_SHAPES = 64  # of a region at the most: batch sizes times widths
_swapping = threading.Lock()


@contextmanager
def fused(model: PreTrainedModel) -> Iterator[None]:
    """The regions of `model`'s architecture compiled meanwhile, in the whole process. Their roundings stay."""
    with _swapping, torch._dynamo.config.patch(recompile_limit=_SHAPES, accumulated_recompile_limit=4 * _SHAPES):
        plain = [(owner, name, getattr(owner, name)) for owner, name in regions(model)]
        try:
            for owner, name, function in plain:
                setattr(owner, name, _compiled(function, BACKEND))
            yield
        finally:
            for owner, name, function in plain:
                setattr(owner, name, function)


def regions(model: PreTrainedModel) -> list[tuple[Any, str]]:
    """Where the regions are: (class, "forward") and (module, function)."""
    decoder = model.get_decoder()
    file = sys.modules[type(decoder).__module__]
    classes = {type(module) for module in decoder.modules() if type(module).__module__ == file.__name__}
    found: list[tuple[Any, str]] = [
        (kind, "forward") for kind in classes if kind.__name__.endswith(_CLASSES) and "Vision" not in kind.__name__
    ]
    for name, package in _FUNCTIONS.items():
        if hasattr(file, name) and (package is None or find_spec(package) is None):
            found.append((file, name))
    return sorted(found, key=lambda region: (region[1], getattr(region[0], "__name__", "")))


@cache
def _compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    # Without this option sums and products would skip the roundings to 16 bits in between, and tokens might differ.
    options: dict[str, Any] = {"emulate_precision_casts": True} if backend == "inductor" else {}
    return torch.compile(function, backend=backend, dynamic=False, options=options or None)
