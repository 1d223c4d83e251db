"""A folder of safetensors shards, read strictly: header first, tensors one at a time, every contradiction listed."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import SafetensorsRepoMetadata
from safetensors import SafetensorError, safe_open

from model_patch.checkpoint.experts import fuse_experts
from model_patch.errors import CheckpointError
from polar_kernels.codebook import check_bits, check_levels
from polar_kernels.errors import ArgumentError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its shard's header describes it.

    pieces: of a tensor that is put together from those of single experts, their names expert by expert; `file` is then
    that of the first. alike: they are all the same, and it is one of them.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[tuple[str, ...], ...] = ()
    alike: bool = False

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Checkpoint:
    """The tensors and the safetensors metadata of a set of shards.

    stored: name -> TensorInfo, in the order of the shards and their headers. tensors: the same with experts fused, as
    transformers' models have them.
    metadata: the union of all shards' metadata, which must agree.
    """

    def __init__(self, where: Path, stored: dict[str, TensorInfo], metadata: dict[str, str]) -> None:
        """Raises CheckpointError where experts do not fit together."""
        self.where, self.stored, self.metadata = where, stored, metadata
        self.tensors = fuse_experts(where, stored)

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Open a folder by its index, or its single file where there is none.

        Raises CheckpointError listing every shard that is missing or unreadable and every tensor on which the index
        and the shards disagree.
        """
        index = folder / INDEX_NAME
        if not index.is_file():
            if not (folder / SINGLE_NAME).is_file():
                raise CheckpointError(folder, f"no {SINGLE_NAME} and no {INDEX_NAME} in this folder")
            return cls.from_files([folder / SINGLE_NAME])
        weight_map = _read_weight_map(index)
        files = [folder / name for name in dict.fromkeys(weight_map.values())]
        checkpoint = cls.from_files(files, where=folder)
        located = {name: info.file.name for name, info in checkpoint.stored.items()}
        problems = [
            f"{INDEX_NAME} puts {name} in {shard}, but it is {f'in {located[name]}' if name in located else 'nowhere'}"
            for name, shard in weight_map.items()
            if located.get(name) != shard
        ]
        for name in located.keys() - weight_map.keys():
            problems.append(f"{located[name]} holds {name}, which {INDEX_NAME} lacks")
        if problems:
            raise CheckpointError(folder, problems)
        return checkpoint

    @classmethod
    def from_files(cls, files: Iterable[Path | str], where: Path | None = None) -> "Checkpoint":
        """Open the given shards; `where` names the checkpoint in messages."""
        paths = [Path(file) for file in files]
        tensors: dict[str, TensorInfo] = {}
        metadata: dict[str, str] = {}
        problems: list[str] = []
        for path in paths:
            try:
                found, stated = _read_header(path)
            except CheckpointError as error:
                problems += [f"{path.name}: {problem}" for problem in error.problems]
                continue
            for name in found.keys() & tensors.keys():
                problems.append(f"{name} is in both {tensors[name].file.name} and {path.name}")
            problems += [
                f"{path.name}: metadata {key!r} differs from that of another shard"
                for key, value in stated.items()
                if metadata.setdefault(key, value) != value
            ]
            tensors.update(found)
        where = where or (paths[0].parent if paths else Path())
        if problems:
            raise CheckpointError(where, problems)
        return cls(where, tensors, metadata)

    @classmethod
    def from_hub(cls, headers: SafetensorsRepoMetadata, where: Path) -> "Checkpoint":
        """The headers of a repository on the Hub; `read` then fails, since the shards are not here."""
        tensors: dict[str, TensorInfo] = {}
        metadata: dict[str, str] = {}
        for file, header in headers.files_metadata.items():
            metadata.update(header.metadata)
            described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in header.tensors.items()}
            tensors |= _known_dtypes(where / file, described)
        return cls(where, tensors, metadata)

    def read(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """One tensor, read from its shard now. Raises CheckpointError where experts differ in what they must share."""
        info = self.tensors[name]
        if info.pieces:
            names = [piece for pieces in info.pieces for piece in pieces]
            single = self._read_stored(names, device)
            if info.alike:
                first = single[names[0]]
                if other := next((n for n in names if not torch.equal(single[n], first)), None):
                    problem = f"{other} must be equal to {names[0]}: all experts of a layer share it"
                    raise CheckpointError(self.where, f"{self.stored[other].file.name}: {problem}")
                return first
            return torch.stack([torch.cat([single[piece] for piece in pieces]) for pieces in info.pieces])
        return self._read_stored([name], device)[name]

    def _read_stored(self, names: Iterable[str], device: torch.device | str) -> dict[str, torch.Tensor]:
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.stored[name].file, []).append(name)
        found: dict[str, torch.Tensor] = {}
        for path, members in by_file.items():
            with safe_open(path, framework="pt", device=str(device)) as file:
                found |= {name: file.get_tensor(name) for name in members}
        return found

    def centroids(self) -> dict[int, torch.Tensor]:
        """Bits -> table of levels fp32 [2^bits], from the metadata. Raises CheckpointError when absent or malformed."""
        stated = _parse_object(self.where, "metadata 'centroids'", self.metadata.get("centroids"))
        tables: dict[int, torch.Tensor] = {}
        problems: list[str] = []
        for key, levels in stated.items():
            try:
                tables[int(key)] = parse_levels(int(key), levels)
            except (ArgumentError, ValueError, OverflowError, RuntimeError) as error:
                problems.append(f"metadata 'centroids'[{key!r}]: {error}")
        if problems:
            raise CheckpointError(self.where, problems)
        return tables

    def bits_per_tensor(self) -> dict[str, Any]:
        """Layer name -> bits, from the metadata."""
        return _parse_object(self.where, "metadata 'bits_per_tensor'", self.metadata.get("bits_per_tensor"))


def parse_levels(bits: int, levels: object) -> torch.Tensor:
    """A table of 2^bits levels from a JSON list. Raises ArgumentError when it is not one."""
    check_bits(bits)
    if not isinstance(levels, list) or len(levels) != 1 << bits:
        found = f"{len(levels)} values" if isinstance(levels, list) else type(levels).__name__
        raise ArgumentError(f"expected a list of {1 << bits} levels, found {found}")
    if not all(isinstance(level, (int, float)) for level in levels):
        raise ArgumentError(f"expected a list of numbers, found {levels}")
    table = torch.tensor(levels, dtype=torch.float32, device="cpu")  # transformers loads under the meta device
    check_levels(table)
    return table


def read_json(path: Path) -> Any:
    """A JSON file. Raises CheckpointError naming it when it is absent, not JSON, or holds NaN or Infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text, parse_constant=refuse, object_pairs_hook=_unique_keys)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"not valid JSON: {error}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file, of which Python itself would keep the last of several equal keys."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} occurs twice")
        found[key] = value
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as a dictionary."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(folder / "config.json", f"expected an object, found {type(config).__name__}")
    return config


def _read_weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(index, "expected an object with a non-empty 'weight_map'")
    bad = [
        f"weight_map[{name!r}] must be a file name in this folder, found {file!r}"
        for name, file in weight_map.items()
        if not _is_shard_name(file)
    ]
    if bad:
        raise CheckpointError(index, bad)
    return weight_map


def _is_shard_name(file: object) -> bool:
    return isinstance(file, str) and file.endswith(".safetensors") and Path(file).name == file


def _read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of one shard. Raises CheckpointError when it cannot be read as safetensors."""
    if not os.path.isfile(path):  # unlike Path.is_file also false for a name that no file can have
        raise CheckpointError(path, "not a file" if os.path.exists(path) else "this shard is missing")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            slices = {name: file.get_slice(name) for name in names}
            stated = dict(file.metadata() or {})
            described = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(path, f"not a readable safetensors file: {error}{_hint(path)}") from error
    return _known_dtypes(path, described), stated


def _known_dtypes(path: Path, described: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, TensorInfo]:
    """The tensors of a header, name -> dtype and shape. Raises CheckpointError listing those of another dtype."""
    if unknown := [f"{name} has dtype {dtype}" for name, (dtype, _) in described.items() if dtype not in _DTYPES]:
        raise CheckpointError(path, [f"{found}, which is not read" for found in unknown])
    return {name: TensorInfo(path, _DTYPES[dtype], shape) for name, (dtype, shape) in described.items()}


def _hint(path: Path) -> str:
    """What a file that is no safetensors file looks like."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError:
        return ""
    if head.startswith(b"version https://git-lfs"):
        return " (this is a git-lfs pointer: run `git lfs pull`)"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return " (this is an HTML page: the download went wrong)"
    if head.startswith((b"\x80", b"PK")):
        return " (this looks like a pickle or a zip archive, which is never read)"
    return ""


def _parse_object(where: Path, what: str, text: str | None) -> dict[str, Any]:
    if text is None:
        raise CheckpointError(where, f"the safetensors {what} is missing")
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(where, f"the safetensors {what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(where, f"the safetensors {what} must be an object, found {type(value).__name__}")
    return value
