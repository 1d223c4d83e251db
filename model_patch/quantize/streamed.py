"""A model whose decoder layers stay on disk, for `LayerwiseRun` to read each when it is run, and forget it again.

Calibration then takes the memory of one layer and of the activations, on a GPU or a host that the model does not fit.
"""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from model_patch.checkpoint.reader import Checkpoint
from model_patch.checkpoint.strict import check_checkpoint
from model_patch.load import meta_model
from model_patch.quantize.layerwise import load_weights
from model_patch.quantize.storage import free_memory

_SHARE = 0.8  # of the free memory that a model may take to be loaded as a whole


def fits(source: Path, device: torch.device) -> bool:
    """Whether the weights of a checkpoint, fp32 on a CPU, fit into what is free on the device."""
    nbytes = sum(info.nbytes for info in Checkpoint.open(source).tensors.values())
    return nbytes * (1 if device.type == "cuda" else 2) < _SHARE * free_memory(device)


def load_streamed(source: Path, device: torch.device, dtype: torch.dtype | str) -> PreTrainedModel:
    """The decoder of a local folder with its layers on the meta device, embedding, norm and head on `device`; what
    does not belong to the decoder stays on the meta device.

    dtype: as in `load_model`. Raises what that raises.
    """
    model, checkpoint = meta_model(source), Checkpoint.open(source)
    check_checkpoint(model, checkpoint)
    if isinstance(dtype, torch.dtype):
        model.to(dtype)
    decoder = model.get_decoder()
    names = {module: name for name, module in model.named_modules()}
    load_weights(decoder, names[decoder], checkpoint, device, skip=("layers.",))
    head = model.get_output_embeddings()
    load_weights(head, names[head], checkpoint, device)
    model.tie_weights()
    decoder.rotary_emb = type(decoder.rotary_emb)(decoder.config).to(device)  # computed, in no checkpoint
    return model.eval()
