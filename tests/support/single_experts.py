"""Quantised checkpoints whose experts are stored one by one."""

import json
import re

import torch

_FUSED = re.compile(r"(.+\.experts)\.(gate_up|down)_proj\.(packed|norms|awq_scales)")
_LEAVES = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}


def split_experts(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the metadata of a checkpoint of fused experts, with single ones."""
    bits = json.loads(metadata["bits_per_tensor"])
    counts = {m[1]: len(tensors[name]) for name in tensors if (m := _FUSED.fullmatch(name)) and m[3] == "packed"}
    found, stated = {}, {}
    for name, tensor in tensors.items():
        match = _FUSED.fullmatch(name)
        if match is None:
            found[name] = tensor
            continue
        prefix, projection, part = match.groups()
        leaves = _LEAVES[projection]
        for expert in range(counts[prefix]):
            pieces = [tensor] * len(leaves) if part == "awq_scales" else tensor[expert].chunk(len(leaves))
            for leaf, piece in zip(leaves, pieces, strict=True):
                found[f"{prefix}.{expert}.{leaf}.{part}"] = piece.clone()
                stated[f"{prefix}.{expert}.{leaf}"] = bits[f"{prefix}.{projection}_proj"]
    fused = {f"{prefix}.{projection}_proj" for prefix in counts for projection in _LEAVES}
    stated |= {name: own for name, own in bits.items() if name not in fused}
    return found, metadata | {"bits_per_tensor": json.dumps(stated)}
