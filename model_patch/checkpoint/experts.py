"""Experts that a checkpoint stores one by one, as the fused tensors that transformers' models have in their place."""

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

_SINGLE = re.compile(r"(.+)\.(0|[1-9]\d*)\.(gate_proj|up_proj|down_proj)\.weight")
_FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}  # their rows in this order

# Expert, projection -> name of its tensor.
_Block = dict[tuple[int, str], str]


def fuse_experts(where: "Path", tensors: "Mapping[str, TensorInfo]") -> "dict[str, TensorInfo]":
    """The tensors with those of single experts, [N, K], replaced by the fused ones, [E, N, K], whose `pieces` they are.

    Raises CheckpointError listing the experts' tensors that are missing or of another shape or dtype than the others'.
    """
    blocks: dict[str, _Block] = {}
    for name in tensors:
        match = _SINGLE.fullmatch(name)
        if match is not None and kind_of(f"{match[1]}.down_proj") is Kind.EXPERTS:
            blocks.setdefault(match[1], {})[int(match[2]), match[3]] = name
    problems = [problem for prefix, block in blocks.items() for problem in _problems(prefix, block, tensors)]
    if problems:
        raise CheckpointError(where, problems)
    fused = {prefix: _fuse(prefix, block, tensors) for prefix, block in blocks.items()}
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        match = _SINGLE.fullmatch(name)
        if match is not None and match[1] in blocks:
            found |= fused[match[1]]  # again for each of them, which changes nothing
        else:
            found[name] = info
    return found


def _problems(prefix: str, block: _Block, tensors: "Mapping[str, TensorInfo]") -> list[str]:
    problems = [
        f"{tensors[f'{prefix}.{leaf}'].file.name}: {prefix}.{leaf} is there twice: fused, and expert by expert"
        for leaf in _FUSED
        if f"{prefix}.{leaf}" in tensors
    ]
    # A number that is no expert's would otherwise have as many reported missing.
    experts = range(min(max(expert for expert, _ in block) + 1, len(block) + 1))
    for leaves in _FUSED.values():
        present = {name: tensors[name] for (_, leaf), name in block.items() if leaf in leaves}
        forms = Counter((info.dtype, info.shape) for info in present.values())
        dtype, shape = forms.most_common(1)[0][0] if forms else (None, ())
        problems += [
            f"{prefix}.{expert}.{leaf}.weight is missing"
            for expert in experts
            for leaf in leaves
            if (expert, leaf) not in block
        ]
        problems += [
            f"{info.file.name}: {name} must be {dtype} {list(shape)} as most are, found {info.dtype} {list(info.shape)}"
            for name, info in present.items()
            if (info.dtype, info.shape) != (dtype, shape)
        ]
        if len(shape) != 2:
            problems += [f"{info.file.name}: {name} must have two dimensions" for name, info in present.items()]
    return problems


def _fuse(prefix: str, block: _Block, tensors: "Mapping[str, TensorInfo]") -> "dict[str, TensorInfo]":
    fused = {}
    count = max(expert for expert, _ in block) + 1
    for target, leaves in _FUSED.items():
        pieces = tuple(tuple(block[expert, leaf] for leaf in leaves) for expert in range(count))
        first = tensors[pieces[0][0]]
        shape = (count, len(leaves) * first.shape[0], first.shape[1])
        fused[f"{prefix}.{target}"] = replace(first, shape=shape, pieces=pieces)
    return fused
