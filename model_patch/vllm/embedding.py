"""The embedding, split by rows, and the head tied to it."""

from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import DEFAULT_VOCAB_PADDING_SIZE, VocabParallelEmbedding

from model_patch.vllm.config import QuantizedWeight, VllmPolarConfig
from model_patch.vllm.parameters import add_linear_parameters, take_weights
from polar_kernels import PolarEmbedding


class PolarEmbeddingMethod(QuantizeMethodBase):
    """Serves an embedding by `PolarEmbedding`, and is multiplied by where the head is tied to it."""

    def __init__(self, weight: QuantizedWeight, serves_head: bool) -> None:
        self.weight, self.serves_head = weight, serves_head

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        self._rows, self._dim, self._dtype = output_partition_sizes, input_size_per_partition, params_dtype
        add_linear_parameters(layer, self.weight, self._rows, self._dim, attributes["weight_loader"])

    def process_weights_after_loading(self, layer: Any) -> None:
        if hasattr(layer, "polar"):  # a tied head is this very layer, and comes by twice
            return
        (weight,) = take_weights(layer, self.weight, self._rows, self._dim)
        layer.polar = PolarEmbedding.from_weight(weight, self._dtype)
        if self.serves_head:
            layer.polar.serve_head()

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        """Ids [...] of this rank's rows -> [..., embedding_dim]."""
        return layer.polar(input_)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., embedding_dim] -> logits [..., rows of this rank]."""
        return layer.polar.multiply(x, bias)


class TiedHeadMethod(QuantizeMethodBase):
    """Of a head that vLLM makes and then ties: it has no weight, and the embedding takes its place."""

    def create_weights(self, layer: Any, *sizes: Any, **attributes: Any) -> None:
        """Nothing to hold."""

    def tie_weights(self, layer: Any, embed_tokens: nn.Module) -> nn.Module:
        return embed_tokens

    def apply(self, layer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError("a tied head is served by the embedding")


def register_embedding() -> None:
    """Have vLLM make `_Embedding` where a model asks for an embedding. Harmless to call again."""
    # By vLLM's own way of replacing a layer, which it refuses a second time: if another plugin was first, Qwen3.5
    # cannot have its embedding quantised, and vLLM refuses the tensors.
    if VocabParallelEmbedding.__name__ not in op_registry_oot:
        VocabParallelEmbedding.register_oot(_Embedding)


class _Embedding(VocabParallelEmbedding):
    """vLLM's embedding, told of the quantisation by models that forget to: Qwen3.5."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        params_dtype: torch.dtype | None = None,
        org_num_embeddings: int | None = None,
        padding_size: int = DEFAULT_VOCAB_PADDING_SIZE,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        **more: Any,
    ) -> None:
        current = get_current_vllm_config().quant_config if quant_config is None else None
        if isinstance(current, VllmPolarConfig):
            quant_config = current
        super().__init__(
            num_embeddings,
            embedding_dim,
            params_dtype,
            org_num_embeddings,
            padding_size,
            quant_config,
            prefix,
            **more,
        )
