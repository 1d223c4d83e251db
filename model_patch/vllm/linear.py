"""Linear layers and the untied head, column- or row-parallel, merged or not."""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method

from model_patch.vllm.config import QuantizedWeight
from model_patch.vllm.parameters import add_linear_parameters, check_split, take_weights
from polar_kernels import PolarLinear


@register_weight_loader_v2_supported_method
class PolarLinearMethod(LinearMethodBase):
    """Serves one of vLLM's linear layers, or a head, by `PolarLinear`.

    Layers that vLLM merges (q, k, v; gate, up; GatedDeltaNet qkv, z) are one product with one rotation; where their AWQ
    scales differ, one for each.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        self.weight = weight

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
        check_split(self.weight.name, input_size, input_size_per_partition)
        self._rows, self._in_features = output_partition_sizes, input_size_per_partition
        add_linear_parameters(layer, self.weight, self._rows, self._in_features, attributes["weight_loader"])

    def process_weights_after_loading(self, layer: Any) -> None:
        weights = take_weights(layer, self.weight, self._rows, self._in_features)
        layer.polar = nn.ModuleList(PolarLinear.from_weight(weight) for weight in weights)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K of this rank] -> [..., rows of this rank]."""
        if len(layer.polar) == 1:
            return layer.polar[0].multiply(x, bias)
        y = torch.cat([part.multiply(x, None) for part in layer.polar], -1)
        return y if bias is None else y + bias
