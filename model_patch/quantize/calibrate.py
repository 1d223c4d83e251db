"""What a calibration text does at each input site: channel magnitudes, and a sample of the activations themselves."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

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
        self.windows = 1  # that are run at a time; the head sees one row of each
        self.total: torch.Tensor | float = 0.0
        self.count = 0
        self.rows: list[torch.Tensor] = []

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].detach().flatten(0, -2).float()
        self.total = self.total + x.abs().sum(0)
        self.count += x.shape[0]
        count = min(self.rows_per_window * self.windows, x.shape[0])
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
    batch_size: int = 1,
) -> dict[str, SiteStatistics]:
    """Run token `windows` [W, T] through the unquantised model and collect each site's statistics.

    sites: site -> names of the layers that read it; the first one is listened to. batch_size: windows at a time.
    """
    collectors = {site: _Collector(max(1, SAMPLE_ROWS // len(windows))) for site in sites}
    first_layers = {model.get_submodule(names[0]): collectors[site] for site, names in sites.items()}
    with _listening(first_layers):
        done = 0
        for batch in windows.split(batch_size):
            for collector in collectors.values():
                collector.windows = len(batch)
            model(batch.to(model.device), use_cache=False, logits_to_keep=1)
            done += len(batch)
            progress(done, len(windows), "calibrating")
    return {site: collector.result() for site, collector in collectors.items()}


@contextmanager
def _listening(layers: Mapping[nn.Module, _Collector]) -> Iterator[None]:
    handles = [layer.register_forward_pre_hook(collector) for layer, collector in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
