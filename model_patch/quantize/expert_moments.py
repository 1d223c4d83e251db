"""Moments of a mixture of experts: of each expert by itself, since every one reads tokens of its own."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from model_patch.quantize.calibrate import EXPERT_ROWS
from model_patch.quantize.moment_sites import QUANTILE, Moments, kept, weighted_moments

_OWN_BYTES = 1 << 30  # of one projection's moments by expert; where they take more, all experts share the site's


class ExpertSites:
    """The sites of a module of experts. What goes on within is run again, expert by expert, for its gradients."""

    def __init__(self, name: str, experts: nn.Module, sites: Mapping[str, str]) -> None:
        """name: of the module; sites: projection -> site."""
        self._name, self._experts, self._sites = name, experts, sites
        self._read: tuple[torch.Tensor, ...] = ()
        self._gradient: torch.Tensor | None = None
        self._windows = 0
        self._tokens = [0] * len(experts.get_parameter("gate_up_proj"))
        self._totals: dict[str, list[torch.Tensor]] = {}  # projection -> of each expert, or where they share, of all

    def watch(self) -> list[RemovableHandle]:
        return [self._experts.register_forward_hook(self._watch_output)]

    def _watch_output(self, module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        def keep(gradient: torch.Tensor) -> None:
            self._gradient = gradient.flatten(0, -2).clone()  # autograd may go on to add to it

        if out.requires_grad:
            self._read = tuple(arg.detach() for arg in args)
            out.register_hook(keep)

    def finish_batch(self, window: int) -> int:
        if self._gradient is not None:
            x, index, router = self._read
            self._windows += len(x) // window
            for expert in range(len(self._tokens)):
                token, choice = (index == expert).nonzero(as_tuple=True)
                self._add(expert, x[token], self._gradient[token] * router[token, choice, None])
        self._read, self._gradient = (), None
        return self._windows

    def _add(self, expert: int, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """gradient: of the expert's own output."""
        up, down = (self._experts.get_parameter(name)[expert] for name in ("gate_up_proj", "down_proj"))
        self._tokens[expert] += len(x)
        with torch.enable_grad():
            middle = F.linear(x, up).requires_grad_()
            gate, value = middle.chunk(2, -1)
            read = F.silu(gate) * value
            (inner,) = torch.autograd.grad(F.linear(read, down), middle, gradient.to(read.dtype))
        for projection, inputs, outputs in (("gate_up_proj", x, inner), ("down_proj", read.detach(), gradient)):
            weights = outputs.float().square().sum(-1)
            if len(weights):
                weights = weights.clamp_max(torch.quantile(weights, QUANTILE))
            self._sum(projection, expert, weighted_moments(inputs, weights))

    def _sum(self, projection: str, expert: int, moments: torch.Tensor) -> None:
        totals = self._totals.setdefault(projection, [])
        place = expert if 4 * len(self._tokens) * moments.numel() <= _OWN_BYTES else 0
        if len(totals) == place:
            totals.append(torch.zeros_like(moments))
        totals[place] += moments

    def add_to(self, found: Moments) -> None:
        rare = [expert for expert, tokens in enumerate(self._tokens) if tokens < EXPERT_ROWS]
        for projection, site in self._sites.items():
            totals = self._totals.pop(projection)
            of_all = torch.stack(totals).sum(0)
            own = [of_all if expert in rare else total for expert, total in enumerate(totals)]
            found.of_site[site] = kept(torch.stack(own) if len(own) > 1 else own[0])
        self._totals.clear()  # of a projection that is not quantised
        if rare:
            found.rare_experts[self._name] = rare
