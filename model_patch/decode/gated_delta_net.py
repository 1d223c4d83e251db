"""GatedDeltaNet layers that take a token by `delta_step`, in place of some twenty small kernels."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from model_patch.decode.own_forward import own_forwards, own_modules


@contextmanager
def delta_steps(model: PreTrainedModel) -> Iterator[None]:
    """The GatedDeltaNet layers of `model` that fit take one token at a time meanwhile; no other model's do."""
    layers = [layer for layer in own_modules(model, "GatedDeltaNet") if fits(layer)]
    with own_forwards([(layer, step_forward(layer, layer.forward)) for layer in layers]):
        yield


def fits(layer: Any) -> bool:
    """Whether the kernels compute what the layer does: SiLU, no bias, plain gates, its own file's norm, one dtype."""
    plain_gates = all(type(gate) is nn.Linear and gate.bias is None for gate in (layer.in_proj_a, layer.in_proj_b))
    own_norm = type(layer.norm).__module__ == type(layer).__module__
    one_dtype = len({layer.norm.weight.dtype, layer.conv1d.weight.dtype, layer.in_proj_a.weight.dtype}) == 1
    return layer.activation == "silu" and layer.conv1d.bias is None and plain_gates and own_norm and one_dtype


def step_forward(layer: Any, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A forward of `layer` for one token over a cache, hidden_states [rows, 1, width] -> the same shape. Anything else,
    as another thread may bring meanwhile, goes to `original`."""
    from model_patch.decode.delta_step import delta_step  # needs Triton, which CPUs go without

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Later versions of transformers renamed `cache_params`.
        cache: Any = kwargs.get("cache", kwargs.get("cache_params"))
        if hidden_states.shape[1] != 1 or cache is None or not cache.has_previous_state(layer.layer_idx):
            return original(hidden_states, *args, **kwargs)
        state = cache.layers[layer.layer_idx]
        if getattr(state, "record_past", False):  # assisted decoding keeps what it may have to take back
            return original(hidden_states, *args, **kwargs)
        out = delta_step(
            hidden_states[:, 0].contiguous(),
            layer.in_proj_qkv(hidden_states)[:, 0],
            layer.in_proj_z(hidden_states)[:, 0],
            state.conv_states[0],
            state.recurrent_states[0],
            layer.conv1d.weight[:, 0],
            layer.in_proj_a.weight,
            layer.in_proj_b.weight,
            layer.A_log,
            layer.dt_bias,
            layer.norm.weight,
            layer.norm.variance_epsilon,
        )
        return layer.out_proj(out[:, None])

    return forward
