"""`polar inspect`: what a checkpoint holds, from its headers."""

from typing import Any

import typer

from model_patch.architectures import role_of, weight_name
from model_patch.checkpoint.reader import Checkpoint, read_config
from model_patch.checkpoint.strict import PARTS
from model_patch.cli.options import AsJson, Folder, megabytes, print_json, print_table
from model_patch.load import find_headers, quantization_config


def inspect(folder: Folder, as_json: AsJson = False) -> None:
    """Show the layers of a checkpoint, quantised or plain, their bits and sizes, without reading a tensor."""
    where, checkpoint = find_headers(folder)
    config = quantization_config(read_config(where))
    layers = _layers(checkpoint)
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    if as_json:
        stated = None if config is None else config.to_dict()
        print_json({"quantization_config": stated, "layers": layers, "bytes": total})
        return
    rows = [
        [name, str(layer["kind"]), str(layer["bits"]), "x".join(map(str, layer["shape"])), megabytes(layer["bytes"])]
        for name, layer in layers.items()
    ]
    print_table(str(where), ["layer", "kind", "bits", "stored shape", "size"], rows)
    quantized = sum(layer["bytes"] for layer in layers.values() if layer["quantized"])
    rest = len(checkpoint.tensors) - sum(layer["tensors"] for layer in layers.values())
    typer.echo(f"{megabytes(total)} in all, {megabytes(quantized)} of it quantised; {rest} other tensors")
    typer.echo("not quantised" if config is None else f"quantization_config: {config.to_dict()}")


def _layers(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Layer name -> description, for the layers that are quantised or could be."""
    stated = checkpoint.bits_per_tensor() if "bits_per_tensor" in checkpoint.metadata else {}
    layers: dict[str, dict[str, Any]] = {}
    for name, info in checkpoint.tensors.items():
        layer, _, part = name.rpartition(".")
        if part not in PARTS:
            layer, part = name.removesuffix(".weight"), "weight"
        role = role_of(layer)
        if role is None or (part == "weight" and name != weight_name(layer)):
            continue
        entry = layers.setdefault(layer, {"kind": role.kind.value, "quantized": False, "bytes": 0, "tensors": 0})
        entry["bytes"] += info.nbytes
        entry["tensors"] += 1
        if part in ("packed", "weight"):
            entry |= {
                "quantized": part == "packed",
                "bits": stated.get(layer) if part == "packed" else info.dtype.itemsize * 8,
                "shape": list(info.shape),
            }
    return {name: layer for name, layer in layers.items() if "shape" in layer}
