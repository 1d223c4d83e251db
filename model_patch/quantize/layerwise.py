"""A model run layer by layer: each over all windows before the next, forwards and, from the last to the first, back.

A layer that is on disk is so read once for each direction, whatever the number of windows. What layers pass on, the
residual stream of all windows, is kept between them; backwards, a layer is run again from what it read.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from model_patch.architectures import canonical
from model_patch.checkpoint.reader import Checkpoint
from model_patch.quantize.storage import roomy_empty

_TOKENS, _ELEMENTS = 1 << 15, 1 << 25  # at most, of what a layer is run on at a time
_LOGIT_BYTES = 1 << 30  # of the head's fp32 logits at a time, of which running backwards holds a few

Told = Callable[[int], None]  # called with the number of windows after each batch of them


class LayerwiseRun:
    """Token windows [W, T] of one model, whose layers are read from `checkpoint` where they are on the meta device."""

    def __init__(self, model: PreTrainedModel, windows: torch.Tensor, checkpoint: Checkpoint | None = None) -> None:
        decoder = model.get_decoder()
        self.layers: list[nn.Module] = list(decoder.layers)
        self._model, self._windows, self._checkpoint = model, windows, checkpoint
        self._norm, self._head, self._embedding = decoder.norm, model.get_output_embeddings(), decoder.embed_tokens
        self.device = self._head.weight.device
        count, window = windows.shape
        self._batches = _spans(count, min(_TOKENS, _ELEMENTS // self._embedding.weight.shape[1]) // window)
        self._head_batches = _spans(count, _LOGIT_BYTES // (4 * window * self._head.weight.shape[0]))
        self._arguments: dict[int, list[dict[str, Any]]] = {}

    @property
    def steps(self) -> int:
        """Windows through layers, in one direction."""
        return len(self.layers) * len(self._windows)

    @torch.no_grad()
    def forward(self, told: Told) -> None:
        """Run all layers, and the head on the last token of each window, for the hooks that are on them."""
        stream = self._embedded()
        for index in range(len(self.layers)):
            self._run_layer(index, stream, stream, told)
        for span in self._batches:
            self._head(self._norm(stream[span, -1:].to(self.device)))

    @torch.enable_grad()
    def back_and_forth(self, loss: Callable[[torch.Tensor], torch.Tensor], after: Told, told: Told) -> None:
        """Run all layers, then the head and the layers with a gradient, backwards, from loss(logits [B * T, V]).

        after: called when a batch has gone back through the head or a layer, and with it through the hooks there. told:
        likewise, and forwards; 2 * `steps` windows in all.
        """
        streams = [self._embedded()]
        for index in range(len(self.layers)):
            streams.append(self._like(streams[0]))
            self._run_layer(index, streams[index], streams[index + 1], told)
        gradient = streams.pop()  # in whose place it is written, batch by batch
        for span in self._head_batches:
            x = gradient[span].to(self.device).requires_grad_()
            loss(self._head(self._norm(x)).flatten(0, 1)).backward()
            gradient[span] = _gradient(x)
            after(_length(span))
        for index in reversed(range(len(self.layers))):
            read = streams.pop()
            with self._held(index) as layer:
                for span in self._batches:
                    x = read[span].to(self.device).requires_grad_()
                    layer(x, **self._arguments_of(index, span)).backward(gradient[span].to(self.device))
                    gradient[span] = _gradient(x)
                    after(_length(span))
                    told(_length(span))

    def _embedded(self) -> torch.Tensor:
        weight = self._embedding.weight
        stream = roomy_empty((*self._windows.shape, weight.shape[1]), weight.dtype, self.device)
        with torch.no_grad():
            for span in self._batches:
                stream[span] = self._embedding(self._windows[span].to(self.device))
        return stream

    def _like(self, stream: torch.Tensor) -> torch.Tensor:
        return roomy_empty(tuple(stream.shape), stream.dtype, self.device)

    @torch.no_grad()
    def _run_layer(self, index: int, read: torch.Tensor, written: torch.Tensor, told: Told) -> None:
        with self._held(index) as layer:
            for span in self._batches:
                written[span] = layer(read[span].to(self.device), **self._arguments_of(index, span))
                told(_length(span))

    @contextmanager
    def _held(self, index: int) -> Iterator[nn.Module]:
        """A layer with its weights in memory."""
        layer = self.layers[index]
        if not any(parameter.is_meta for parameter in layer.parameters()):
            yield layer
            return
        assert self._checkpoint is not None  # a model with layers on the meta device comes with one
        prefix = next(name for name, module in self._model.named_modules() if module is layer)
        load_weights(layer, prefix, self._checkpoint, self.device)
        try:
            yield layer
        finally:
            layer.to("meta")

    def _arguments_of(self, index: int, span: slice) -> dict[str, Any]:
        """What the model gives a layer beside the residual stream: of whole windows the same for all of them."""
        if _length(span) not in self._arguments:
            self._arguments[_length(span)] = self._find_arguments(span)
        return self._arguments[_length(span)][index]

    @torch.no_grad()
    def _find_arguments(self, span: slice) -> list[dict[str, Any]]:
        """By running the model with layers that do nothing."""
        found: list[dict[str, Any]] = []

        def note(stream: torch.Tensor, **arguments: Any) -> torch.Tensor:
            found.append(arguments)
            return stream

        for layer in self.layers:
            layer.forward = note
        try:
            self._model.get_decoder()(self._windows[span].to(self.device), use_cache=False)
        finally:
            for layer in self.layers:
                del layer.forward
        return found


def load_weights(
    module: nn.Module, prefix: str, checkpoint: Checkpoint, device: torch.device, skip: tuple[str, ...] = ()
) -> None:
    """Read the weights of `module`, named `prefix` in its model, in their present dtypes; `skip`: beginnings of names
    in the module that are left."""
    stored = {canonical(name): name for name in checkpoint.tensors}
    state = {
        name: checkpoint.read(stored[key], device).to(tensor.dtype)
        for name, tensor in module.state_dict().items()
        if not name.startswith(skip or "\0") and (key := canonical(f"{prefix}.{name}" if prefix else name)) in stored
    }
    module.load_state_dict(state, strict=False, assign=True)


def _gradient(x: torch.Tensor) -> torch.Tensor:
    assert x.grad is not None  # it was run back to
    return x.grad


def _length(span: slice) -> int:
    return span.stop - span.start


def _spans(count: int, size: int) -> list[slice]:
    size = max(1, size)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
