"""The strict comparison of a checkpoint with the model it is loaded into, before a byte of a tensor is read."""

import re
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from model_patch.architectures import canonical, weight_name
from model_patch.checkpoint.experts import fused_layer
from model_patch.checkpoint.reader import Checkpoint, TensorInfo
from model_patch.config import BIT_ORDER
from model_patch.errors import CheckpointError
from polar_kernels import PolarModule, PolarWeight

PARTS = ("packed", "norms", "awq_scales")  # of a quantised layer, on disk
_NOT_ON_DISK = "centroids"  # in the metadata, one table for all layers of the same bits


def check_checkpoint(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless the checkpoint holds just what `model`, patched or plain, needs; meta tensors do.

    Listed are: tensors missing, left over, of another shape or dtype, plain weights where the model is quantised and
    the reverse, tables missing for a bit width in use, bits that metadata and model state differently.
    """
    expected = expected_tensors(model)
    found = _by_canonical_name(checkpoint)
    problems = [_describe_missing(name, found) for name in expected if canonical(name) not in found]
    problems += [
        problem
        for name, tensor in expected.items()
        if canonical(name) in found and (problem := _disagreement(name, tensor, found[canonical(name)]))
    ]
    wanted = {canonical(name) for name in expected}
    problems += [
        f"{info.file.name}: {name} is left over; the model has no such tensor"
        for name, info in checkpoint.tensors.items()
        if canonical(name) not in wanted and not _may_be_left(model, name)
    ]
    if any(isinstance(module, PolarModule) for module in model.modules()):
        problems += _metadata_problems(model, checkpoint)
    if problems:
        raise CheckpointError(checkpoint.where, problems)


def expected_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Name -> tensor of everything a checkpoint of the patched `model` holds; tied tensors once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    polar = {name for name, module in model.named_modules() if isinstance(module, PolarModule)}
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in tied and not (name.endswith("." + _NOT_ON_DISK) and name.rpartition(".")[0] in polar)
    }


def value_problems(name: str, weight: PolarWeight, checkpoint: Checkpoint) -> list[str]:
    """What is wrong with the values of a layer's scales: NaN, infinite or negative ones, with their place.

    name: of the layer in the model or in `checkpoint`, from which its values were read; weight: of experts all rows.
    """
    problems = []
    norms_bad = ~(weight.norms.isfinite() & (weight.norms >= 0))
    if norms_bad.any():
        row, block = norms_bad.nonzero()[0].tolist()
        value = weight.norms[row, block].item()
        info = _info(checkpoint, f"{name}.norms")
        rows = info.shape[-2]
        place = f"expert {row // rows}, row {row % rows}" if len(info.shape) == 3 else f"row {row}"
        norms = f"{info.file.name}: {name}.norms"
        problems.append(f"{norms} must be finite and not negative; found {value} at {place}, block {block}")
    if weight.awq_scales is not None:
        scales_bad = ~(weight.awq_scales.isfinite() & (weight.awq_scales > 0))
        if scales_bad.any():
            index = int(scales_bad.nonzero()[0])
            value = weight.awq_scales[index].item()
            scales = f"{_info(checkpoint, f'{name}.awq_scales').file.name}: {name}.awq_scales"
            problems.append(f"{scales} must be finite and positive; found {value} at [{index}]")
    return problems


def _info(checkpoint: Checkpoint, name: str) -> TensorInfo:
    """What the checkpoint says of a tensor that the model names so."""
    return next(info for key, info in checkpoint.tensors.items() if canonical(key) == canonical(name))


def _by_canonical_name(checkpoint: Checkpoint) -> Mapping[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    first: dict[str, str] = {}
    problems = []
    for name, info in checkpoint.tensors.items():
        short = canonical(name)
        if short in found:
            problems.append(f"{name} and {first[short]} are the same tensor of the model")
        found[short], first[short] = info, name
    if problems:
        raise CheckpointError(checkpoint.where, problems)
    return found


def _describe_missing(name: str, found: Mapping[str, TensorInfo]) -> str:
    layer, _, part = name.rpartition(".")
    if part in PARTS and canonical(weight_name(layer)) in found:
        return f"{name} is missing: the config says that {layer} is quantised, but the checkpoint has a plain weight"
    layer = name.removesuffix(".weight")
    if name == weight_name(layer) and canonical(f"{layer}.packed") in found:
        return f"{name} is missing: the config says that {layer} is not quantised, but the checkpoint has packed codes"
    return f"{name} is missing"


def _disagreement(name: str, tensor: torch.Tensor, info: TensorInfo) -> str | None:
    quantised = name.rpartition(".")[2] in PARTS
    same_dtype = info.dtype == tensor.dtype if quantised else info.dtype.is_floating_point == tensor.is_floating_point()
    if same_dtype and info.shape == tuple(tensor.shape):
        return None
    dtype = tensor.dtype if quantised else "a float dtype" if tensor.is_floating_point() else tensor.dtype
    problem = f"{info.file.name}: {name} must be {dtype} {list(tensor.shape)}, found {info.dtype} {list(info.shape)}"
    return f"{problem}, put together from the tensors of {len(info.pieces)} experts" if info.pieces else problem


def _may_be_left(model: PreTrainedModel, name: str) -> bool:
    """A second copy of a tied weight, and what the model's class ignores: multi-token prediction, an unused tower."""
    if canonical(name) in {canonical(tied) for tied in getattr(model, "all_tied_weights_keys", None) or {}}:
        return True
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    return any(re.search(pattern, name) for pattern in patterns)


def _metadata_problems(model: PreTrainedModel, checkpoint: Checkpoint) -> list[str]:
    tables, stated = checkpoint.centroids(), checkpoint.bits_per_tensor()
    problems = []
    order = checkpoint.metadata.get("bit_order")
    if order != BIT_ORDER:
        problems.append(f"metadata 'bit_order' must be {BIT_ORDER!r}, found {order!r}")
    by_name: dict[str, object] = {}
    for name, bits in stated.items():
        layer = fused_layer(name)
        if (first := by_name.setdefault(canonical(layer), bits)) != bits:
            problems.append(f"metadata 'bits_per_tensor' says {first} and {bits} for experts of {layer}")
    for name, module in model.named_modules():
        if not isinstance(module, PolarModule):
            continue
        if module.bits not in tables:
            problems.append(f"metadata 'centroids' has no table for the {module.bits} bits of {name}")
        if by_name.get(canonical(name)) != module.bits:
            found = by_name.get(canonical(name))
            problems.append(f"metadata 'bits_per_tensor' says {found} for {name}, the config says {module.bits}")
    return problems
