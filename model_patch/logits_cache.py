"""Predictions of a reference model kept on disk, so that many models are compared with it for one run of it.

A folder: cache.json says of which model, text and windows they are, window-<number>.safetensors holds the
log-probabilities of one window's scored tokens in 16 bits: codes int16 [scored, V], and for each token fp32 [scored]
the lowest of them and the step between codes. Steps of at most 1/650 nat move a divergence by some 1e-7 at most; fp16
would move it by some 1e-6. What is read is normalised again.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from transformers import PreTrainedModel

from model_patch.checkpoint.fingerprint import checkpoint_fingerprint, differences, tokens_digest
from model_patch.checkpoint.reader import read_config
from model_patch.checkpoint.writer import is_unfinished, write_json, write_whole
from model_patch.errors import CheckpointError, ConfigError, OutputError
from model_patch.evaluate import (
    Convention,
    Reference,
    check_predictions,
    check_vocabulary,
    model_reference,
    windows_at_a_time,
)
from model_patch.load import quantization_config
from model_patch.progress import Progress, no_progress
from polar_kernels.module import Activation

_CODES = 1 << 16
_LOWEST = -100.0  # nats: below, a probability is nothing, and would make all steps coarser
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
        return _decode({name: tensor.to(ids.device) for name, tensor in stored.items()})

    def _add(self, path: Path, index: int, ids: torch.Tensor, scored: int) -> dict[str, torch.Tensor]:
        if self._compute is None:
            self._compute = model_reference(self._load(), self._tokens)
        stored = {name: tensor.cpu() for name, tensor in _encode(self._compute(index, ids, scored)).items()}
        try:
            write_whole(path, save(stored))
        except OSError as error:
            raise OutputError(f"{path}: could not be written: {error}; the windows before it are kept") from error
        return stored


class MemoryCache:
    """A `Reference` of windows that lie side by side, all but the first token of each scored, kept on the model's
    device for as long as this object lives."""

    def __init__(self, model: PreTrainedModel, windows: torch.Tensor) -> None:
        """windows: [W, T], which are run now. Raises CheckpointError as a `model_reference` does."""
        check_vocabulary(windows, model)
        self._kept: list[dict[str, torch.Tensor]] = []
        for batch in windows.split(windows_at_a_time(model, windows.shape[1])):
            with torch.no_grad():
                logits = model(batch.to(model.device), use_cache=False).logits
            self._kept += [_encode(check_predictions(one[:-1].float().log_softmax(-1))) for one in logits]

    def __call__(self, index: int, ids: torch.Tensor, scored: int) -> torch.Tensor:
        return _decode(self._kept[index])[-scored:]


def cache_bytes(windows: int, window: int, vocabulary: int) -> int:
    """That the predictions of so many windows take in either cache."""
    return windows * (window - 1) * (2 * vocabulary + 8)


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
    device: torch.device,
    activation: Activation,
    progress: Progress = no_progress,
) -> LogitsCache:
    """The cache in `folder`, made when there is none, of the checkpoint `source`, which `load_reference` loads.

    dtype, device, activation: with which it predicts.
    progress: of reading the whole source, whose fingerprint is taken.
    Raises ConfigError when the folder has the predictions of another model, text or windows, or of one that
    predicts otherwise, or is something else.
    """
    record: dict[str, object] = {
        "source": checkpoint_fingerprint(source, progress),
        "tokens": tokens_digest(tokens),
        "window": window,
        "stride": stride or window,
        "convention": convention.value,
        "dtype": str(dtype),
        "device": device.type,
        "activation": activation if quantization_config(read_config(source)) else None,  # a plain model has no choice
    }
    path = folder / _RECORD
    if path.exists():
        if different := differences(record, _read_record(path)):
            raise ConfigError(f"{folder}: its predictions are of another {', '.join(different)}: choose another folder")
    elif folder.exists() and not (folder.is_dir() and all(map(is_unfinished, folder.iterdir()))):
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


def _encode(log_probabilities: torch.Tensor) -> dict[str, torch.Tensor]:
    cut = log_probabilities.clamp_min(_LOWEST)
    lowest = cut.amin(-1)
    step = ((cut.amax(-1) - lowest) / (_CODES - 1)).clamp_min(torch.finfo(torch.float32).tiny)
    codes = ((cut - lowest[:, None]) / step[:, None]).round() - _CODES // 2
    return {"codes": codes.to(torch.int16), "lowest": lowest, "step": step}


def _decode(stored: dict[str, torch.Tensor]) -> torch.Tensor:
    levels = stored["codes"].float() + _CODES // 2
    return (levels * stored["step"][:, None] + stored["lowest"][:, None]).log_softmax(-1)


def _read(path: Path, scored: int) -> dict[str, torch.Tensor]:
    try:
        tensors = load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(path, f"cannot be read: {error}; delete it to make it again") from error
    found = {name: (tensor.dtype, tensor.shape[0], tensor.dim()) for name, tensor in tensors.items() if tensor.dim()}
    expected = {
        "codes": (torch.int16, scored, 2),
        "lowest": (torch.float32, scored, 1),
        "step": (torch.float32, scored, 1),
    }
    if found != expected:
        shapes = {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()}
        problem = f"must hold codes torch.int16 [{scored}, V], lowest and step torch.float32 [{scored}], found {shapes}"
        raise CheckpointError(path, f"{problem}; delete it to make it again")
    return tensors
