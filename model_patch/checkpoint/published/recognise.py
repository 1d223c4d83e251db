"""Which layout a source has, and everything its headers contradict."""

from dataclasses import replace

import torch

from model_patch.architectures import canonical
from model_patch.checkpoint.published.eoq import EOQ
from model_patch.checkpoint.published.hlwq import HLWQ
from model_patch.checkpoint.published.layout import (
    CODES,
    NORMS,
    Layout,
    Published,
    PublishedLayer,
    Structure,
    group_parts,
    group_problems,
    header_problems,
    place,
)
from model_patch.checkpoint.published.polar_engine import POLAR_ENGINE
from model_patch.checkpoint.published.values import refuse_scaled
from model_patch.checkpoint.reader import Checkpoint
from model_patch.errors import CheckpointError
from polar_kernels.packing import BitOrder

# Ending of the tensors that only one layout has -> that layout.
_RECOGNISED = {".weight__packed": HLWQ, ".codes": POLAR_ENGINE, ".packed": EOQ}


def read_published(checkpoint: Checkpoint, structure: Structure, asked: BitOrder | None) -> Published:
    """The source as its layout's reader understands it, a tied head left out.

    asked: the bit order to assume where the source states none.
    Raises CheckpointError for an unknown layout, or listing everything that is wrong in the headers.
    """
    layout = _recognise(checkpoint)
    groups = group_parts(checkpoint, layout.suffixes)
    wrong = group_problems(checkpoint, layout, groups, structure)
    usable = {name: parts for name, parts in groups.items() if name not in wrong}
    published = layout.read(checkpoint, usable, structure.shapes)
    problems = [problem for listed in wrong.values() for problem in listed] + published.problems
    for layer in published.layers:
        problems += header_problems(checkpoint, layer)
    if asked and published.bit_order and asked != published.bit_order:
        problems.append(f"{published.title} is packed {published.bit_order} here, but the order {asked} was asked for")
    if problems:
        raise CheckpointError(checkpoint.where, problems)
    return _drop_tied_head(checkpoint, published, structure)


def _recognise(checkpoint: Checkpoint) -> Layout:
    found = [suffix for suffix in _RECOGNISED if any(name.endswith(suffix) for name in checkpoint.tensors)]
    if len(found) != 1:
        known = "*.packed (EOQ v3), *.codes (polar_engine) or *.weight__packed (HLWQ)"
        tensors = ", ".join(f"*{suffix}" for suffix in found) or "none of them"
        raise CheckpointError(checkpoint.where, f"unknown layout: expected tensors {known}, found {tensors}")
    return _RECOGNISED[found[0]]


def _drop_tied_head(checkpoint: Checkpoint, published: Published, structure: Structure) -> Published:
    """Leave out the head of a tied model, after making sure that it is the copy of the embedding it has to be."""
    by_short = {canonical(layer.name): layer for layer in published.layers}
    head = by_short.get(structure.tied_head or "")
    if head is None:
        return published
    embedding = by_short.get(structure.embedding or "")
    if embedding is None or not _same_weight(checkpoint, head, embedding):
        raise CheckpointError(
            checkpoint.where,
            f"{place(checkpoint, head.parts[CODES])}: {head.name} shares its weight with {structure.embedding}, which "
            "has not the same codes and norms; if they are two weights, config.json needs tie_word_embeddings: false",
        )
    refuse_scaled(checkpoint, head)
    return replace(published, layers=[layer for layer in published.layers if layer is not head])


def _same_weight(checkpoint: Checkpoint, one: PublishedLayer, other: PublishedLayer) -> bool:
    same = one.bits == other.bits and one.storage is other.storage
    return same and all(
        torch.equal(checkpoint.read(one.parts[part]).flatten(), checkpoint.read(other.parts[part]).flatten())
        for part in (CODES, NORMS)
    )
