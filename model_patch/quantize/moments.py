"""Second moments of each input site's activations, every token weighted by how much the model's output hangs on it.

An error e of a layer's outputs at a token costs about |g|^2 |e|^2 of KL divergence, g the gradient of the
log-probability of a token drawn from the model itself (the trace of the Fisher information). Unweighted moments make
feedback look after tokens whose activations are large, which matter no more than others.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from model_patch.architectures import Kind, canonical, kind_of
from model_patch.checkpoint.reader import Checkpoint
from model_patch.errors import CheckpointError
from model_patch.progress import Progress, no_progress
from model_patch.quantize.expert_moments import ExpertSites
from model_patch.quantize.layerwise import LayerwiseRun
from model_patch.quantize.moment_sites import LinearSite, Moments, Site

_SEED = 0  # of the tokens that are drawn


@contextmanager
def _watching(model: PreTrainedModel, watched: Sequence[Site]) -> Iterator[None]:
    """Hooks on the layers, and no gradients for parameters."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    handles = [handle for site in watched for handle in site.watch()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in wanted:
            parameter.requires_grad_(True)


def collect_moments(
    model: PreTrainedModel,
    windows: torch.Tensor,
    sites: Mapping[str, Sequence[str]],
    progress: Progress = no_progress,
    checkpoint: Checkpoint | None = None,
) -> Moments:
    """From token `windows` [W, T] run forth and back through the whole model.

    sites: site -> names of the layers that read it. checkpoint: where layers on the meta device are read from. progress
    counts windows through layers, forth and back. Raises CheckpointError for predictions with NaN.
    """
    run = LayerwiseRun(model, windows, checkpoint)
    watched = _watched_sites(model, sites)
    found = Moments()
    draw = torch.Generator(run.device).manual_seed(_SEED)
    count, window = windows.shape
    done = 0

    def loss(logits: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        probabilities = logits.detach().softmax(-1)
        if probabilities.isnan().any():  # which multinomial would abort on
            raise CheckpointError("model", "its predictions have NaN: NaN or infinity in the weights?")
        drawn = torch.multinomial(probabilities, 1, generator=draw)[:, 0]
        return F.cross_entropy(logits, drawn, reduction="sum")

    def after(_: int) -> None:
        for site in [site for site in watched if site.finish_batch(window) == count]:
            site.add_to(found)
            watched.remove(site)

    def told(more: int) -> None:
        nonlocal done
        done += more
        progress(done, 2 * run.steps, "moments")

    with _watching(model, watched):
        run.back_and_forth(loss, after, told)
    return found


def _watched_sites(model: PreTrainedModel, sites: Mapping[str, Sequence[str]]) -> list[Site]:
    found: list[Site] = []
    experts: dict[str, dict[str, str]] = {}
    for site, names in sites.items():
        if kind_of(names[0]) is Kind.EXPERTS:
            module, _, projection = names[0].rpartition(".")
            experts.setdefault(module, {})[projection] = site
        else:
            found.append(LinearSite(site, [model.get_submodule(name) for name in names]))
    for name, projections in experts.items():
        found.append(ExpertSites(canonical(name), model.get_submodule(name), projections))
    return found
