"""`polar_engine_v4` and `v5`: a polar_config.json beside the shards, and a copy of the table with every layer."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from model_patch.architectures import canonical
from model_patch.checkpoint.published.layout import (
    CODES,
    NORMS,
    SCALED_TABLE,
    TABLE,
    Groups,
    Layout,
    Published,
    PublishedLayer,
    Shapes,
    Storage,
    group_parts,
    place,
)
from model_patch.checkpoint.reader import Checkpoint, read_json
from model_patch.errors import CheckpointError
from polar_kernels.codebook import MAX_BITS, MIN_BITS, check_levels
from polar_kernels.errors import ArgumentError
from polar_kernels.hadamard import BLOCK_SIZE, padded_size

CONFIG_NAME = "polar_config.json"
_FORMATS = ("polar_engine_v4", "polar_engine_v5")
_SUFFIXES = {".codes": CODES, ".norms": NORMS, ".ct_scaled": SCALED_TABLE, ".ct": TABLE}
# Scaling a level by sqrt(128) and back rounds it twice.
_TABLE_TOLERANCE = 4 * torch.finfo(torch.float32).eps


def read_polar_engine(source: Checkpoint, groups: Groups, shapes: Shapes) -> Published:
    """Understand the layers `groups`; what contradicts the layout comes back among the problems.

    Raises CheckpointError when polar_config.json is absent, malformed or of another format.
    """
    config = _read_config(source)
    entries = {canonical(name): entry for name, entry in config["layers"].items()}
    present = {canonical(name) for name in group_parts(source, _SUFFIXES)}
    problems = [f"{CONFIG_NAME} lists {name}, which has no codes" for name in entries if name not in present]
    layers = []
    for name, parts in groups.items():
        rows, columns = shapes[canonical(name)]
        entry = {"block_size": config.get("block_size", BLOCK_SIZE)} | entries.get(canonical(name), {})
        if wrong := _entry_problems(entry, rows, columns):
            problems += [f"{place(source, parts[CODES])}: {CONFIG_NAME}, layers[{name!r}]: {text}" for text in wrong]
        else:
            layers.append(PublishedLayer(name, parts, entry["bits"], rows, columns, _storage(entry)))
    return Published(config["format"], layers, _tables(source, layers, problems), "lsb", problems)


POLAR_ENGINE = Layout(_SUFFIXES, (CODES, NORMS), read_polar_engine)


def _read_config(source: Checkpoint) -> dict[str, Any]:
    path = source.where / CONFIG_NAME
    config = read_json(path)
    found = config.get("format") if isinstance(config, dict) else None
    if found not in _FORMATS:
        raise CheckpointError(path, f"'format' must be one of {', '.join(_FORMATS)}; found {found!r}")
    layers = config.get("layers")
    if not isinstance(layers, dict) or not all(isinstance(entry, dict) for entry in layers.values()):
        raise CheckpointError(path, "'layers' must be an object from layer names to objects")
    return config


def _entry_problems(entry: Mapping[str, Any], rows: int, columns: int) -> list[str]:
    """What is wrong with a layer's description; sizes may be left out, but must not contradict the model."""
    padded = padded_size(columns)
    expected = {
        "block_size": BLOCK_SIZE,
        "out_features": rows,
        "in_features": columns,
        "in_features_padded": padded,
        "in_f_padded": padded,
        "n_blocks": padded // BLOCK_SIZE,
    }
    problems = [
        f"{key} must be {value}, found {entry[key]!r}"
        for key, value in expected.items()
        if key in entry and entry[key] != value
    ]
    bits = entry.get("bits")
    if type(bits) is not int or not MIN_BITS <= bits <= MAX_BITS:
        return [*problems, f"bits must be an integer from {MIN_BITS} to {MAX_BITS}, found {bits!r}"]
    flags = {key: entry.get(key, False) for key in ("packed", "packed_q5")}
    problems += [f"{key} must be true or false, found {v!r}" for key, v in flags.items() if not isinstance(v, bool)]
    if flags["packed"] and (bits > 4 or flags["packed_q5"]):
        problems.append(f"packed means nibbles, which is for 4 bits or less and excludes packed_q5; found {bits} bits")
    if flags["packed_q5"] and bits != 5:
        problems.append(f"packed_q5 is for 5 bits, found {bits}")
    return problems


def _storage(entry: Mapping[str, Any]) -> Storage:
    if entry.get("packed_q5", False):
        return Storage.STREAM
    return Storage.NIBBLES if entry.get("packed", False) else Storage.BYTES


def _tables(source: Checkpoint, layers: list[PublishedLayer], problems: list[str]) -> dict[int, torch.Tensor]:
    """The one table of each bit width, which all its layers must have."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for layer in layers:
        try:
            table = _read_table(source, layer)
        except ArgumentError as error:
            problems.append(str(error))
            continue
        first, expected = found.setdefault(layer.bits, (layer.name, table))
        if not torch.allclose(table, expected, rtol=_TABLE_TOLERANCE, atol=0):
            tensor = layer.parts.get(SCALED_TABLE) or layer.parts[TABLE]
            problems.append(
                f"{place(source, tensor)}: {layer.name} and {first} have different tables of {layer.bits} bits; "
                "the format holds one table a bit width"
            )
    return {bits: table for bits, (_, table) in found.items()}


def _read_table(source: Checkpoint, layer: PublishedLayer) -> torch.Tensor:
    """Levels fp32 [2^bits] of a layer, unscaled. Raises ArgumentError naming file and tensor."""
    names = [layer.parts[part] for part in (SCALED_TABLE, TABLE) if part in layer.parts]
    if len(names) != 1:
        found = " and ".join(names) or "neither"
        raise ArgumentError(f"{place(source, layer.parts[CODES])}: expected one of .ct_scaled and .ct, found {found}")
    info = source.tensors[names[0]]
    if not info.dtype.is_floating_point or info.shape != (1 << layer.bits,):
        raise ArgumentError(
            f"{place(source, names[0])} must be a float tensor [{1 << layer.bits}], "
            f"found {info.dtype} {list(info.shape)}"
        )
    stored = source.read(names[0]).double()
    table = (stored * math.sqrt(BLOCK_SIZE) if SCALED_TABLE in layer.parts else stored).float()
    try:
        check_levels(table)
    except ArgumentError as error:
        raise ArgumentError(f"{place(source, names[0])}: {error}") from error
    return table
