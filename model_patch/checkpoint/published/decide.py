"""Bit order and table of levels, told from the histogram of the codes where a source does not state them.

Rotated, normalised weights follow N(0, 1), so a code is as frequent as its cell of the table is probable. Read in the
wrong bit order, codes of 3, 5, 6 and 7 bits mix bits of neighbours and are nearly uniform: on trained weights the
divergence from the cells' masses is below 0.001 in the right order and above 0.06 in the wrong one. At 2, 4 and 8 bits
no code crosses a byte, and both orders have the same histogram.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import safe_open

from model_patch.checkpoint.published.layout import CODES, Published, PublishedLayer, Storage, place
from model_patch.checkpoint.reader import Checkpoint
from model_patch.errors import CheckpointError
from polar_kernels import lloyd_max_levels, published_levels, unpack_codes
from polar_kernels.packing import BitOrder

_SAMPLE = 1 << 14  # codes looked at in each layer
_TELLING = (3, 5, 6, 7)  # bit widths at which the two orders differ in their histograms
_CLOSE = 0.03  # nats a code; a histogram nearer than this to the masses follows them
_APART = 0.02  # nats a code by which the other order must be worse
# The two tables differ by 0.0003 nats at 4 bits, by 0.05 and more from 5 bits on, and not at all below.
_TABLES_APART = 1e-4
_TABLES_EVIDENCE = 10.0  # nats in all

_ORDERS: tuple[BitOrder, ...] = ("lsb", "msb")
Counts = Mapping[BitOrder, Mapping[int, torch.Tensor]]  # bit order -> bits -> how often each code occurs


@dataclass(frozen=True)
class Decision:
    """bit_order: None where no codes are a bit stream; tables: bits -> levels; text: how they were found."""

    bit_order: BitOrder | None
    tables: dict[int, torch.Tensor]
    text: str
    warnings: list[str]


def decide(source: Checkpoint, published: Published, asked: BitOrder | None) -> Decision:
    """Find what a source without problems leaves open.

    asked: the order to assume where the source states none.
    Raises CheckpointError when the order cannot be told, or when the stated one contradicts the codes.
    """
    streams = [layer for layer in published.layers if layer.storage is Storage.STREAM]
    if not streams:
        return Decision(None, published.tables, "The codes are bytes or nibbles, the table is in the files.", [])
    counts = _count_codes(source, streams)
    tables, text = dict(published.tables), "The table is in the files."
    if not tables:
        assert published.bit_order is not None  # a layout without tables has its order by definition
        tables, text = _choose_tables(counts[published.bit_order])
    divergences = {order: _divergence(counts[order], tables) for order in _ORDERS}
    found = f"divergence from N(0, 1): lsb {divergences['lsb']:.4f}, msb {divergences['msb']:.4f} nats a code"
    stated = published.bit_order or asked
    which = place(source, streams[0].parts[CODES]) + (f" and {len(streams) - 1} others" if len(streams) > 1 else "")
    telling = {layer.bits for layer in streams} & {*_TELLING}
    if stated is not None:
        warnings = _check_stated(source, which, stated, divergences, found)
        origin = "stated" if published.bit_order else "asked for"
        return Decision(stated, tables, f"The bit order is {stated}, as {origin} ({found}). {text}", warnings)
    if {layer.bits for layer in streams} == {8}:
        return Decision("lsb", tables, f"At 8 bits there is no bit order. {text}", [])
    order = _choose_order(source, which, divergences, found, bool(telling))
    return Decision(order, tables, f"The bit order is {order}, told from the codes ({found}). {text}", [])


def _choose_order(
    source: Checkpoint, which: str, divergences: Mapping[BitOrder, float], found: str, telling: bool
) -> BitOrder:
    best, other = sorted(_ORDERS, key=lambda order: divergences[order])
    if telling and divergences[best] <= _CLOSE and divergences[other] - divergences[best] >= _APART:
        return best
    if not telling:
        reason = "codes of 2, 4 and 8 bits look the same in both"
    elif divergences[best] > _CLOSE:
        reason = "in neither do the codes follow N(0, 1)"
    else:
        reason = "the two are too close to call"
    raise CheckpointError(
        source.where,
        f"{which}: expected metadata 'bit_order', found none, and {reason} ({found}): state the order with --bit-order",
    )


def _check_stated(
    source: Checkpoint, which: str, stated: BitOrder, divergences: Mapping[BitOrder, float], found: str
) -> list[str]:
    other: BitOrder = "msb" if stated == "lsb" else "lsb"
    if divergences[stated] <= _CLOSE:
        return []
    if divergences[other] <= _CLOSE and divergences[stated] - divergences[other] >= _APART:
        raise CheckpointError(
            source.where, f"{which}: expected codes packed {stated}, found codes packed {other} ({found})"
        )
    return [f"{which}: the codes do not follow N(0, 1); table or bit order may be wrong ({found})"]


def _choose_tables(counts: Mapping[int, torch.Tensor]) -> tuple[dict[int, torch.Tensor], str]:
    """For each bit width, the published generator's table or the converged one."""
    tables, texts = {}, []
    for bits, count in sorted(counts.items()):
        published, converged = published_levels(bits), lloyd_max_levels(bits)
        gain = _kl(count, published) - _kl(count, converged)
        telling = abs(gain) >= max(_TABLES_APART, _TABLES_EVIDENCE / int(count.sum()))
        tables[bits] = converged if telling and gain > 0 else published
        name = "converged Lloyd-Max" if tables[bits] is converged else "published generator's"
        how = "told from the codes" if telling else "taken because the codes do not tell the two candidates apart"
        texts.append(
            f"The {bits}-bit table is the {name} one, {how} (divergence: published {_kl(count, published):.5f}, "
            f"converged {_kl(count, converged):.5f})."
        )
    return tables, " ".join(texts)


def _count_codes(source: Checkpoint, streams: list[PublishedLayer]) -> Counts:
    counts: dict[BitOrder, dict[int, torch.Tensor]] = {order: {} for order in _ORDERS}
    for layer in streams:
        stored = _first_rows(source, layer)
        for order in _ORDERS:
            codes = unpack_codes(stored, layer.bits, order)
            count = torch.bincount(codes.flatten().int(), minlength=1 << layer.bits)
            counts[order][layer.bits] = counts[order].get(layer.bits, 0) + count
    return counts


def _first_rows(source: Checkpoint, layer: PublishedLayer) -> torch.Tensor:
    """As many rows [n, row_bytes] of a stream as make a sample, read without the rest of the tensor."""
    info = source.tensors[layer.parts[CODES]]
    rows = min(layer.rows, -(-_SAMPLE // layer.padded))
    with safe_open(info.file, framework="pt") as file:
        part = file.get_slice(layer.parts[CODES])
        return part[:rows] if len(info.shape) == 2 else part[: rows * layer.row_bytes].unflatten(0, (rows, -1))


def _divergence(counts: Mapping[int, torch.Tensor], tables: Mapping[int, torch.Tensor]) -> float:
    """Mean over the codes of the histograms' divergence; of the telling bit widths, where there are any."""
    widths = [bits for bits in counts if bits in _TELLING] or list(counts)
    total = sum(int(counts[bits].sum()) for bits in widths)
    return sum(int(counts[bits].sum()) * _kl(counts[bits], tables[bits]) for bits in widths) / total


def _kl(counts: torch.Tensor, table: torch.Tensor) -> float:
    """Kullback-Leibler divergence, in nats, of a histogram of codes from the masses of the table's cells."""
    edge = torch.tensor([math.inf], dtype=torch.float64)
    edges = torch.cat([-edge, (table[1:].double() + table[:-1].double()) / 2, edge])
    masses = torch.special.ndtr(edges).diff().clamp_min(torch.finfo(torch.float64).tiny)
    share = counts.double() / counts.sum()
    return torch.special.xlogy(share, share / masses).sum().item()
