"""HLWQ: MSB-first streams with a `meta` tensor each; the table is not stored, and one of two was used."""

from model_patch.architectures import canonical
from model_patch.checkpoint.published.layout import (
    CODES,
    META,
    NORMS,
    Groups,
    Layout,
    Published,
    PublishedLayer,
    Shapes,
    place,
)
from model_patch.checkpoint.reader import Checkpoint
from polar_kernels.codebook import MAX_BITS, MIN_BITS
from polar_kernels.hadamard import BLOCK_SIZE, padded_size

_SUFFIXES = {".weight__packed": CODES, ".weight__norms": NORMS, ".weight__meta": META}


def read_hlwq(source: Checkpoint, groups: Groups, shapes: Shapes) -> Published:
    """Understand the layers `groups`; what contradicts the layout comes back among the problems."""
    problems: list[str] = []
    layers = []
    for name, parts in groups.items():
        rows, columns = shapes[canonical(name)]
        codes = rows * padded_size(columns)
        if (problem := _meta_problem(source, parts[META], rows, columns)) is not None:
            problems.append(problem)
        bits, rest = divmod(source.tensors[parts[CODES]].nbytes * 8, codes)
        if rest or not MIN_BITS <= bits <= MAX_BITS:
            problems.append(
                f"{place(source, parts[CODES])} must hold {codes} codes of {MIN_BITS} to {MAX_BITS} bits each, "
                f"found {source.tensors[parts[CODES]].nbytes} bytes"
            )
        else:
            layers.append(PublishedLayer(name, parts, bits, rows, columns))
    return Published("HLWQ", layers, {}, "msb", problems)


HLWQ = Layout(_SUFFIXES, (CODES, NORMS, META), read_hlwq)


def _meta_problem(source: Checkpoint, tensor: str, rows: int, columns: int) -> str | None:
    padded = padded_size(columns)
    expected = [rows, padded // BLOCK_SIZE, BLOCK_SIZE, rows * padded, columns]
    info = source.tensors[tensor]
    if info.dtype.is_floating_point or info.shape != (len(expected),):
        return f"{place(source, tensor)} must be an integer tensor [5], found {info.dtype} {list(info.shape)}"
    found = source.read(tensor).tolist()
    if found == expected:
        return None
    return f"{place(source, tensor)} must be [out, blocks, block size, codes, in] = {expected}, found {found}"
