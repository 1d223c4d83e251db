"""What the published layouts have in common: layers made of tensors whose names share a prefix.

The model that config.json describes says how large each layer is; a layout only says where its parts are and how the
codes are stored. Everything here is known from headers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import nn

from model_patch.architectures import Kind, canonical, names_of_kind
from model_patch.checkpoint.reader import Checkpoint
from model_patch.config import PolarQuantConfig
from model_patch.errors import UnsupportedModelError
from model_patch.patch import plan_model
from polar_kernels.hadamard import BLOCK_SIZE, padded_size
from polar_kernels.packing import BitOrder, packed_size

# Parts of a layer, whatever a layout calls them.
CODES, NORMS, SCALES, META, TABLE, SCALED_TABLE = "codes", "norms", "awq scales", "meta", "table", "scaled table"

Groups = dict[str, dict[str, str]]  # layer name -> part -> tensor name
Shapes = Mapping[str, tuple[int, int]]  # canonical layer name -> (out_features, in_features)


class Storage(Enum):
    """How the codes of a layer are stored."""

    STREAM = "a bit stream"
    BYTES = "one byte a code"
    NIBBLES = "a nibble a code"  # first half of each block in the low nibbles, second half in the high ones


@dataclass(frozen=True)
class PublishedLayer:
    """One quantised layer of a source. name: its prefix there; parts: part -> tensor name; rows, columns: N and K."""

    name: str
    parts: Mapping[str, str]
    bits: int
    rows: int
    columns: int
    storage: Storage = Storage.STREAM

    @property
    def padded(self) -> int:
        return padded_size(self.columns)

    @property
    def row_bytes(self) -> int:
        """Bytes that the codes of one row take as stored."""
        stored_bits = {Storage.STREAM: self.bits, Storage.BYTES: 8, Storage.NIBBLES: 4}[self.storage]
        return packed_size(self.padded, stored_bits)


@dataclass(frozen=True)
class Published:
    """A source as its layout's reader understood it.

    tables: bits -> levels fp32; empty where the layout stores none. bit_order: of the streams, None if not stated.
    problems: everything that contradicts the layout; nothing else is to be relied on while there are any.
    """

    title: str
    layers: list[PublishedLayer]
    tables: dict[int, torch.Tensor]
    bit_order: BitOrder | None
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Layout:
    """A published layout. suffixes: tensor name's ending -> part; read: understands the layers found by them."""

    suffixes: Mapping[str, str]
    required: tuple[str, ...]
    read: Callable[[Checkpoint, Groups, Shapes], Published]


@dataclass(frozen=True)
class Structure:
    """What the model says about its layers, by canonical name.

    shapes: of all linear layers and embeddings, a tied head included. kept: those among them that the format leaves in
    their dtype, with the reason. tied_head, embedding: the pair that shares one weight, or None.
    """

    shapes: dict[str, tuple[int, int]]
    kept: dict[str, str]
    tied_head: str | None
    embedding: str | None

    @classmethod
    def of(cls, model: nn.Module) -> "Structure":
        """The structure of an unpatched model; meta tensors do. Raises UnsupportedModelError."""
        plan = plan_model(model, PolarQuantConfig())
        if names_of_kind(plan.bits, Kind.EXPERTS):
            raise UnsupportedModelError("published layouts of mixtures of experts are not read: quantise the original")
        names = [*plan.bits, *plan.kept, *([plan.tied_head] if plan.tied_head else [])]
        weights = {name: model.get_parameter(f"{name}.weight") for name in names}
        shapes = {canonical(name): (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
        embedding = names_of_kind(plan.bits, Kind.EMBEDDING)[0] if plan.tied_head else None
        return cls(
            shapes,
            {canonical(name): reason for name, reason in plan.kept.items()},
            canonical(plan.tied_head) if plan.tied_head else None,
            canonical(embedding) if embedding else None,
        )


def group_parts(source: Checkpoint, suffixes: Mapping[str, str]) -> Groups:
    """The layers of which any part is there."""
    groups: Groups = {}
    for tensor in source.tensors:
        suffix = next((suffix for suffix in suffixes if tensor.endswith(suffix)), None)
        if suffix is not None:
            groups.setdefault(tensor.removesuffix(suffix), {})[suffixes[suffix]] = tensor
    return groups


def place(source: Checkpoint, tensor: str) -> str:
    """`file: tensor`, the beginning of a message."""
    return f"{source.tensors[tensor].file.name}: {tensor}"


def group_problems(source: Checkpoint, layout: Layout, groups: Groups, structure: Structure) -> dict[str, list[str]]:
    """Layer -> what forbids reading it: it is not the model's, incomplete, or there twice."""
    return {
        name: problems
        for name, parts in groups.items()
        if (problems := _group_problems(source, layout, name, parts, structure))
    }


def _group_problems(
    source: Checkpoint, layout: Layout, name: str, parts: Mapping[str, str], structure: Structure
) -> list[str]:
    named = next(part for part in (*layout.required, *parts) if part in parts)  # the codes, if they are there
    first, short = place(source, parts[named]), canonical(name)
    if short not in structure.shapes:
        return [f"{first}: the model has no linear layer or embedding {name}"]
    spelled = {part: suffix for suffix, part in layout.suffixes.items()}
    problems = [
        f"{first}: {name}{spelled[part]}, another part of this layer, is missing"
        for part in layout.required
        if part not in parts
    ]
    if f"{name}.weight" in source.tensors:
        problems.append(f"{place(source, f'{name}.weight')} is a plain weight of {name}, which is quantised as well")
    return problems


def header_problems(source: Checkpoint, layer: PublishedLayer) -> list[str]:
    """What is wrong with dtypes and shapes of a layer's codes, norms and AWQ scales."""
    found = [_codes_problem(source, layer)]
    blocks = layer.padded // BLOCK_SIZE
    found.append(_float_problem(source, layer.parts[NORMS], [(layer.rows, blocks), (layer.rows * blocks,)]))
    if SCALES in layer.parts:
        found.append(_float_problem(source, layer.parts[SCALES], [(layer.columns,)]))
    return [problem for problem in found if problem is not None]


def _codes_problem(source: Checkpoint, layer: PublishedLayer) -> str | None:
    info = source.tensors[layer.parts[CODES]]
    dtypes = {torch.uint8, torch.int8} if layer.storage is Storage.BYTES else {torch.uint8}
    shapes = [(layer.rows, layer.row_bytes), (layer.rows * layer.row_bytes,)]
    if info.dtype in dtypes and info.shape in shapes:
        return None
    excess = torch.Size(info.shape).numel() - layer.rows * layer.row_bytes
    hint = f": {abs(excess)} bytes too {'long' if excess > 0 else 'short'}" if excess else ""
    return (
        f"{place(source, layer.parts[CODES])} must be {' or '.join(sorted(map(str, dtypes)))} {_either(shapes)} "
        f"({layer.bits} bits as {layer.storage.value}), found {info.dtype} {list(info.shape)}{hint}"
    )


def _float_problem(source: Checkpoint, tensor: str, shapes: list[tuple[int, ...]]) -> str | None:
    info = source.tensors[tensor]
    if info.dtype.is_floating_point and info.shape in shapes:
        return None
    return f"{place(source, tensor)} must be a float tensor {_either(shapes)}, found {info.dtype} {list(info.shape)}"


def _either(shapes: list[tuple[int, ...]]) -> str:
    return " or ".join(str(list(shape)) for shape in shapes)
