"""A model whose decoder layers stay on disk: each is read when it is run, and forgotten again.

Calibration then takes the memory of one layer and of the activations, on a GPU or a host that the model does not fit.
Reading costs more than running, so that several windows are run at a time.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from model_patch.checkpoint.reader import Checkpoint
from model_patch.load import load_placed, meta_model

_SHARE = 0.8  # of the free memory that a model may take to be loaded as a whole
_LOGIT_BYTES = 1 << 30  # of a batch's fp32 logits, of which running backwards holds a few


def fits(source: Path, device: torch.device) -> bool:
    """Whether the weights of a checkpoint, fp32 on a CPU, fit into what is free on the device."""
    nbytes = sum(info.nbytes for info in Checkpoint.open(source).tensors.values())
    if device.type == "cuda":
        return nbytes < _SHARE * torch.cuda.mem_get_info(device)[0]
    return 2 * nbytes < _SHARE * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def load_streamed(source: Path, device: torch.device, dtype: torch.dtype | str) -> PreTrainedModel:
    """The model of a local folder with its decoder layers on disk, all else on the device.

    Raises what `load_model` raises.
    """
    structure = meta_model(source)
    layers = {id(layer) for layer in structure.get_decoder().layers}
    places: dict[str, str] = {}  # as text, which safetensors wants
    inside: tuple[str, ...] = ()
    for name, module in structure.named_modules():
        if id(module) in layers:
            places[name] = "disk"
            inside = (*inside, f"{name}.")
        elif not name.startswith(inside or "\0") and (module._parameters or module._buffers):
            places[name] = str(device)
    return load_placed(source, places, dtype)


def batch_size(model: PreTrainedModel, window: int) -> int:
    """Windows of so many tokens to be run at a time."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return max(1, _LOGIT_BYTES // (4 * window * vocabulary))


@contextmanager
def forgetting_activations(model: PreTrainedModel) -> Iterator[None]:
    """What runs backwards meanwhile runs each layer a second time, in place of keeping its weights and activations."""
    # Later versions of transformers renamed it.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    disable = getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)
    enable({"use_reentrant": False})
    model.train()  # without which layers do not
    rates = [(module, "p") for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    rates += [(module, "attention_dropout") for module in model.modules() if hasattr(module, "attention_dropout")]
    before = [getattr(module, name) for module, name in rates]
    for module, name in rates:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for (module, name), rate in zip(rates, before, strict=True):
            setattr(module, name, rate)
        model.eval()
        disable()
