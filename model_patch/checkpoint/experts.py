"""Experts that a checkpoint stores one by one, as the fused tensors that transformers' models and ours have instead."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from model_patch.architectures import Kind, kind_of
from model_patch.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from model_patch.checkpoint.reader import TensorInfo

_SINGLE = re.compile(r"(.+)\.(0|[1-9]\d*)\.(gate_proj|up_proj|down_proj)\.(weight|packed|norms|awq_scales)")
# Names in transformers' models -> in a checkpoint of single experts, whose rows they hold in this order.
FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_SHARED = "awq_scales"  # the part of a quantised projection that all experts have alike

# Expert, projection -> name of its tensor.
_Block = dict[tuple[int, str], str]


def fuse_experts(where: "Path", tensors: "Mapping[str, TensorInfo]") -> "dict[str, TensorInfo]":
    """The tensors with those of single experts, plain [N, K] or quantised, replaced by the fused ones, [E, N, K] or the
    like, whose `pieces` they are.

    Raises CheckpointError listing the experts' tensors that are missing or of another shape or dtype than the others'.
    """
    blocks: dict[tuple[str, str], _Block] = {}
    for name in tensors:
        match = _match(name)
        if match is not None:
            blocks.setdefault((match[1], match[4]), {})[int(match[2]), match[3]] = name
    problems = [
        problem for (prefix, part), block in blocks.items() for problem in _problems(prefix, part, block, tensors)
    ]
    if problems:
        raise CheckpointError(where, problems)
    fused = {key: _fuse(*key, block, tensors) for key, block in blocks.items()}
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        match = _match(name)
        if match is not None:
            found |= fused[match[1], match[4]]  # again for each of them, which changes nothing
        else:
            found[name] = info
    return found


def fused_layer(name: str) -> str:
    """The layer that holds a single expert's, or the layer itself."""
    match = _match(f"{name}.packed")
    if match is None:
        return name
    return next(f"{match[1]}.{target}" for target, leaves in FUSED.items() if match[3] in leaves)


def _match(name: str) -> "re.Match[str] | None":
    match = _SINGLE.fullmatch(name)
    return match if match is not None and kind_of(f"{match[1]}.down_proj") is Kind.EXPERTS else None


def _fused_name(prefix: str, target: str, part: str) -> str:
    return f"{prefix}.{target}" if part == "weight" else f"{prefix}.{target}.{part}"


def _problems(prefix: str, part: str, block: _Block, tensors: "Mapping[str, TensorInfo]") -> list[str]:
    fused = {_fused_name(prefix, target, part) for target in FUSED} & tensors.keys()
    problems = [
        f"{tensors[name].file.name}: {name} is there twice: fused, and expert by expert" for name in sorted(fused)
    ]
    # A number that is no expert's would otherwise have as many reported missing.
    experts = range(min(max(expert for expert, _ in block) + 1, len(block) + 1))
    dimensions = 1 if part == _SHARED else 2
    for leaves in FUSED.values():
        present = {name: tensors[name] for (_, leaf), name in block.items() if leaf in leaves}
        forms = Counter((info.dtype, info.shape) for info in present.values())
        dtype, shape = forms.most_common(1)[0][0] if forms else (None, ())
        problems += [
            f"{prefix}.{expert}.{leaf}.{part} is missing"
            for expert in experts
            for leaf in leaves
            if (expert, leaf) not in block
        ]
        problems += [
            f"{info.file.name}: {name} must be {dtype} {list(shape)} as most are, found {info.dtype} {list(info.shape)}"
            for name, info in present.items()
            if (info.dtype, info.shape) != (dtype, shape)
        ]
        if len(shape) != dimensions:
            wanted = "one dimension" if dimensions == 1 else "two dimensions"
            problems += [f"{info.file.name}: {name} must have {wanted}" for name, info in present.items()]
    return problems


def _fuse(prefix: str, part: str, block: _Block, tensors: "Mapping[str, TensorInfo]") -> "dict[str, TensorInfo]":
    fused = {}
    count = max(expert for expert, _ in block) + 1
    for target, leaves in FUSED.items():
        pieces = tuple(tuple(block[expert, leaf] for leaf in leaves) for expert in range(count))
        first = tensors[pieces[0][0]]
        shared = part == _SHARED
        shape = first.shape if shared else (count, len(leaves) * first.shape[0], first.shape[1])
        fused[_fused_name(prefix, target, part)] = replace(first, shape=shape, pieces=pieces, alike=shared)
    return fused
