"""Predictions of a reference model kept on disk, so that many models are compared with it for one run of it.

A folder: cache.json says of which model, text and windows they are, window-<number>.safetensors holds the
log-probabilities of one window's scored tokens, fp16 [scored, V]. Rounded so, they move a mean divergence by less than
1e-6; what is read is normalised again.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from transformers import PreTrainedModel

from model_patch.checkpoint.fingerprint import checkpoint_fingerprint, differences, tokens_digest
from model_patch.checkpoint.writer import write_json
from model_patch.errors import CheckpointError, ConfigError, OutputError
from model_patch.evaluate import Convention, Reference, model_reference

_KEY = "log_probabilities"
_RECORD = "cache.json"


class LogitsCache:
    """A `Reference` that computes what is not in its folder, and loads the model only when there is something to.

    Calls raise CheckpointError for a file that is not what was written, OutputError for what cannot be written.
    """

    def __init__(self, folder: Path, tokens: torch.Tensor, load_reference: Callable[[], PreTrainedModel]) -> None:
        self._folder, self._tokens, self._load = folder, tokens, load_reference
        self._compute: Reference | None = None

    def __call__(self, index: int, ids: torch.Tensor, scored: int) -> torch.Tensor:
        path = self._folder / f"window-{index:06d}.safetensors"
        stored = _read(path, scored) if path.exists() else self._add(path, index, ids, scored)
        return stored.to(ids.device).float().log_softmax(-1)

    def _add(self, path: Path, index: int, ids: torch.Tensor, scored: int) -> torch.Tensor:
        if self._compute is None:
            self._compute = model_reference(self._load(), self._tokens)
        stored = self._compute(index, ids, scored).half().cpu()
        partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        try:
            partial.write_bytes(save({_KEY: stored}))
            os.replace(partial, path)
        except OSError as error:
            raise OutputError(f"{path}: could not be written: {error}; the windows before it are kept") from error
        finally:
            partial.unlink(missing_ok=True)
        return stored


def open_cache(
    folder: Path,
    source: Path,
    tokens: torch.Tensor,
    load_reference: Callable[[], PreTrainedModel],
    *,
    window: int,
    stride: int | None,
    convention: Convention,
    dtype: torch.dtype | str,
) -> LogitsCache:
    """The cache in `folder`, made when there is none, of the checkpoint `source`, which `load_reference` loads.

    Raises ConfigError when the folder has the predictions of another model, text or windows, or is something else.
    """
    record: dict[str, object] = {
        "source": checkpoint_fingerprint(source),
        "tokens": tokens_digest(tokens),
        "window": window,
        "stride": stride or window,
        "convention": convention.value,
        "dtype": str(dtype),
    }
    path = folder / _RECORD
    if path.exists():
        if different := differences(record, _read_record(path)):
            raise ConfigError(f"{folder}: its predictions are of another {', '.join(different)}: choose another folder")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: is no cache of predictions, and not empty: choose another folder")
    else:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, record)
        except OSError as error:
            raise OutputError(f"{folder}: cannot be written: {error.strerror}") from error
    return LogitsCache(folder, tokens, load_reference)


def _read_record(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(path, f"cannot be read: {error}; delete the folder to make it again") from error


def _read(path: Path, scored: int) -> torch.Tensor:
    try:
        tensors = load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(path, f"cannot be read: {error}; delete it to make it again") from error
    stored = tensors.get(_KEY)
    if stored is None or stored.dtype != torch.float16 or stored.dim() != 2 or len(stored) != scored:
        found = {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()}
        problem = f"must hold {_KEY} torch.float16 [{scored}, V], found {found}; delete it to make it again"
        raise CheckpointError(path, problem)
    return stored
