"""What a decoding step reads and writes, at addresses that stay: the new tokens, their places, and the cache.

Storages hold `rows` sequences of `length` tokens. A step sees the first rows and tokens of them, so that short batches
and short sequences cost what they take up.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from model_patch.errors import UnsupportedModelError


class _FixedLayer(CacheLayerMixin):
    """Keys and values [rows, kv_heads, length, dim]; a step writes one token into `slot` [1]."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, slot: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.slot = keys, values, slot
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is left to do: it was made whole."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys.index_copy_(2, self.slot, key_states)
        self.values.index_copy_(2, self.slot, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_max_length(), 0

    def get_seq_length(self) -> torch.Tensor:
        return self.slot

    def get_max_length(self) -> int:
        return self.keys.shape[2]


@dataclass(frozen=True)
class _Attention:
    """keys, values: [rows, kv_heads, length, dim]."""

    keys: torch.Tensor
    values: torch.Tensor

    def view(self, rows: int, length: int, slot: torch.Tensor) -> CacheLayerMixin:
        return _FixedLayer(self.keys[:rows, :, :length], self.values[:rows, :, :length], slot)

    def load(self, layer: DynamicLayer, rows: int) -> None:
        used = layer.keys.shape[2]
        for storage, told in ((self.keys, layer.keys), (self.values, layer.values)):
            storage[:rows, :, :used].copy_(told)
            storage[:rows, :, used:].zero_()  # masked tokens weigh nothing, but nothing times NaN is NaN

    def store(self, layer: DynamicLayer, rows: int, length: int) -> None:
        layer.keys = self.keys[:rows, :, :length].clone()
        layer.values = self.values[:rows, :, :length].clone()


@dataclass(frozen=True)
class _Recurrent:
    """conv: [rows, channels, kernel]; recurrent: [rows, heads, key_dim, value_dim]."""

    conv: torch.Tensor
    recurrent: torch.Tensor

    def view(self, rows: int, length: int, slot: torch.Tensor) -> LinearAttentionLayer:
        layer = LinearAttentionLayer()
        layer.device, layer.dtype = self.conv.device, self.conv.dtype
        layer.conv_states[0], layer.recurrent_states[0] = self.conv[:rows], self.recurrent[:rows]
        layer.conv_kernel_size[0] = self.conv.shape[-1]
        layer.is_conv_states_initialized[0] = layer.is_recurrent_states_initialized[0] = True
        layer.has_previous_state[0] = True
        return layer

    def load(self, layer: LinearAttentionLayer, rows: int) -> None:
        self.conv[:rows].copy_(layer.conv_states[0])
        self.recurrent[:rows].copy_(layer.recurrent_states[0])

    def store(self, layer: LinearAttentionLayer, rows: int, length: int) -> None:
        layer.conv_states[0].copy_(self.conv[:rows])
        layer.recurrent_states[0].copy_(self.recurrent[:rows])


class DecodeState:
    """tokens [rows, 1]; slot [1], where the next token is kept; positions [..., rows, 1], its rotary positions;
    mask [rows, 1, 1, length], the tokens it attends to."""

    def __init__(self, model: PreTrainedModel, cache_name: str, rows: int, length: int) -> None:
        device = model.device
        prompt = torch.zeros(1, 2, dtype=torch.long, device=device)
        places = model._prepare_position_ids_for_generation(prompt, {})
        self.rows, self.length = rows, length
        self.tokens = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.slot = torch.zeros(1, dtype=torch.long, device=device)
        self.positions = torch.zeros(*places.shape[:-2], rows, 1, dtype=torch.long, device=device)
        self.mask = torch.zeros(rows, 1, 1, length, dtype=torch.bool, device=device)
        # A first prompt tells the shapes and dtypes of what the layers keep.
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        model(input_ids=prompt, use_cache=True, logits_to_keep=1, **{cache_name: cache})
        self._layers = [_storage(index, layer, rows, length) for index, layer in enumerate(cache.layers)]

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        return sum(tensor.nbytes for layer in self._layers for tensor in vars(layer).values())

    def view(self, rows: int, length: int) -> Cache:
        """A cache of the first `rows` sequences and `length` tokens, for one new token at a time."""
        return Cache(layers=[layer.view(rows, length, self.slot) for layer in self._layers])

    def load(self, cache: Cache, rows: int, mask: torch.Tensor | None, positions: torch.Tensor) -> None:
        """Go on from prompts: `cache` holds them, mask [rows, tokens] is 0 where they are padded, positions
        [..., rows or 1, tokens] are their rotary positions."""
        length = cache.get_seq_length()
        for storage, layer in zip(self._layers, cache.layers, strict=True):
            storage.load(layer, rows)
        self.slot.fill_(length)
        self.positions[..., :rows, :].copy_(positions[..., -1:] + 1)
        self.mask.zero_()
        self.mask[:rows, 0, 0, :length] = True if mask is None else mask[:, :length].bool()

    def store(self, cache: Cache, rows: int, length: int) -> None:
        """Bring `cache`, which was loaded, up to `length` tokens."""
        for storage, layer in zip(self._layers, cache.layers, strict=True):
            storage.store(layer, rows, length)


def _storage(index: int, layer: Any, rows: int, length: int) -> _Attention | _Recurrent:
    """Storage for what `layer` keeps, from the shapes it has for one sequence."""
    if type(layer) is DynamicLayer:
        _, heads, _, key_dim = layer.keys.shape
        value_dim = layer.values.shape[-1]
        return _Attention(
            layer.keys.new_zeros(rows, heads, length, key_dim), layer.values.new_zeros(rows, heads, length, value_dim)
        )
    if isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(layer, CacheLayerMixin):
        conv, recurrent = layer.conv_states[0], layer.recurrent_states[0]
        return _Recurrent(conv.new_zeros(rows, *conv.shape[1:]), recurrent.new_zeros(rows, *recurrent.shape[1:]))
    raise UnsupportedModelError(
        f"layer {index} keeps its past in a {type(layer).__name__}; accelerate knows full attention and GatedDeltaNet"
    )
