"""A checkpoint folder written shard by shard beside its final place and moved there when it is whole."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file

from model_patch.checkpoint.reader import INDEX_NAME, Checkpoint
from model_patch.config import BIT_ORDER
from model_patch.errors import ConfigError, OutputError

# Never carried over from a source: weights in any container, what is rewritten, and code.
_NOT_CARRIED = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".pkl",
    ".pickle",
    ".py",
}
_UNITS = {None: 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNFINISHED = "unfinished-"  # before the names of files in work
_REWRITTEN = {"config.json", "README.md", INDEX_NAME, "polar_config.json"}


@contextmanager
def new_folder(out: Path, overwrite: bool, kept: Path | None = None) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when the block ends without an exception.

    A fresh one, which vanishes otherwise; or `kept`, made if it is not there, with what an earlier run has finished in
    it, which stays otherwise. An existing `out` is refused unless it is an empty folder or `overwrite` is set; it stays
    whole until then.
    """
    check_output(out, overwrite)
    partial = kept or out.parent / f".{out.name}.partial-{os.getpid()}"
    left = "nothing was left behind" if kept is None else "what is finished is kept"
    ours = kept is None  # from before it is made: an interrupt may come as soon as it is
    try:
        try:
            partial.mkdir(parents=True, exist_ok=kept is not None)
            for unfinished in partial.glob(f".{_UNFINISHED}*"):
                unfinished.unlink()
        except OSError as error:
            ours = False
            raise OutputError(f"{out}: cannot be written: {error.strerror}") from error
        try:
            yield partial
            _replace(partial, out)
        except OSError as error:
            raise OutputError(f"{out}: could not be written: {error}; {left}") from error
    finally:
        if ours:
            shutil.rmtree(partial, ignore_errors=True)


def check_output(out: Path, overwrite: bool) -> None:
    """Raise OutputError when `out` may not be written to."""
    if out.is_dir():
        if any(out.iterdir()) and not overwrite:
            raise OutputError(f"{out} exists and is not empty: choose another folder, or pass --overwrite")
    elif out.exists() or out.is_symlink():
        raise OutputError(f"{out} exists and is not a folder")


def _replace(partial: Path, out: Path) -> None:
    if not out.exists():
        os.replace(partial, out)
        return
    old = out.parent / f".{out.name}.old-{os.getpid()}"
    os.replace(out, old)
    try:
        os.replace(partial, out)
    except OSError:
        os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_shards(
    folder: Path,
    layout: Mapping[str, torch.Tensor],
    produce: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str],
    max_shard_size: int | str,
) -> None:
    """Write the tensors of `layout` (name -> meta tensor, in order) as `produce(name)` gives them, one shard at a time.

    Names, index and sharding are those of transformers' `save_pretrained`. A shard that is whole in the folder
    already is left as it is.
    """
    limit = shard_bytes(max_shard_size)
    plan = split_torch_state_dict_into_shards(dict(layout), max_shard_size=limit)
    for file, names in plan.filename_to_tensors.items():
        if _is_whole(folder / file, sum(layout[name].nbytes for name in names)):
            continue
        shard = {name: produce(name).contiguous().cpu() for name in names}
        _save_shard(shard, folder / file, {"format": "pt", **metadata})
        del shard
    if plan.is_sharded:
        write_json(folder / INDEX_NAME, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})


def parse_size(size: int | str, what: str) -> int:
    """Bytes, of a number or a text like 5GB. Raises ConfigError, which says `what`, for what is neither."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d+)?) ?([KMGT]B)?", str(size).strip().upper(), re.ASCII)
    limit = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if limit < 1:
        raise ConfigError(f"{what} must be a number of bytes or one with KB, MB, GB or TB, found {size!r}")
    return limit


def shard_bytes(size: int | str) -> int:
    """The size of a shard in bytes. Raises as `parse_size` does."""
    return parse_size(size, "the size of a shard")


def _is_whole(file: Path, nbytes: int) -> bool:
    """Whether a shard was written: a shard gets its name when it is, so that only its size can be wrong."""
    if not file.exists():
        return False
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    return file.stat().st_size == 8 + header + nbytes


def _save_shard(shard: Mapping[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
    unfinished = file.with_name(f".{_UNFINISHED}{os.getpid()}-{file.name}")
    try:
        save_file(dict(shard), unfinished, metadata=metadata)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OutputError(f"{file.name}: {error}") from error
    sort_metadata(unfinished)
    unfinished.chmod(file.parent.stat().st_mode & 0o666)  # safetensors leaves it to its owner alone
    os.replace(unfinished, file)


def sort_metadata(file: Path) -> None:
    """Put a shard's metadata in order of its keys, in place.

    safetensors writes them in an order that differs from call to call; sorted, equal tensors give equal files.
    """
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        if "__metadata__" not in header:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) != size:
            raise OutputError(f"{file}: its header could not be rewritten in {size} bytes")
        stream.seek(8)
        stream.write(text)


def polar_metadata(tables: Mapping[int, torch.Tensor], bits_per_tensor: Mapping[str, int]) -> dict[str, str]:
    """Safetensors metadata of a quantised checkpoint: the tables by bits, the layers' bits, the bit order."""
    used = set(bits_per_tensor.values())
    centroids = {str(bits): tables[bits].tolist() for bits in sorted(used)}
    return {
        "centroids": json.dumps(centroids),
        "bits_per_tensor": json.dumps(dict(sorted(bits_per_tensor.items()))),
        "bit_order": BIT_ORDER,
    }


def carry_over(source: Path, folder: Path) -> list[str]:
    """Copy tokenizer, generation config, chat template and the like unchanged; returns the names."""
    carried = []
    for path in sorted(source.iterdir()):
        hidden = path.name.startswith(".")
        if path.is_file() and not hidden and path.suffix not in _NOT_CARRIED and path.name not in _REWRITTEN:
            shutil.copyfile(path, folder / path.name)
            carried.append(path.name)
    return carried


def write_json(path: Path, content: Any) -> None:
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that has its name only when it is whole; raises OSError, and then nothing is left."""
    unfinished = path.with_name(f".{_UNFINISHED}{os.getpid()}-{path.name}")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def is_unfinished(path: Path) -> bool:
    """Whether a file is one that a run which was killed had not written to its end."""
    return path.name.startswith(f".{_UNFINISHED}")


def passthrough(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A meta tensor of the dtype and shape of a source tensor."""
    info = checkpoint.tensors[name]
    return torch.empty(info.shape, dtype=info.dtype, device="meta")
