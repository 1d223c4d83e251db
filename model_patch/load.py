"""Loading a checkpoint, quantised or plain, with nothing missing and nothing left over."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_safetensors_metadata, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,
    NotASafetensorsRepoError,
    SafetensorsParsingError,
    StrictDataclassError,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from model_patch.architectures import check_model_type, is_vision_language
from model_patch.checkpoint.reader import Checkpoint, read_config
from model_patch.checkpoint.strict import check_checkpoint
from model_patch.config import METHOD, PolarQuantConfig
from model_patch.errors import CheckpointError, ConfigError
from model_patch.hf import register

_HUB_ERRORS = (HTTPError, OSError, NotASafetensorsRepoError, SafetensorsParsingError)
# What transformers raises for values of a config.json that it cannot use.
_CONFIG_ERRORS = (
    StrictDataclassError,
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")  # any of them makes a tokenizer
_NOT_DOWNLOADED = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.py"]


def find_checkpoint(source: str | Path) -> Path:
    """The local folder of a checkpoint given by a folder or a Hub name, which is downloaded if it is not cached."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(source), ignore_patterns=_NOT_DOWNLOADED))
    except HFValidationError as error:
        raise CheckpointError(source, "no such folder, and not the name of a model on the Hub") from error
    except _HUB_ERRORS as error:
        raise CheckpointError(source, f"no such folder, and the Hub did not give it: {_reason(error)}") from error


def find_headers(source: str | Path, revision: str | None = None) -> tuple[Path, Checkpoint]:
    """A folder with the checkpoint's config.json, and its tensors' headers; of a Hub name no weight is downloaded."""
    folder = Path(source)
    if folder.is_dir():
        return folder, Checkpoint.open(folder)
    try:
        config = hf_hub_download(str(source), "config.json", revision=revision)
        headers = get_safetensors_metadata(str(source), revision=revision)
    except HFValidationError as error:
        raise CheckpointError(source, "no such folder, and not the name of a model on the Hub") from error
    except _HUB_ERRORS as error:
        problem = f"no such folder, and the Hub did not give its headers: {_reason(error)}"
        raise CheckpointError(source, problem) from error
    return Path(config).parent, Checkpoint.from_hub(headers, Path(config).parent)


def quantization_config(config: dict[str, Any]) -> PolarQuantConfig | None:
    """The PolarQuantConfig of a config.json, or None for a plain model. Raises ConfigError for a malformed one."""
    stated = config.get("quantization_config")
    if stated is None:
        return None
    if not isinstance(stated, dict) or stated.get("quant_method") != METHOD:
        method = stated.get("quant_method") if isinstance(stated, dict) else stated
        raise CheckpointError("config.json", f"quant_method must be {METHOD!r}, found {method!r}")
    try:
        return PolarQuantConfig(**stated)
    except ConfigError as error:
        raise ConfigError(f"config.json: {error}") from error


def load_model(
    source: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | str = "auto"
) -> PreTrainedModel:
    """Load a checkpoint for inference: a PolarQuant one as it is, or a plain one.

    source: a folder or a Hub name. device: the GPU where there is one when None. dtype: of the activations and of what
    is not quantised; the checkpoint's own when "auto".

    Raises CheckpointError listing every tensor that is missing, left over, of a wrong dtype or shape or with NaN,
    infinite or non-positive scales; UnsupportedModelError for an unknown architecture. Never leaves random weights.
    """
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return load_placed(find_checkpoint(source), {"": target}, dtype)


def load_placed(folder: Path, device_map: Mapping[str, Any], dtype: torch.dtype | str) -> PreTrainedModel:
    """`load_model` of a local folder with its modules where `device_map` says, as transformers takes it."""
    register()
    config = read_config(folder)
    model_type = check_model_type(config.get("model_type"))
    quantized = quantization_config(config) is not None
    checkpoint = Checkpoint.open(folder)
    structure = meta_model(folder)
    if not quantized:
        check_checkpoint(structure, checkpoint)
    auto = AutoModelForImageTextToText if is_vision_language(model_type) else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=dtype, device_map=dict(device_map), use_safetensors=True).eval()


def meta_model(folder: Path) -> PreTrainedModel:
    """The unquantised model that a checkpoint's config.json describes, on the meta device: structure without memory.

    Raises UnsupportedModelError for an unknown architecture, CheckpointError when transformers cannot build the model.
    """
    model_type = check_model_type(read_config(folder).get("model_type"))
    auto = AutoModelForImageTextToText if is_vision_language(model_type) else AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(folder)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            return auto.from_config(config)
    except _CONFIG_ERRORS as error:
        problem = f"transformers cannot build this model: {type(error).__name__}: {_reason(error)}"
        raise CheckpointError(folder / "config.json", problem) from error


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint. Raises CheckpointError when there is none."""
    folder = find_checkpoint(source)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):  # transformers would make up an empty one
        raise CheckpointError(folder, f"no tokenizer: none of {', '.join(_TOKENIZER_FILES)} is in this folder")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(folder, f"no tokenizer could be loaded: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """An error of another library in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__
