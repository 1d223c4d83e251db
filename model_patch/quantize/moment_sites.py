"""What listens to the layers of an input site while windows go back through them, and sums up their moments."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from model_patch.quantize.storage import roomy_empty

QUANTILE = 0.99  # of a window's weights, above which they are cut: single tokens would outweigh all others


@dataclass
class Moments:
    """of_site: site -> fp32 [K, K], up to a factor, or of experts [E, K, K]; an expert that saw too few tokens has the
    site's. rare_experts: as in `Calibrated`."""

    of_site: dict[str, torch.Tensor] = field(default_factory=dict)
    rare_experts: dict[str, list[int]] = field(default_factory=dict)


class Site(Protocol):
    """Listens to modules while windows go back through them, and sums up."""

    def watch(self) -> list[RemovableHandle]: ...

    def finish_batch(self, window: int) -> int:
        """To be called when windows of so many tokens have gone back through some layer; returns how many have gone
        through these modules."""

    def add_to(self, found: Moments) -> None:
        """To be called once, when all windows have gone through: what was summed up is then dropped."""


def weighted_moments(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of weight * x^T x: x [T, K], weights fp32 [T] -> fp64 [K, K]."""
    x = x.float()
    return ((x * weights[:, None]).T @ x).double()


def kept(total: torch.Tensor) -> torch.Tensor:
    return roomy_empty(tuple(total.shape), torch.float32, total.device).copy_(total)


class LinearSite:
    """A site of linear layers."""

    def __init__(self, site: str, layers: Sequence[nn.Module]) -> None:
        self._site, self._layers = site, layers
        self._x: torch.Tensor | None = None
        self._weights: torch.Tensor | float = 0.0
        self._total: torch.Tensor | float = 0.0
        self._windows = 0

    def watch(self) -> list[RemovableHandle]:
        first = self._layers[0].register_forward_pre_hook(self._keep_input)
        return [first, *(layer.register_forward_hook(self._watch_output) for layer in self._layers)]

    def _keep_input(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            self._x = args[0].detach().flatten(0, -2)

    def _watch_output(self, module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        def add(gradient: torch.Tensor) -> None:
            self._weights = self._weights + gradient.flatten(0, -2).float().square().sum(-1)

        if out.requires_grad:
            out.register_hook(add)

    def finish_batch(self, window: int) -> int:
        if self._x is not None and isinstance(self._weights, torch.Tensor):
            weights = self._weights.view(-1, window)
            cut = weights.minimum(torch.quantile(weights, QUANTILE, dim=1, keepdim=True))
            self._total = self._total + weighted_moments(self._x, cut.flatten())
            self._windows += len(weights)
        self._x, self._weights = None, 0.0
        return self._windows

    def add_to(self, found: Moments) -> None:
        found.of_site[self._site] = kept(torch.as_tensor(self._total))
        self._total = 0.0
