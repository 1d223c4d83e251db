"""lm-eval, the harness that published scores come from, on a checkpoint of any kind that `load_model` loads."""

from typing import Any

import torch

from model_patch.errors import ConfigError
from model_patch.load import load_model, load_tokenizer


def harness_model(
    source: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    batch_size: int = 1,
    max_length: int | None = None,
) -> Any:
    """The checkpoint as an `lm_eval.models.huggingface.HFLM`, to be given to `lm_eval.simple_evaluate(model=...)`.

    device, dtype: as for `load_model`. max_length: tokens of a window; the model's own longest when None.
    Raises ConfigError when lm-eval is not installed, and as `load_model` does.
    """
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ConfigError(f"lm-eval is not installed: pip install 'polar-kernels[lm-eval]' ({error})") from error
    model = load_model(source, device=device, dtype=dtype)
    return HFLM(pretrained=model, tokenizer=load_tokenizer(source), batch_size=batch_size, max_length=max_length)
