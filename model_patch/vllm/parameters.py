"""The stored form of a weight as parameters that vLLM's loaders fill with the part of this rank."""

from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.model_executor.parameter import GroupQuantScaleParameter, ModelWeightParameter
from vllm.model_executor.utils import set_weight_attrs

from model_patch.errors import CheckpointError, UnsupportedModelError
from model_patch.vllm.config import QuantizedWeight
from polar_kernels import BLOCK_SIZE, PolarWeight
from polar_kernels.hadamard import padded_size
from polar_kernels.packing import packed_size

_QKV = {"q": 0, "k": 1, "v": 2}
_PARTS = ("packed", "norms", "awq_scales")


def check_split(name: str, in_features: int, own: int) -> None:
    """Raise UnsupportedModelError where ranks would split a 128-block. own: this rank's of the in_features."""
    if own == in_features or own % BLOCK_SIZE == 0:
        return
    ranks = in_features // own
    fitting = [n for n in range(1, ranks) if in_features % (n * BLOCK_SIZE) == 0]
    raise UnsupportedModelError(
        f"{name}: {in_features} in_features over {ranks} ranks are {own} each, which must be a multiple of "
        f"{BLOCK_SIZE}: set --tensor-parallel-size to one of {fitting or [1]}"
    )


def add_linear_parameters(layer: Any, weight: QuantizedWeight, rows: list[int], in_features: int, loader: Any) -> None:
    """Give a layer packed, norms and, with AWQ, awq_scales [parts, K], whose parts of `rows` rows vLLM has merged.

    in_features: this rank's. loader: the layer's own, which knows where the rows of a part go.
    """
    blocks, count = padded_size(in_features) // BLOCK_SIZE, sum(rows)
    packed = torch.zeros(count, packed_size(blocks * BLOCK_SIZE, weight.bits), dtype=torch.uint8)
    norms = torch.zeros(count, blocks, dtype=torch.float16)
    # Split along the columns by their own width, they are so between blocks.
    place = {"input_dim": 1, "output_dim": 0, "weight_loader": loader}
    layer.register_parameter("packed", ModelWeightParameter(data=packed, **place))
    layer.register_parameter("norms", GroupQuantScaleParameter(data=norms, **place))
    if weight.awq:
        scales = nn.Parameter(torch.ones(len(rows), in_features, dtype=torch.float16), requires_grad=False)
        # vLLM's loaders would write the scales of one part over those of another.
        set_weight_attrs(scales, {"weight_loader": partial(_load_scales, layer)})
        layer.register_parameter("awq_scales", scales)


def _load_scales(
    layer: Any, parameter: nn.Parameter, loaded: torch.Tensor, shard: str | int | tuple[int, ...] | None = None
) -> None:
    """Put awq_scales [K] into the rows of awq_scales [parts, K of this rank] that the parts `shard` have."""
    own = parameter.shape[1]
    if own != len(loaded):
        loaded = loaded.narrow(0, layer.tp_rank * own, own)
    if shard is None:
        rows = list(range(len(parameter)))
    elif isinstance(shard, tuple):
        rows = list(shard)
    else:
        rows = [_QKV[shard] if isinstance(shard, str) else shard]
    parameter.data[rows] = loaded.to(parameter.device)


def take_weights(layer: Any, weight: QuantizedWeight, rows: list[int], in_features: int) -> list[PolarWeight]:
    """What was loaded into the parameters of `layer`, which are gone then: neighbouring parts of `rows` rows that have
    the same awq_scales as one weight.

    Raises CheckpointError for scales that are NaN, infinite or negative.
    """
    packed, norms, scales = (getattr(layer, name, None) for name in _PARTS)
    assert packed is not None  # `add_linear_parameters` and its like made them
    assert norms is not None
    _check_scales(weight.name, norms, scales)
    for name in _PARTS:
        layer._parameters.pop(name, None)
    counts, chosen = _runs(rows, None if scales is None else scales.data)
    centroids = weight.centroids(packed.device)
    parts = zip(packed.data.flatten(0, -2).split(counts), norms.data.flatten(0, -2).split(counts), chosen, strict=True)
    return [PolarWeight(codes, scale, awq, centroids, in_features) for codes, scale, awq in parts]


def _check_scales(name: str, norms: torch.Tensor, scales: torch.Tensor | None) -> None:
    good = (norms.isfinite() & (norms >= 0)).all()
    if scales is not None:
        good &= (scales.isfinite() & (scales > 0)).all()
    if not bool(good):
        problem = "norms must be finite and not negative, awq_scales finite and positive; `polar verify` says which not"
        raise CheckpointError(name, problem)


def _runs(rows: list[int], scales: torch.Tensor | None) -> tuple[list[int], list[torch.Tensor | None]]:
    """Rows and awq_scales of the parts, neighbours that have the same scales put together."""
    if scales is None:
        return [sum(rows)], [None]
    counts, chosen = [rows[0]], [scales[0]]
    for count, own in zip(rows[1:], scales[1:], strict=True):
        if torch.equal(own, chosen[-1]):
            counts[-1] += count
        else:
            counts.append(count)
            chosen.append(own)
    return counts, [own.clone() for own in chosen]
