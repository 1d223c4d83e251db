"""A whole checkpoint folder: shards, config, carried files and model card, written in one go or not at all."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from model_patch.checkpoint.card import model_card
from model_patch.checkpoint.reader import read_config
from model_patch.checkpoint.writer import carry_over, new_folder, polar_metadata, write_json, write_shards
from model_patch.config import PolarQuantConfig

DEFAULT_SHARD_SIZE = "5GB"


def write_quantized(
    source: Path,
    out: Path,
    layout: Mapping[str, torch.Tensor],
    produce: Callable[[str], torch.Tensor],
    config: PolarQuantConfig,
    tables: Mapping[int, torch.Tensor],
    bits_per_tensor: Mapping[str, int],
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    kept: Path | None = None,
) -> list[str]:
    """Write a checkpoint of the format beside what `source` carries over; returns warnings.

    layout: name -> meta tensor of everything to store, in order; `produce(name)` gives the tensor itself. kept: the
    folder to work in, whose finished shards are not made again.
    """
    content = read_config(source) | {"quantization_config": config.to_dict()}
    metadata = polar_metadata(tables, bits_per_tensor)
    return _write(source, out, layout, produce, content, metadata, max_shard_size, overwrite, kept)


def write_plain(
    source: Path,
    out: Path,
    layout: Mapping[str, torch.Tensor],
    produce: Callable[[str], torch.Tensor],
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
) -> list[str]:
    """Write an unquantised checkpoint in the same way; returns warnings."""
    content = {key: value for key, value in read_config(source).items() if key != "quantization_config"}
    return _write(source, out, layout, produce, content, {}, max_shard_size, overwrite)


def _write(
    source: Path,
    out: Path,
    layout: Mapping[str, torch.Tensor],
    produce: Callable[[str], torch.Tensor],
    config: dict[str, Any],
    metadata: Mapping[str, str],
    max_shard_size: int | str,
    overwrite: bool,
    kept: Path | None = None,
) -> list[str]:
    with new_folder(out, overwrite, kept) as folder:
        write_shards(folder, layout, produce, metadata, max_shard_size)
        write_json(folder / "config.json", config)
        carried = carry_over(source, folder)
        size = sum(tensor.nbytes for tensor in layout.values())
        (folder / "README.md").write_text(model_card(source, config, size), encoding="utf-8")
    expected = {"tokenizer.json": "tokenizer", "generation_config.json": "generation config"}
    return [f"{source} has no {what} ({name})" for name, what in expected.items() if name not in carried]
