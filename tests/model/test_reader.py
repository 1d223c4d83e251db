"""The reader of safetensors shards: folders and files that are not what they should be."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from model_patch.checkpoint.reader import (
    INDEX_NAME,
    SINGLE_NAME,
    Checkpoint,
    parse_levels,
    read_config,
    read_json,
)
from model_patch.errors import CheckpointError
from polar_kernels import PolarError, lloyd_max_levels
from polar_kernels.errors import ArgumentError

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
METADATA = {
    "format": "pt",
    "centroids": json.dumps({"5": lloyd_max_levels(5).tolist()}),
    "bits_per_tensor": json.dumps({"a": 5}),
    "bit_order": "lsb",
}


def _tensors() -> dict[str, torch.Tensor]:
    return {
        "a.packed": torch.arange(4 * 80, dtype=torch.int64).to(torch.uint8).view(4, 80),
        "a.norms": torch.linspace(0.5, 2, 4, dtype=torch.float16).view(4, 1),
        "norm.weight": torch.ones(128, dtype=torch.bfloat16),
        "steps": torch.arange(3),
    }


def _single(folder: Path) -> Path:
    """A folder with one file; returns the file."""
    save_file(_tensors(), folder / SINGLE_NAME, metadata=METADATA)
    return folder / SINGLE_NAME


def _sharded(folder: Path) -> Path:
    """A folder with two shards and an index; returns the index."""
    tensors = _tensors()
    shards = {FIRST: ["a.packed", "a.norms"], SECOND: ["norm.weight", "steps"]}
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata=METADATA)
    weight_map = {name: file for file, names in shards.items() for name in names}
    return _write_index(folder, {"metadata": {"total_size": 1}, "weight_map": weight_map})


def _write_index(folder: Path, content: Any) -> Path:
    (folder / INDEX_NAME).write_text(json.dumps(content))
    return folder / INDEX_NAME


def _with_header(header: bytes, data: bytes = b"\0" * 8) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _header(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8), name: str = "x") -> bytes:
    return json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


def _read_all(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def _refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    return str(caught.value)


def _set_tensor(folder: Path, file: str, name: str, tensor: torch.Tensor) -> None:
    save_file({name: tensor}, folder / file, metadata=METADATA)


# What is intact ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [_single, _sharded])
def test_reads_what_was_written(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    make(tmp_path)
    checkpoint, expected = Checkpoint.open(tmp_path), _tensors()
    assert checkpoint.tensors.keys() == expected.keys()
    assert checkpoint.metadata == METADATA
    for name, tensor in expected.items():
        info = checkpoint.tensors[name]
        assert (info.dtype, info.shape, info.nbytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        assert torch.equal(checkpoint.read(name), tensor)
    assert torch.equal(checkpoint.centroids()[5], lloyd_max_levels(5))
    assert checkpoint.bits_per_tensor() == {"a": 5}


def test_an_index_without_metadata_is_read(tmp_path: Path) -> None:
    index = _sharded(tmp_path)
    _write_index(tmp_path, {"weight_map": json.loads(index.read_text())["weight_map"]})
    assert _read_all(tmp_path).keys() == _tensors().keys()


def test_the_index_is_preferred_to_a_single_file(tmp_path: Path) -> None:
    _sharded(tmp_path)
    _set_tensor(tmp_path, SINGLE_NAME, "other", torch.ones(1))
    assert "other" not in Checkpoint.open(tmp_path).tensors


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    message = _refused(tmp_path)
    assert str(tmp_path) in message
    assert SINGLE_NAME in message
    assert INDEX_NAME in message


# A file that is not safetensors --------------------------------------------------------------------------------------

NOT_SAFETENSORS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a readable safetensors file"),
    "seven bytes": (b"\x01" * 7, "not a readable safetensors file"),
    "header of length 0": (struct.pack("<Q", 0), "not a readable safetensors file"),
    "header past the file": (struct.pack("<Q", 1000) + b"{}", "not a readable safetensors file"),
    "header over 100 MB": (struct.pack("<Q", 200_000_000) + b"{}", "not a readable safetensors file"),
    "header of 2^63 bytes": (struct.pack("<Q", 1 << 63) + b"{}", "not a readable safetensors file"),
    "header of 2^64 - 1 bytes": (struct.pack("<Q", (1 << 64) - 1) + b"{}", "not a readable safetensors file"),
    "not UTF-8": (_with_header(b'{"\xff\xfe": 1}'), "not a readable safetensors file"),
    "not JSON": (_with_header(b"{x: 1}"), "not a readable safetensors file"),
    "a list": (_with_header(b"[1, 2]"), "not a readable safetensors file"),
    "very deep": (_with_header(b"[" * 100_000 + b"]" * 100_000), "not a readable safetensors file"),
    "metadata not of strings": (_with_header(b'{"__metadata__": {"a": 1}}', b""), "not a readable safetensors file"),
    "offsets reversed": (_with_header(_header(offsets=(8, 0))), "not a readable safetensors file"),
    "offsets negative": (_with_header(_header(offsets=(-8, 0))), "not a readable safetensors file"),
    "a hole": (_with_header(_header(offsets=(8, 16)), b"\0" * 16), "not a readable safetensors file"),
    "span of another size": (_with_header(_header(shape=(3,))), "not a readable safetensors file"),
    "a product that overflows": (_with_header(_header(shape=(1 << 62, 1 << 62))), "not a readable safetensors file"),
    "unknown dtype": (_with_header(_header(dtype="F31")), "not a readable safetensors file"),
    "negative shape": (_with_header(_header(shape=(-2,))), "not a readable safetensors file"),
    "trailing bytes": (_with_header(_header(), b"\0" * 9), "not a readable safetensors file"),
    "missing byte": (_with_header(_header(), b"\0" * 7), "not a readable safetensors file"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
    "HTML page": (b"\n<!DOCTYPE html>\n<html><body>404</body></html>", "HTML page"),
    "pickle": (b"\x80\x04\x95\x10\0\0\0\0\0\0\0}\x94.", "pickle"),
    "zip archive of torch.save": (b"PK\x03\x04" + b"\0" * 40, "pickle or a zip archive, which is never read"),
    "dtype of no torch tensor here": (_with_header(_header(dtype="F8_E4M3", offsets=(0, 2)), b"\0" * 2), "F8_E4M3"),
}


@pytest.mark.parametrize("case", NOT_SAFETENSORS)
def test_a_file_that_is_not_safetensors(tmp_path: Path, case: str) -> None:
    content, expected = NOT_SAFETENSORS[case]
    (tmp_path / SINGLE_NAME).write_bytes(content)
    message = _refused(tmp_path)
    assert SINGLE_NAME in message
    assert expected in message


@pytest.mark.parametrize("cut", [1, 8, 100, 500])
def test_a_file_cut_short(tmp_path: Path, cut: int) -> None:
    file = _single(tmp_path)
    file.write_bytes(file.read_bytes()[:-cut])
    assert SINGLE_NAME in _refused(tmp_path)


# Index and shards ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shard",
    [
        "/etc/passwd.safetensors",
        "../outside.safetensors",
        "sub/inside.safetensors",
        "weights.bin",
        "weights.pkl",
        "",
        "..",
        ".safetensors/..",
        7,
        None,
        ["a.safetensors"],
    ],
)
def test_a_shard_path_that_leaves_the_folder_or_has_another_ending(tmp_path: Path, shard: object) -> None:
    index = _sharded(tmp_path)
    weight_map = json.loads(index.read_text())["weight_map"]
    _write_index(tmp_path, {"weight_map": weight_map | {"steps": shard}})
    message = _refused(tmp_path)
    assert INDEX_NAME in message
    assert "weight_map['steps']" in message
    assert repr(shard) in message


def test_all_bad_shard_paths_are_listed(tmp_path: Path) -> None:
    _write_index(tmp_path, {"weight_map": {f"t{i}": f"../{i}.safetensors" for i in range(30)}})
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    assert len(caught.value.problems) == 30
    assert "10 more" in str(caught.value)


@pytest.mark.parametrize("content", [[], {}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": "x"}, None, 3])
def test_an_index_without_a_weight_map(tmp_path: Path, content: object) -> None:
    _sharded(tmp_path)
    _write_index(tmp_path, content)
    message = _refused(tmp_path)
    assert INDEX_NAME in message
    assert "weight_map" in message


@pytest.mark.parametrize(
    "text", ["", "{", '{"weight_map": {"a": NaN}}', "[" * 100_000, "\x00", '{"weight_map": {"a": "", "a": ""}}']
)
def test_an_index_that_is_not_json(tmp_path: Path, text: str) -> None:
    _sharded(tmp_path)
    (tmp_path / INDEX_NAME).write_text(text)
    message = _refused(tmp_path)
    assert INDEX_NAME in message
    assert "not valid JSON" in message


@pytest.mark.parametrize("name", ["x" * 300 + ".safetensors", "a\0b.safetensors"])
def test_a_shard_name_no_file_can_have(tmp_path: Path, name: str) -> None:
    _write_index(tmp_path, {"weight_map": {"a": name}})
    assert name in _refused(tmp_path)


def test_missing_shards_are_all_listed(tmp_path: Path) -> None:
    _sharded(tmp_path)
    (tmp_path / FIRST).unlink()
    (tmp_path / SECOND).unlink()
    message = _refused(tmp_path)
    assert f"{FIRST}: this shard is missing" in message
    assert f"{SECOND}: this shard is missing" in message


def test_a_folder_in_place_of_a_shard(tmp_path: Path) -> None:
    _sharded(tmp_path)
    (tmp_path / FIRST).unlink()
    (tmp_path / FIRST).mkdir()
    assert f"{FIRST}: not a file" in _refused(tmp_path)


def test_a_missing_and_a_broken_shard_are_both_listed(tmp_path: Path) -> None:
    _sharded(tmp_path)
    (tmp_path / FIRST).unlink()
    (tmp_path / SECOND).write_bytes(b"")
    message = _refused(tmp_path)
    assert f"{FIRST}: this shard is missing" in message
    assert f"{SECOND}: not a readable safetensors file" in message


def test_tensors_on_which_index_and_shards_disagree_are_all_listed(tmp_path: Path) -> None:
    index = _sharded(tmp_path)
    weight_map = json.loads(index.read_text())["weight_map"]
    weight_map |= {"ghost": FIRST, "a.norms": SECOND}
    del weight_map["steps"]
    _write_index(tmp_path, {"weight_map": weight_map})
    message = _refused(tmp_path)
    assert f"{INDEX_NAME} puts ghost in {FIRST}, but it is nowhere" in message
    assert f"{INDEX_NAME} puts a.norms in {SECOND}, but it is in {FIRST}" in message
    assert f"{SECOND} holds steps, which {INDEX_NAME} lacks" in message


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    _sharded(tmp_path)
    tensors = _tensors()
    twice = {name: tensors[name] for name in ("norm.weight", "steps", "a.norms")}
    save_file(twice, tmp_path / SECOND, metadata=METADATA)
    assert f"a.norms is in both {FIRST} and {SECOND}" in _refused(tmp_path)


def test_shards_of_different_metadata(tmp_path: Path) -> None:
    _sharded(tmp_path)
    tensors = _tensors()
    names = ("norm.weight", "steps")
    save_file({n: tensors[n] for n in names}, tmp_path / SECOND, metadata=METADATA | {"bit_order": "msb"})
    message = _refused(tmp_path)
    assert SECOND in message
    assert "'bit_order'" in message


# JSON and metadata ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "{", '{"a": NaN}', '{"a": -Infinity}', "{'a': 1}", "[" * 100_000, '{"a": 1, "a": 1}']
)
def test_json_that_is_not(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        read_json(path)


def test_json_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: No such file"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"config\.json: expected an object, found list"):
        read_config(tmp_path)


@pytest.mark.parametrize("key", ["centroids", "bits_per_tensor"])
@pytest.mark.parametrize("text", [None, "", "[1]", "{", "3", "[" * 100_000, '{"5": 1, "5": 2}'])
def test_metadata_that_is_no_object(tmp_path: Path, key: str, text: str | None) -> None:
    checkpoint = Checkpoint(tmp_path, {}, {} if text is None else {key: text})
    with pytest.raises(CheckpointError, match=f"'{key}'"):
        getattr(checkpoint, key)()


LEVELS = lloyd_max_levels(2).tolist()
BAD_LEVELS: dict[str, object] = {
    "too few": LEVELS[:-1],
    "too many": [*LEVELS, 9.0],
    "none": [],
    "not a list": {"0": 1.0},
    "null": None,
    "unsorted": LEVELS[::-1],
    "duplicate": [LEVELS[0], LEVELS[1], LEVELS[1], LEVELS[3]],
    "NaN": [*LEVELS[:-1], float("nan")],
    "infinite": [*LEVELS[:-1], float("inf")],
    "beyond fp32": [*LEVELS[:-1], 1e39],
    "beyond any float": [*LEVELS[:-1], 10**400],
    "a string": [*LEVELS[:-1], "3"],
    "a null": [*LEVELS[:-1], None],
    "nested": [[level] for level in LEVELS],
    "ragged": [*LEVELS[:-1], LEVELS],
}


@pytest.mark.parametrize("case", BAD_LEVELS)
def test_centroids_that_are_no_table(tmp_path: Path, case: str) -> None:
    checkpoint = Checkpoint(tmp_path, {}, {"centroids": json.dumps({"2": BAD_LEVELS[case]})})
    with pytest.raises(CheckpointError, match=r"metadata 'centroids'\['2'\]") as caught:
        checkpoint.centroids()
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("key", ["x", "", "9", "1", "-2", "2.0"])
def test_centroids_of_no_width(tmp_path: Path, key: str) -> None:
    checkpoint = Checkpoint(tmp_path, {}, {"centroids": json.dumps({key: LEVELS})})
    with pytest.raises(CheckpointError, match=r"metadata 'centroids'"):
        checkpoint.centroids()


def test_all_bad_tables_are_listed(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, {}, {"centroids": json.dumps({"2": [], "3": [], "4": []})})
    with pytest.raises(CheckpointError) as caught:
        checkpoint.centroids()
    assert len(caught.value.problems) == 3


def test_parse_levels_names_what_it_found() -> None:
    with pytest.raises(ArgumentError, match="expected a list of 4 levels, found 3 values"):
        parse_levels(2, LEVELS[:-1])
    assert parse_levels(2, LEVELS).tolist() == LEVELS


# Headers of the Hub --------------------------------------------------------------------------------------------------


def _hub_headers(dtype: str) -> Any:
    """What `huggingface_hub.get_safetensors_metadata` returns, as far as it is read."""
    tensor = SimpleNamespace(dtype=dtype, shape=[4, 128])
    file = SimpleNamespace(metadata={"format": "pt"}, tensors={"a.weight": tensor})
    return SimpleNamespace(files_metadata={SINGLE_NAME: file})


def test_headers_of_the_hub(tmp_path: Path) -> None:
    checkpoint = Checkpoint.from_hub(_hub_headers("BF16"), tmp_path)
    info = checkpoint.tensors["a.weight"]
    assert (info.file.name, info.dtype, info.shape) == (SINGLE_NAME, torch.bfloat16, (4, 128))


def test_headers_of_the_hub_with_a_dtype_that_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors: a\.weight has dtype F8_E4M3"):
        Checkpoint.from_hub(_hub_headers("F8_E4M3"), tmp_path)


# Random damage -------------------------------------------------------------------------------------------------------


def _damage(content: bytes, rng: random.Random) -> bytes:
    """Flip some bytes, half of the time of the header, or cut the file."""
    header = 8 + struct.unpack("<Q", content[:8])[0]
    if rng.random() < 0.25:
        return content[: rng.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        position = rng.randrange(header) if rng.random() < 0.5 else rng.randrange(header, len(content))
        changed[position] ^= 1 << rng.randrange(8)
    return bytes(changed)


@pytest.mark.parametrize("seed", range(10))
def test_damaged_files_are_read_or_refused(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    file = _single(tmp_path)
    content, outcomes = file.read_bytes(), {"read": 0, "refused": 0}
    for _ in range(25):
        file.write_bytes(_damage(content, rng))
        try:
            checkpoint = Checkpoint.open(tmp_path)
            tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
            for metadata in (checkpoint.centroids, checkpoint.bits_per_tensor):
                metadata()
        except PolarError as error:
            assert str(tmp_path) in str(error)  # noqa: PT017
            outcomes["refused"] += 1
        else:
            assert sum(tensor.nbytes for tensor in tensors.values()) <= len(content)
            outcomes["read"] += 1
    assert min(outcomes.values()) > 0, outcomes
