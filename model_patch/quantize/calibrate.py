"""What a calibration text does at each input site: channel magnitudes, and a sample of the activations themselves."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from model_patch.architectures import Kind, kind_of
from model_patch.progress import Progress, no_progress

SAMPLE_ROWS = 1024  # activations kept per site for the search of the exponent


@dataclass
class SiteStatistics:
    """Activations read by the layers of one input site.

    mean_abs: fp32 [K], mean magnitude per channel over all tokens. sample: fp32 [S, K], S <= SAMPLE_ROWS rows spread
    evenly over the text.
    """

    mean_abs: torch.Tensor
    sample: torch.Tensor


class _Collector:
    def __init__(self, rows_per_window: int) -> None:
        self.rows_per_window = rows_per_window
        self.total: torch.Tensor | float = 0.0
        self.count = 0
        self.rows: list[torch.Tensor] = []

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].detach().flatten(0, -2).float()
        self.total = self.total + x.abs().sum(0)
        self.count += x.shape[0]
        count = min(self.rows_per_window, x.shape[0])
        self.rows.append(x[torch.arange(count, device=x.device) * x.shape[0] // count].cpu())

    def result(self) -> SiteStatistics:
        assert isinstance(self.total, torch.Tensor)
        return SiteStatistics((self.total / self.count).cpu(), torch.cat(self.rows)[:SAMPLE_ROWS])


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    windows: torch.Tensor,
    sites: Mapping[str, Sequence[str]],
    progress: Progress = no_progress,
) -> dict[str, SiteStatistics]:
    """Run token `windows` [W, T] through the unquantised model and collect each site's statistics.

    sites: site -> names of the layers that read it; the first one is listened to.
    """
    collectors = {site: _Collector(max(1, SAMPLE_ROWS // len(windows))) for site in sites}
    with _listening(model, {names[0]: collectors[site] for site, names in sites.items()}):
        for index, window in enumerate(windows):
            model(window[None].to(next(model.parameters()).device), use_cache=False, logits_to_keep=1)
            progress(index + 1, len(windows), "calibrating")
    return {site: collector.result() for site, collector in collectors.items()}


@contextmanager
def _listening(model: PreTrainedModel, layers: Mapping[str, _Collector]) -> Iterator[None]:
    handles = []
    for name, collector in layers.items():
        if kind_of(name) is Kind.EXPERTS:
            parent, _, leaf = name.rpartition(".")
            hook = collector if leaf == "gate_up_proj" else partial(_collect_middle, collector)
            handles.append(model.get_submodule(parent).register_forward_pre_hook(hook))
        else:
            handles.append(model.get_submodule(name).register_forward_pre_hook(collector))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _collect_middle(collector: _Collector, experts: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    """Give `collector` what down_proj reads, which no module of transformers' experts does: computed once more."""
    x, index, _ = args
    made = []
    gate_up_proj = experts.get_parameter("gate_up_proj")
    for expert in index.unique().tolist():
        gate, up = F.linear(x[(index == expert).any(-1)], gate_up_proj[expert]).chunk(2, -1)
        made.append(F.silu(gate) * up)
    collector(experts, (torch.cat(made),))
