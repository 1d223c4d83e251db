"""One token through GatedDeltaNet between its projections, written so that torch.compile makes few kernels of it.

The same sums and roundings as transformers' forward; but the states are updated where they are, in the pass that reads
them, and not copied into place afterwards.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

_L2_EPSILON = 1e-6


def recurrence(
    qkv: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    a: torch.Tensor,
    conv: torch.Tensor,
    state: torch.Tensor,
    layer: Any,
) -> torch.Tensor:
    """qkv [rows, 1, channels], z [rows, 1, heads * value_dim], b and a [rows, 1, heads] of one token, its new place in
    conv [rows, channels, kernel] and state fp32 [rows, heads, key_dim, value_dim] -> [rows, 1, heads * value_dim]."""
    rows, heads, key_dim, value_dim = state.shape
    window = torch.cat([conv[..., 1:], qkv.transpose(1, 2)], dim=-1)
    conv.copy_(window)
    taps = window.float() * layer.conv1d.weight.squeeze(1).float()
    mixed = F.silu(taps.sum(-1).to(qkv.dtype))
    query, key, value = mixed.float().split([layer.key_dim, layer.key_dim, layer.value_dim], dim=-1)
    query, key = (_normalized(x.view(rows, -1, key_dim), heads) for x in (query, key))
    query = query * key_dim**-0.5
    value = value.view(rows, heads, value_dim)
    decay = (-layer.A_log.float().exp() * F.softplus(a.float() + layer.dt_bias)).exp().view(rows, heads, 1, 1)
    strength = b.sigmoid().float().view(rows, heads, 1)
    kept = state * decay
    change = (value - (kept * key[..., None]).sum(-2)) * strength
    updated = kept + key[..., None] * change[..., None, :]
    state.copy_(updated)
    out = (updated * query[..., None]).sum(-2).to(qkv.dtype)
    return layer.norm(out, z.view(rows, heads, value_dim)).view(rows, 1, -1)


def _normalized(x: torch.Tensor, heads: int) -> torch.Tensor:
    """x [rows, key_heads, key_dim] -> [rows, heads, key_dim] of length 1; each head serves the values next to it."""
    unit = x * torch.rsqrt((x * x).sum(-1, keepdim=True) + _L2_EPSILON)
    return unit.repeat_interleave(heads // x.shape[1], dim=1)


def decode_forward(original: Callable[..., Any], between: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """A forward of the layer that takes `between`, which is `recurrence` or what was compiled of it, for one token over
    a cache; anything else, as another thread may bring meanwhile, goes to `original`."""

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        cache = kwargs.get("cache", kwargs.get("cache_params"))
        if hidden_states.shape[1] != 1 or cache is None or not cache.has_previous_state(self.layer_idx):
            return original(self, hidden_states, *args, **kwargs)
        states = cache.layers[self.layer_idx]
        projected = [p(hidden_states) for p in (self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a)]
        return self.out_proj(between(*projected, states.conv_states[0], states.recurrent_states[0], self))

    return forward
