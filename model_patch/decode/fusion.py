"""The elementwise code between the products of a step, as few kernels, by torch.compile.

Only small regions are compiled, each once for all layers: the whole step would take minutes. They are put in place for
the time of a capture, which records the kernels they launch; nothing of the compiler runs from token to token.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from model_patch.decode.own_forward import own_modules

BACKEND = "inductor"
_CLASSES = ("RMSNorm", "MLP")
_FUNCTIONS = ("apply_rotary_pos_emb",)
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
    file = sys.modules[type(model.get_decoder()).__module__]
    classes = [(kind, "forward") for kind in {type(module) for module in own_modules(model, _CLASSES)}]
    functions = [(file, name) for name in _FUNCTIONS if hasattr(file, name)]
    return sorted([*classes, *functions], key=lambda region: (region[1], region[0].__name__))


@cache
def _compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    # Without this option sums and products would skip the roundings to 16 bits in between, and tokens might differ.
    options: dict[str, Any] = {"emulate_precision_casts": True} if backend == "inductor" else {}
    return torch.compile(function, backend=backend, dynamic=False, options=options or None)
