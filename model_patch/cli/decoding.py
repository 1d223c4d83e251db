"""What `polar generate`, `chat` and `serve` share: a model that is ready to decode."""

import torch
from transformers import PreTrainedModel

from model_patch.cli.options import warn
from model_patch.decode import accelerate
from model_patch.errors import UnsupportedModelError
from model_patch.load import load_model
from model_patch.patch import set_activation


def load_for_decoding(
    folder: str,
    device: torch.device,
    dtype: torch.dtype | str,
    *,
    exact: bool,
    accelerated: bool | None,
    max_length: int,
    compile: bool = True,
) -> PreTrainedModel:
    """The model in `folder`, decoding by captured steps where asked to: by default, None, on a GPU that can.

    Raises what `load_model` and `accelerate` raise; by default a model that `accelerate` does not take goes without,
    with a warning.
    """
    model = load_model(folder, device=device, dtype=dtype)
    set_activation(model, "exact" if exact else "int8")
    if accelerated is None and device.type != "cuda":
        return model
    if accelerated is not False:
        try:
            accelerate(model, max_length=max_length, compile=compile)
        except UnsupportedModelError as error:
            if accelerated:
                raise
            warn([f"decoding without captured steps, slower: {error}"])
    return model
