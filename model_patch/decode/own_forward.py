"""Modules of a model's own architecture, with another forward for a while."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def own_modules(model: PreTrainedModel, ending: str | tuple[str, ...]) -> list[Any]:
    """The modules of the decoder whose class is in the decoder's own file, with a name that ends so."""
    decoder = model.get_decoder()
    file = sys.modules[type(decoder).__module__].__name__
    return [
        module
        for module in decoder.modules()
        if type(module).__module__ == file and type(module).__name__.endswith(ending)
    ]


@contextmanager
def own_forwards(forwards: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Each module with this forward in place of its class's, or of what it had of its own."""
    before = [module.__dict__.get("forward") for module, _ in forwards]
    try:
        for module, forward in forwards:
            module.forward = forward
        yield
    finally:
        for (module, _), own in zip(forwards, before, strict=True):
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = own
