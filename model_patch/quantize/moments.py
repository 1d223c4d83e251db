"""Second moments of each input site's activations, every token weighted by how much the model's output hangs on it.

An error e of a layer's outputs at a token costs about |g|^2 |e|^2 of KL divergence, g the gradient of the
log-probability of a token drawn from the model itself (the trace of the Fisher information). Unweighted moments make
feedback look after tokens whose activations are large, which matter no more than others.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from model_patch.architectures import Kind, names_of_kind
from model_patch.errors import UnsupportedModelError
from model_patch.progress import Progress, no_progress

_QUANTILE = 0.99  # of a window's weights, above which they are cut: single tokens would outweigh all others
_SEED = 0  # of the tokens that are drawn


class _Site:
    """What the layers of a site do in some windows, and the sum over all."""

    def __init__(self) -> None:
        self.x: torch.Tensor | None = None
        self.weights: torch.Tensor | float = 0.0
        self.total: torch.Tensor | float = 0.0

    def keep_input(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.x = args[0].detach().flatten(0, -2)

    def watch_output(self, module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        def add(gradient: torch.Tensor) -> None:
            self.weights = self.weights + gradient.detach().flatten(0, -2).float().square().sum(-1)

        out.register_hook(add)

    def finish_windows(self, window: int) -> None:
        if self.x is not None and isinstance(self.weights, torch.Tensor):
            for x, weights in zip(self.x.float().split(window), self.weights.split(window), strict=True):
                cut = weights.clamp_max(torch.quantile(weights, _QUANTILE))
                self.total = self.total + ((x * cut[:, None]).T @ x).double().cpu()
        self.x, self.weights = None, 0.0


def refuse_experts(sites: Mapping[str, Sequence[str]]) -> None:
    """Raise UnsupportedModelError for sites with experts, each of which sees inputs of its own."""
    if found := [site for site, names in sites.items() if names_of_kind(names, Kind.EXPERTS)]:
        raise UnsupportedModelError(f"error feedback is not done for experts, which {found[0]} has: use AWQ instead")


@torch.enable_grad()
def collect_moments(
    model: PreTrainedModel,
    windows: torch.Tensor,
    sites: Mapping[str, Sequence[str]],
    progress: Progress = no_progress,
    batch_size: int = 1,
) -> dict[str, torch.Tensor]:
    """Site -> fp32 [K, K], up to a factor, from token `windows` [W, T] run forth and back through the whole model.

    sites: site -> names of the layers that read it. batch_size: windows at a time. Raises as `refuse_experts` does.
    """
    refuse_experts(sites)
    found = {site: _Site() for site in sites}
    device = model.device
    draw = torch.Generator(device).manual_seed(_SEED)
    with _watching(model, {site: [model.get_submodule(n) for n in names] for site, names in sites.items()}, found):
        done = 0
        for batch in windows.split(batch_size):
            logits = model(batch.to(device), use_cache=False).logits.flatten(0, 1).float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)[:, 0]
            torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
            for site in found.values():
                site.finish_windows(windows.shape[1])
            done += len(batch)
            progress(done, len(windows), "moments")
    return {name: torch.as_tensor(site.total).float() for name, site in found.items()}


@contextmanager
def _watching(
    model: PreTrainedModel, layers: Mapping[str, Sequence[nn.Module]], found: Mapping[str, _Site]
) -> Iterator[None]:
    """Hooks on the layers, and gradients for activations but not for parameters."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    embedding = model.get_input_embeddings()
    handles = [embedding.register_forward_hook(lambda module, args, out: out.requires_grad_())]
    for name, members in layers.items():
        handles.append(members[0].register_forward_pre_hook(found[name].keep_input))
        handles += [member.register_forward_hook(found[name].watch_output) for member in members]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in wanted:
            parameter.requires_grad_(True)
