"""EOQ v3: `packed` streams, tables and bits in the safetensors metadata, the bit order stated or not."""

import json
from typing import Any

import torch

from model_patch.architectures import canonical
from model_patch.checkpoint.published.layout import (
    CODES,
    NORMS,
    SCALES,
    Groups,
    Layout,
    Published,
    PublishedLayer,
    Shapes,
    group_parts,
    place,
)
from model_patch.checkpoint.reader import Checkpoint, parse_levels
from polar_kernels.codebook import check_bits
from polar_kernels.errors import ArgumentError
from polar_kernels.packing import BitOrder

_ORDERS: dict[str, BitOrder] = {"lsb": "lsb", "msb": "msb"}
_SUFFIXES = {".packed": CODES, ".norms": NORMS, ".awq_scales": SCALES}


def read_eoq(source: Checkpoint, groups: Groups, shapes: Shapes) -> Published:
    """Understand the layers `groups`; what contradicts the layout comes back among the problems."""
    problems: list[str] = []
    tables = _tables(source, problems)
    bits = _bits_per_layer(source, groups, tables, problems)
    layers = [PublishedLayer(name, groups[name], b, *shapes[canonical(name)]) for name, b in bits.items()]
    if tables:
        problems += [
            f"{place(source, layer.parts[CODES])}: metadata 'centroids' has no table of {layer.bits} bits"
            for layer in layers
            if layer.bits not in tables
        ]
    return Published("EOQ v3", layers, tables, _bit_order(source, problems), problems)


EOQ = Layout(_SUFFIXES, (CODES, NORMS), read_eoq)


def _tables(source: Checkpoint, problems: list[str]) -> dict[int, torch.Tensor]:
    stated = _metadata(source, "centroids", problems)
    if isinstance(stated, list):
        stated = {len(stated).bit_length() - 1: stated}
    if not isinstance(stated, dict):
        problems.append("metadata 'centroids' must be a list of levels, or an object from bits to such lists")
        return {}
    tables = {}
    for key, levels in stated.items():
        try:
            tables[int(key)] = _parse_levels(int(key), levels)
        except (ArgumentError, ValueError, OverflowError) as error:
            problems.append(f"metadata 'centroids', {key} bits: {error}")
    return tables


def _parse_levels(bits: int, levels: object) -> torch.Tensor:
    if isinstance(levels, list) and not all(type(level) in (int, float) for level in levels):
        raise ArgumentError("levels must be numbers")
    return parse_levels(bits, levels)


def _bits_per_layer(
    source: Checkpoint, groups: Groups, tables: dict[int, torch.Tensor], problems: list[str]
) -> dict[str, int]:
    """Layer name -> bits, of those for which they are stated and valid."""
    stated = _metadata(source, "bits_per_tensor", problems)
    if stated is None and len(tables) == 1:
        stated = next(iter(tables))
    if isinstance(stated, dict):
        by_name = {canonical(name.removesuffix(".weight")): bits for name, bits in stated.items()}
    else:
        by_name = {canonical(name): stated for name in groups}
    bits: dict[str, Any] = {name: by_name.get(canonical(name)) for name in groups}
    problems += [
        f"{place(source, groups[name][CODES])}: metadata 'bits_per_tensor' must give an integer from 2 to 8, "
        f"found {json.dumps(value)}"
        for name, value in bits.items()
        if not _is_bits(value)
    ]
    present = {canonical(name) for name in group_parts(source, _SUFFIXES)}
    problems += [
        f"metadata 'bits_per_tensor' gives {name} {value} bits, but there are no codes of it"
        for name, value in by_name.items()
        if _is_bits(value) and name not in present
    ]
    return {name: value for name, value in bits.items() if _is_bits(value)}


def _is_bits(value: Any) -> bool:
    try:
        check_bits(value)
    except ArgumentError:
        return False
    return True


def _bit_order(source: Checkpoint, problems: list[str]) -> BitOrder | None:
    stated = source.metadata.get("bit_order")
    if stated is not None and stated not in _ORDERS:
        problems.append(f"metadata 'bit_order' must be 'lsb' or 'msb', found {stated!r}")
    return _ORDERS.get(stated or "")


def _metadata(source: Checkpoint, key: str, problems: list[str]) -> Any:
    try:
        return json.loads(source.metadata.get(key, "null"))
    except (ValueError, RecursionError) as error:
        problems.append(f"metadata {key!r} is not valid JSON: {error}")
        return None
