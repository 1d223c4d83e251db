"""GatedDeltaNet layers that take a token by `delta_step`, in place of some twenty small kernels."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from model_patch.decode.delta_step import delta_step

_swapping = threading.Lock()


@contextmanager
def delta_steps(model: PreTrainedModel) -> Iterator[None]:
    """The GatedDeltaNet layers of `model`'s architecture, in the whole process, take one token at a time meanwhile."""
    kinds = {type(layer) for layer in delta_layers(model)}
    with _swapping:
        plain = {kind: kind.forward for kind in kinds}
        try:
            for kind, forward in plain.items():
                kind.forward = step_forward(forward)
            yield
        finally:
            for kind, forward in plain.items():
                kind.forward = forward


def delta_layers(model: PreTrainedModel) -> list[Any]:
    decoder = model.get_decoder()
    file = sys.modules[type(decoder).__module__]
    return [
        module
        for module in decoder.modules()
        if type(module).__module__ == file.__name__ and type(module).__name__.endswith("GatedDeltaNet")
    ]


def fits(layer: Any) -> bool:
    """Whether the kernels compute what the layer does: SiLU, no bias, plain gates, its own file's norm, one dtype."""
    plain_gates = all(type(gate) is nn.Linear and gate.bias is None for gate in (layer.in_proj_a, layer.in_proj_b))
    own_norm = type(layer.norm).__module__ == type(layer).__module__
    one_dtype = len({layer.norm.weight.dtype, layer.conv1d.weight.dtype, layer.in_proj_a.weight.dtype}) == 1
    return layer.activation == "silu" and layer.conv1d.bias is None and plain_gates and own_norm and one_dtype


def step_forward(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A forward for one token over a cache, hidden_states [rows, 1, width] -> the same shape. Layers that do not fit,
    and anything else, as another thread may bring meanwhile, go to `original`."""

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Later versions of transformers renamed `cache_params`.
        cache: Any = kwargs.get("cache", kwargs.get("cache_params"))
        one_token = hidden_states.shape[1] == 1 and cache is not None and cache.has_previous_state(self.layer_idx)
        if not one_token or not fits(self):
            return original(self, hidden_states, *args, **kwargs)
        state = cache.layers[self.layer_idx]
        hidden = hidden_states[:, 0].contiguous()
        out = delta_step(
            hidden,
            self.in_proj_qkv(hidden),
            self.in_proj_z(hidden),
            state.conv_states[0],
            state.recurrent_states[0],
            self.conv1d.weight[:, 0],
            self.in_proj_a.weight,
            self.in_proj_b.weight,
            self.A_log,
            self.dt_bias,
            self.norm.weight,
            self.norm.variance_epsilon,
        )
        return self.out_proj(out[:, None])

    return forward
