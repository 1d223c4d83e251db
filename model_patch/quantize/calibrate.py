"""What a calibration text does at each input site: channel magnitudes, and a sample of the activations themselves."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from model_patch.architectures import Kind, kind_of
from model_patch.checkpoint.reader import Checkpoint
from model_patch.progress import Progress, no_progress
from model_patch.quantize.layerwise import LayerwiseRun

SAMPLE_ROWS = 1024  # activations kept per site for the search of the exponent
EXPERT_ROWS = 32  # and for each expert; one that saw fewer tokens is judged by the site's


@dataclass
class SiteStatistics:
    """Activations read by the layers of one input site.

    mean_abs: fp32 [K], mean magnitude per channel over all tokens. sample: fp32 [S, K], S <= SAMPLE_ROWS rows spread
    evenly over the text. expert_samples: where experts read it, the first S <= EXPERT_ROWS that each saw, fp32 [S, K].
    """

    mean_abs: torch.Tensor
    sample: torch.Tensor
    expert_samples: tuple[torch.Tensor, ...] = ()

    @property
    def rare_experts(self) -> list[int]:
        """Experts that saw fewer than EXPERT_ROWS tokens."""
        return [expert for expert, sample in enumerate(self.expert_samples) if len(sample) < EXPERT_ROWS]


class _Collector:
    def __init__(self, rows_per_window: int, window: int) -> None:
        self.rows_per_window, self.window = rows_per_window, window
        self.total: torch.Tensor | float = 0.0
        self.count = 0
        self.rows: list[torch.Tensor] = []

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].detach().flatten(0, -2)
        self.add(x, len(x) // self.window or len(x))  # the head sees one row of each window

    def add(self, x: torch.Tensor, windows: int) -> None:
        """x: [R, K], what was read in so many windows."""
        x = x.float()
        self.total = self.total + x.abs().sum(0)
        self.count += x.shape[0]
        count = min(self.rows_per_window * windows, x.shape[0])
        self.rows.append(x[torch.arange(count, device=x.device) * x.shape[0] // count].cpu())

    def result(self) -> SiteStatistics:
        assert isinstance(self.total, torch.Tensor)
        return SiteStatistics((self.total / self.count).cpu(), torch.cat(self.rows)[:SAMPLE_ROWS])


class _ExpertCollector(_Collector):
    """Listens to the module of all experts, for one of its projections."""

    def __init__(self, rows_per_window: int, window: int, projection: str) -> None:
        super().__init__(rows_per_window, window)
        self.projection = projection
        self.seen: list[torch.Tensor] = []

    def __call__(self, experts: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x, index, _ = args
        gate_up_proj = experts.get_parameter("gate_up_proj")
        read = []
        for expert, weight in enumerate(gate_up_proj):
            rows = x[(index == expert).any(-1)].detach()
            if self.projection == "down_proj":  # what it reads no module of transformers' has as its input
                gate, up = F.linear(rows, weight).chunk(2, -1)
                rows = F.silu(gate) * up
            if len(self.seen) == expert:
                self.seen.append(rows[:0].float().cpu())
            room = EXPERT_ROWS - len(self.seen[expert])
            self.seen[expert] = torch.cat([self.seen[expert], rows[:room].float().cpu()])
            read.append(rows)
        self.add(x.detach() if self.projection == "gate_up_proj" else torch.cat(read), len(x) // self.window)

    def result(self) -> SiteStatistics:
        return replace(super().result(), expert_samples=tuple(self.seen))


def calibrate(
    model: PreTrainedModel,
    windows: torch.Tensor,
    sites: Mapping[str, Sequence[str]],
    progress: Progress = no_progress,
    checkpoint: Checkpoint | None = None,
) -> dict[str, SiteStatistics]:
    """Run token `windows` [W, T] through the unquantised model and collect each site's statistics.

    sites: site -> names of the layers that read it; the first one is listened to. checkpoint: where layers on the meta
    device are read from. progress counts windows through layers.
    """
    run = LayerwiseRun(model, windows, checkpoint)
    rows = max(1, SAMPLE_ROWS // len(windows))
    collectors = {site: _collector(names[0], rows, windows.shape[1]) for site, names in sites.items()}
    done = 0

    def told(more: int) -> None:
        nonlocal done
        done += more
        progress(done, run.steps, "calibrating")

    with _listening(model, {names[0]: collectors[site] for site, names in sites.items()}):
        run.forward(told)
    return {site: collector.result() for site, collector in collectors.items()}


def _collector(layer: str, rows_per_window: int, window: int) -> _Collector:
    if kind_of(layer) is Kind.EXPERTS:
        return _ExpertCollector(rows_per_window, window, layer.rpartition(".")[2])
    return _Collector(rows_per_window, window)


@contextmanager
def _listening(model: PreTrainedModel, layers: Mapping[str, _Collector]) -> Iterator[None]:
    handles = []
    for name, collector in layers.items():
        module = name.rpartition(".")[0] if isinstance(collector, _ExpertCollector) else name
        handles.append(model.get_submodule(module).register_forward_pre_hook(collector))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
