"""Turning fast decoding on and off for a model."""

import torch
from transformers import PreTrainedModel

from model_patch.architectures import check_model_type
from model_patch.decode.decoder import Decoder, check_arguments
from model_patch.decode.generation import AcceleratedGeneration
from model_patch.groups import group_projections, ungroup_projections
from polar_kernels import PolarGroup


def accelerate(model: PreTrainedModel, *, max_length: int, batch_size: int = 1, compile: bool = True) -> None:
    """Make `model.generate` decode by CUDA graphs: one launch a token in place of thousands.

    max_length: tokens of a prompt and its continuation together; batch_size: sequences at once. Memory for that many is
    taken now, and the graphs of one sequence and of `batch_size` are captured; those of sizes between, when they first
    come. The model may be quantised or plain; its weights are not copied. What an earlier call made is replaced.

    compile: fuse norms, rotary and SiLU by torch.compile before the capture, with the same roundings. It takes some
    seconds for every batch size, less once they are in its cache.

    Quantised projections that read the same activation are grouped (`group_projections`) until `decelerate`.

    Greedy and sampled decoding, of prompts that fit, take the new path and choose the tokens that they would have
    chosen. What does not fit, beam search, assisted decoding, other caches than the default and a call during another
    take transformers' own path, with a warning. Layers may be changed afterwards: the graphs are then captured again.
    On a CPU the same code runs without graphs, and is no faster.

    Raises ArgumentError for sizes that are no positive integers; UnsupportedModelError for architectures that are not
    known, layers other than full attention and GatedDeltaNet, plain experts on a GPU, and several devices; PolarError
    when there is not enough memory.
    """
    check_model_type(getattr(getattr(model, "config", None), "model_type", None))
    check_arguments(model, max_length, batch_size)
    decelerate(model)
    grouped = _group(model)
    try:
        decoder = Decoder(model, max_length, batch_size, compile)
    except BaseException:
        if grouped:
            ungroup_projections(model)
        raise
    decoder.grouped = grouped
    own = type(model)
    # The name and module are the model's own, which transformers reads and save_pretrained writes.
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    model.__class__ = type(own.__name__, (AcceleratedGeneration, own), names)
    model._decoder = decoder


def decelerate(model: PreTrainedModel) -> None:
    """Undo `accelerate`, and free what it took. Does nothing to a model that is as it was."""
    if isinstance(model, AcceleratedGeneration):
        model.__class__ = type(model).__mro__[2]
        grouped = model._decoder.grouped
        del model._decoder
        if grouped:
            ungroup_projections(model)


@torch.inference_mode(False)  # whose tensors stay marked for good
def _group(model: PreTrainedModel) -> bool:
    """Merge the projections that read the same activation, where that helps; whether it was done here."""
    if model.device.type != "cuda" or any(isinstance(module, PolarGroup) for module in model.modules()):
        return False
    return bool(group_projections(model))
