"""The experts of a mixture, each split among the ranks as an MLP is."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase

from model_patch.checkpoint.experts import FUSED
from model_patch.errors import CheckpointError, UnsupportedModelError
from model_patch.vllm.config import QuantizedWeight
from model_patch.vllm.parameters import check_split, take_weights
from polar_kernels import BLOCK_SIZE, PolarExpertProjection, PolarExperts
from polar_kernels.hadamard import padded_size
from polar_kernels.packing import packed_size


class PolarExpertsMethod(FusedMoEMethodBase):
    """Serves vLLM's routed experts by `PolarExperts`; routing and the sum over ranks are vLLM's."""

    def __init__(self, moe: Any, gate_up: QuantizedWeight, down: QuantizedWeight) -> None:
        super().__init__(moe)
        self.gate_up, self.down = gate_up, down

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """gate_up_proj [E, 2 * I, H] and down_proj [E, H, I], I of this rank, as modules of the checkpoint's names."""
        self._check(layer, intermediate_size_per_partition)
        self._shape = num_experts, hidden_size, intermediate_size_per_partition
        middle = intermediate_size_per_partition
        layer.gate_up_proj = _empty_projection(num_experts, 2 * middle, hidden_size, self.gate_up)
        layer.down_proj = _empty_projection(num_experts, hidden_size, middle, self.down)
        layer.load_weights = partial(_load_weights, layer, {})

    def _check(self, layer: Any, middle: int) -> None:
        parallel = layer.moe_config.moe_parallel_config
        if parallel.use_ep:
            raise UnsupportedModelError(
                f"{layer.layer_name}: each expert is split among the GPUs: leave out --enable-expert-parallel"
            )
        check_split(self.down.name, middle * parallel.tp_size, middle)
        if layer.activation.value != "silu" or layer.apply_router_weight_on_input:
            raise UnsupportedModelError(f"{layer.layer_name}: experts must have SiLU, and weights on their outputs")

    def process_weights_after_loading(self, layer: Any) -> None:
        count, hidden, middle = self._shape
        (gate_up,) = take_weights(layer.gate_up_proj, self.gate_up, [count * 2 * middle], hidden)
        (down,) = take_weights(layer.down_proj, self.down, [count * hidden], middle)
        del layer.gate_up_proj, layer.down_proj
        projections = (PolarExpertProjection.from_weight(weight, count) for weight in (gate_up, down))
        layer.polar = PolarExperts(*projections)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: for vLLM's own kernels."""

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [T, H], topk_ids and topk_weights [T, k] -> this rank's part of the sum [T, H]."""
        return layer.polar(x, topk_ids, topk_weights)


def _empty_projection(count: int, rows: int, columns: int, weight: QuantizedWeight) -> nn.Module:
    """A module to load the stored form of weights [count, rows, columns] into."""
    projection = nn.Module()
    blocks = padded_size(columns) // BLOCK_SIZE
    parts = {
        "packed": torch.zeros(count, rows, packed_size(blocks * BLOCK_SIZE, weight.bits), dtype=torch.uint8),
        "norms": torch.zeros(count, rows, blocks, dtype=torch.float16),
    }
    if weight.awq:
        parts["awq_scales"] = torch.ones(1, columns, dtype=torch.float16)
    for name, tensor in parts.items():
        projection.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return projection


def _load_weights(
    layer: Any, shared: dict[str, tuple[str, torch.Tensor]], weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[str]:
    """Read `gate_up_proj.packed` and its like, of all experts, or `3.up_proj.packed`, of one, in place of vLLM's own
    loader, which knows other names.

    shared: the first of the scales that single experts have alike, kept from call to call, of which shards ask several.
    """
    rank = layer.moe_config.moe_parallel_config.tp_rank
    for name, loaded in weights:
        projection, _, part = name.rpartition(".")
        expert, _, single = projection.rpartition(".")
        fused = next((target for target, leaves in FUSED.items() if single in leaves), single)
        parameter = f"{fused}.{part}"
        target = layer.get_submodule(fused).get_parameter(part).data
        if not expert:
            target.copy_(_own_part(fused, loaded, target.shape, rank))
        elif part == "awq_scales":
            first, known = shared.setdefault(parameter, (name, loaded))
            if not torch.equal(known, loaded):
                problem = f"{name} must be equal to {first}: all experts of a layer share it"
                raise CheckpointError(layer.layer_name, problem)
            target.copy_(_own_part(fused, loaded, target.shape, rank))
        else:
            leaves = FUSED[fused]
            own = target[int(expert)].chunk(len(leaves))[leaves.index(single)]
            axis = 0 if len(leaves) > 1 else 1  # gate and up are split by rows, down by columns
            own.copy_(loaded.narrow(axis, rank * own.shape[axis], own.shape[axis]))
        yield parameter


def _own_part(projection: str, loaded: torch.Tensor, shape: torch.Size, rank: int) -> torch.Tensor:
    """This rank's part of a tensor of all experts: rows of gate and of up, or columns of down."""
    if loaded.dim() == 3 and projection == "gate_up_proj":
        own = shape[1] // 2
        return loaded.unflatten(1, (2, -1))[:, :, rank * own : (rank + 1) * own].flatten(1, 2)
    return loaded if loaded.shape[-1] == shape[-1] else loaded.narrow(-1, rank * shape[-1], shape[-1])
