"""Attention of one new token over a cache longer than what it holds: keys and values are read once, not once a head."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "polar_decode"


def decode_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [rows, heads, 1, dim], key and value [rows, kv_heads, length, dim], mask bool [rows, 1, 1, length]
    -> [rows, 1, heads, dim].

    On a GPU by `attention_step`; elsewhere the heads that share a key are queries of one head of torch's. Several new
    tokens, as another thread may bring while the name of this function is in the config, go to transformers' own.
    """
    rows, heads, length, dim = query.shape
    if length == 1 and query.is_cuda and attention_mask is not None:
        from model_patch.decode.attention_step import attention_step  # needs Triton, which CPUs go without

        scale = dim**-0.5 if scaling is None else scaling
        return attention_step(query[:, :, 0], key, value, attention_mask[:, 0, 0], scale)[:, None], None
    if length != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    grouped = query.reshape(rows, key.shape[1], -1, dim)
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(rows, 1, heads, -1), None


AttentionInterface.register(NAME, decode_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def decode_attention_of(config: PreTrainedConfig) -> Iterator[None]:
    """Layers built from `config` attend by `decode_attention` meanwhile."""
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
