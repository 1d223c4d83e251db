"""Experts at the shape of Qwen3.5-35B-A3B, from the router's choice to the weighted sum, beside bf16."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from polar_bench.measurement import Measurement
from polar_bench.timing import time_calls
from torch import nn
from torch.nn import functional as F
from transformers import Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeExperts

from model_patch.progress import Progress, no_progress
from polar_kernels import PolarExpertProjection, PolarExperts, PolarWeight, lloyd_max_levels
from polar_kernels.packing import packed_size

TOKENS = (1, 2, 4, 8, 16, 64, 256, 2048)
QUICK_TOKENS = (1, 16, 256)
_CHECKED_TOKENS = 32  # in fp64
_CALLS = 32  # in a graph, of a few tokens each
_MANY_TOKENS = 64  # of which four calls are enough


@dataclass(frozen=True)
class Shape:
    """experts: gate_up [experts, 2 * middle, hidden] and down [experts, hidden, middle]; top_k: of them a token."""

    experts: int
    hidden: int
    middle: int
    top_k: int

    @property
    def weights(self) -> int:
        """Of one expert."""
        return 3 * self.hidden * self.middle


SHAPE = Shape(256, 2048, 512, 8)


@dataclass(frozen=True)
class Routed:
    """x [T, hidden] bf16, index [T, top_k], weights [T, top_k] bf16."""

    x: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor


Call = Callable[[], torch.Tensor]


class Provider(ABC):
    """A way to compute experts, with random weights of its own."""

    name: str
    mode: str
    max_error: float  # relative, against the experts with the dense weights they stand for
    bits: float = 16  # a weight
    max_tokens = 1 << 30

    @abstractmethod
    def prepare(self, routed: Routed) -> Call:
        """What is timed."""

    @abstractmethod
    def dense(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """gate_up [2 * middle, hidden] and down [hidden, middle] of an expert."""


class GroupedProducts(Provider):
    """bf16: `torch._grouped_mm` with what is around it, the order of the pairs worked out beforehand."""

    name, mode, max_error = "torch._grouped_mm", "bf16", 0.01

    def __init__(self, shape: Shape) -> None:
        self.gate_up, self.down = _random_stacks(shape)

    def prepare(self, routed: Routed) -> Call:
        top_k, flat = routed.index.shape[1], routed.index.flatten()
        order = flat.argsort(stable=True)
        ends = torch.bincount(flat, minlength=len(self.gate_up)).cumsum(0).int()

        def call() -> torch.Tensor:
            both = torch._grouped_mm(routed.x[order // top_k], self.gate_up.transpose(1, 2), offs=ends)
            gate, up = both.chunk(2, -1)
            grouped = torch._grouped_mm(F.silu(gate) * up, self.down.transpose(1, 2), offs=ends)
            made = torch.empty_like(grouped)
            made[order] = grouped
            return (made.unflatten(0, (-1, top_k)) * routed.weights[..., None]).sum(1)

        return call

    def dense(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.gate_up[expert], self.down[expert]


class Transformers(Provider):
    """bf16 through one of transformers' own implementations."""

    mode, max_error = "bf16", 0.01

    def __init__(self, shape: Shape, implementation: str, max_tokens: int = 1 << 30) -> None:
        self.name, self.max_tokens = f"transformers {implementation}", max_tokens
        config = Qwen3_5MoeTextConfig(
            num_experts=shape.experts, hidden_size=shape.hidden, moe_intermediate_size=shape.middle
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            self.module = Qwen3_5MoeExperts(config).requires_grad_(False)
        for name, stack in zip(("gate_up_proj", "down_proj"), _random_stacks(shape), strict=True):
            setattr(self.module, name, nn.Parameter(stack, requires_grad=False))

    def prepare(self, routed: Routed) -> Call:
        return lambda: self.module(routed.x, routed.index, routed.weights)

    def dense(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.module.gate_up_proj[expert], self.module.down_proj[expert]


class Polar(Provider):
    """This package."""

    name, bits = "polar 5-bit", 5.125

    def __init__(self, shape: Shape, mode: str) -> None:
        self.mode, self.max_error = mode, 0.025 if mode == "int8" else 0.01
        gate_up = _random_projection(shape.experts, 2 * shape.middle, shape.hidden)
        self.layer = PolarExperts(gate_up, _random_projection(shape.experts, shape.hidden, shape.middle))
        self.layer.activation = mode  # type: ignore[assignment]
        self._dense: list[torch.Tensor] = []

    def prepare(self, routed: Routed) -> Call:
        return lambda: self.layer(routed.x, routed.index, routed.weights)

    def dense(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._dense:
            self._dense = [p.dequantize(torch.float16) for p in (self.layer.gate_up_proj, self.layer.down_proj)]
        return self._dense[0][expert], self._dense[1][expert]


def providers(shape: Shape) -> list[Callable[[], Provider]]:
    """What the others are held against comes first."""
    return [
        lambda: GroupedProducts(shape),
        lambda: Transformers(shape, "grouped_mm"),
        lambda: Transformers(shape, "batched_mm", max_tokens=64),  # copies the weights of every pair
        lambda: Polar(shape, "int8"),
        lambda: Polar(shape, "exact"),
    ]


def run(shape: Shape, tokens: Sequence[int], read_rate: float, progress: Progress = no_progress) -> list[Measurement]:
    """Measurements of kernel `experts`, N: hidden, K: middle, M: tokens. Bandwidth counts each expert read once."""
    routings = {count: _routings(shape, count) for count in tokens}
    baseline: dict[int, float] = {}
    results: list[Measurement] = []
    makes = providers(shape)
    for index, make in enumerate(makes):
        provider = make()
        progress(index, len(makes), f"experts, {provider.name}")
        for count in tokens:
            if count <= provider.max_tokens:
                results.append(_measure(provider, shape, routings[count], baseline, read_rate))
        del provider
        torch.cuda.empty_cache()
    progress(len(makes), len(makes), "done")
    return results


def _measure(
    provider: Provider, shape: Shape, routings: Sequence[Routed], baseline: dict[int, float], read_rate: float
) -> Measurement:
    count = len(routings[0].x)
    calls = [provider.prepare(routed) for routed in routings]
    error = _error(provider, routings[0], calls[0]())
    timing = time_calls(calls) if error <= provider.max_error else None
    if timing is None:
        return Measurement(
            "experts", provider.name, provider.mode, shape.hidden, shape.middle, count, error,
            None, None, baseline.get(count), None, None, None,
        )  # fmt: skip
    if isinstance(provider, GroupedProducts):
        baseline[count] = timing.microseconds
    bf16 = baseline.get(count)
    experts = sum(len(routed.index.unique()) for routed in routings) / len(routings)
    bandwidth = experts * shape.weights * provider.bits / 8 / timing.microseconds * 1e6
    return Measurement(
        "experts", provider.name, provider.mode, shape.hidden, shape.middle, count, error,
        timing.microseconds, timing.spread, bf16, bf16 and bf16 / timing.microseconds, bandwidth, bandwidth / read_rate,
    )  # fmt: skip


def _routings(shape: Shape, tokens: int) -> list[Routed]:
    """Of calls in a row, which go through all experts, so that none is found in L2: a call chooses no expert twice, nor
    one of the call before, as long as there are enough."""
    pairs, calls = tokens * shape.top_k, _CALLS if tokens < _MANY_TOKENS else 4
    if 2 * pairs > shape.experts:
        chosen = torch.rand(calls, tokens, shape.experts, device="cuda").topk(shape.top_k)[1]
    else:
        whole = shape.experts // pairs * pairs  # as many as whole calls choose
        chosen = torch.randperm(shape.experts, device="cuda")[:whole].repeat(-(-calls * pairs // whole))
        chosen = chosen[: calls * pairs].view(calls, tokens, shape.top_k)
    return [_route(shape, index.contiguous()) for index in chosen]


def _route(shape: Shape, index: torch.Tensor) -> Routed:
    x = torch.randn(len(index), shape.hidden, device="cuda", dtype=torch.bfloat16)
    weights = torch.rand(index.shape, device="cuda")
    return Routed(x, index, (weights / weights.sum(-1, keepdim=True)).bfloat16())


def _error(provider: Provider, routed: Routed, y: torch.Tensor) -> float:
    """Relative error of the first tokens in fp64."""
    x = routed.x[:_CHECKED_TOKENS].double()
    exact = torch.zeros_like(x)
    for token, (experts, weights) in enumerate(zip(routed.index[: len(x)].tolist(), routed.weights, strict=False)):
        for expert, weight in zip(experts, weights.double(), strict=True):
            gate_up, down = (stack.double() for stack in provider.dense(expert))
            gate, up = (gate_up @ x[token]).chunk(2)
            exact[token] += weight * (down @ (F.silu(gate) * up))
    return float((y[: len(x)].double() - exact).norm() / exact.norm())


def _random_stacks(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up and down in bf16, which keep the size of what they multiply."""
    gate_up = torch.randn(shape.experts, 2 * shape.middle, shape.hidden, device="cuda", dtype=torch.bfloat16)
    down = torch.randn(shape.experts, shape.hidden, shape.middle, device="cuda", dtype=torch.bfloat16)
    return gate_up.mul_(shape.hidden**-0.5), down.mul_(shape.middle**-0.5)


def _random_projection(experts: int, rows: int, columns: int) -> PolarExpertProjection:
    packed = torch.randint(0, 256, (experts * rows, packed_size(columns, 5)), device="cuda", dtype=torch.uint8)
    norms = torch.rand(experts * rows, columns // 128, device="cuda").add(0.5).mul_((128 / columns) ** 0.5).half()
    return PolarExpertProjection.from_weight(
        PolarWeight(packed, norms, None, lloyd_max_levels(5).cuda(), columns), experts
    )
