"""Decoder layers that take a token by few launches: norms with the quantisation of what they give, SiLU-multiply
likewise, residuals added by the products.

Only int8 products of few rows can be met half-way like this (`step_products`); layers with others stay as they are.
"""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from model_patch.decode.own_forward import own_forwards, own_modules
from model_patch.decode.step_products import Norm, group_of, multiply_normed, multiply_plain, norm_of, takes
from polar_kernels import PolarGroup, PolarLinear


@contextmanager
def layer_steps(model: PreTrainedModel) -> Iterator[None]:
    """The decoder layers of `model` that fit take one token at a time meanwhile."""
    steps = [(layer, step) for layer in own_modules(model, "DecoderLayer") if (step := LayerStep.of(layer)) is not None]
    forwards: list[tuple[nn.Module, Callable[..., Any]]] = []
    for layer, step in steps:
        forwards += [(layer, step.forward), (step.out, step.project)]
    with own_forwards(forwards):
        yield


class LayerStep:
    """What replaces the forward of a decoder layer, and that of its mixer's last projection."""

    def __init__(self, layer: Any, mixer: Any, group: PolarGroup, out: PolarLinear, norms: tuple[Norm, Norm]) -> None:
        self.layer, self.mixer, self.group, self.out = layer, mixer, group, out
        self._norms = norms
        self._mlp = Mlp.of(layer.mlp)
        self._own_forward, self._own_project = layer.forward, out.forward
        self._local = threading.local()  # residual: of this thread's call; another may call the projection meanwhile
        names = inspect.signature(type(mixer).forward).parameters
        # GatedDeltaNet of earlier versions of transformers took the cache by a name of its own.
        self._renamed = {"past_key_values": "cache_params"} if "cache_params" in names else {}

    @classmethod
    def of(cls, layer: Any) -> "LayerStep | None":
        """None where the layer is not built as those we know, or its projections are not quantised and grouped."""
        mixer: Any = getattr(layer, "linear_attn", None) or getattr(layer, "self_attn", None)
        if hasattr(mixer, "in_proj_qkv"):
            members, out = [mixer.in_proj_qkv, mixer.in_proj_z], mixer.out_proj
        elif hasattr(mixer, "q_proj"):
            members, out = [mixer.q_proj, mixer.k_proj, mixer.v_proj], mixer.o_proj
        else:
            return None
        group = group_of(members)
        before, after = (
            norm_of(getattr(layer, name, None)) for name in ("input_layernorm", "post_attention_layernorm")
        )
        if group is None or not isinstance(out, PolarLinear) or before is None or after is None:
            return None
        if not hasattr(layer, "mlp"):
            return None
        return cls(layer, mixer, group, out, (before, after))

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """hidden_states [rows, 1, width] -> the same shape. Anything else, as another thread may bring meanwhile, goes
        to the layer's own forward."""
        before, after = self._norms
        weight = self.group.tiled
        if args or not takes(hidden_states, before, weight, self.out.tiled):
            return self._own_forward(hidden_states, *args, **kwargs)
        assert weight is not None
        rows = hidden_states[:, 0]
        x = torch.empty_like(hidden_states)
        out_features = sum(member.out_features for member in self.group.members)
        self.group.hand_out(x, multiply_normed(rows, before, weight, out_features, x[:, 0])[:, None])
        self._local.residual = rows
        try:
            mixed = self.mixer(hidden_states=x, **{self._renamed.get(name, name): kwargs[name] for name in kwargs})
        finally:
            self._local.residual = None
        mixed = mixed[0] if isinstance(mixed, tuple) else mixed
        if self._mlp is not None and self._mlp.takes(mixed, after):
            return self._mlp.forward(mixed, after)
        y = self.layer.mlp(self.layer.post_attention_layernorm(mixed))
        return mixed + (y[0] if isinstance(y, tuple) else y)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """The mixer's last projection, with the residual added where this layer's forward left one."""
        residual = getattr(self._local, "residual", None)
        if residual is None:
            return self._own_project(x)
        return multiply_plain(x[:, 0], self.out, residual)[:, None]


@dataclass(frozen=True)
class Mlp:
    """silu(gate) * up and the projection of it, quantised, gate and up as one group."""

    group: PolarGroup
    down: PolarLinear

    @classmethod
    def of(cls, mlp: Any) -> "Mlp | None":
        members = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj")]
        group = group_of(members)
        silu = type(getattr(mlp, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
        down = getattr(mlp, "down_proj", None)
        return cls(group, down) if group is not None and silu and isinstance(down, PolarLinear) else None

    def takes(self, x: torch.Tensor, norm: Norm) -> bool:
        return takes(x, norm, self.group.tiled, self.down.tiled)

    def forward(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """x [rows, 1, width] plus the MLP of its norm."""
        weight = self.group.tiled
        assert weight is not None
        both = multiply_normed(x[:, 0], norm, weight, 2 * self.down.in_features, None)
        return multiply_plain(both, self.down, x[:, 0], gated=True)[:, None]
