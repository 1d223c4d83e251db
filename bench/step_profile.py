"""Where the time of an accelerated decoding step goes, by the names of the kernels that its graph launches."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from transformers import PreTrainedModel

_REPLAYS = 3
# The first pattern found in a kernel's name decides. Names of fused kernels list the operators in them.
_KINDS = (
    ("experts", re.compile(r"_expert_|_group_kernel|_weighted_sum_kernel|_grouped_matmul_kernel")),
    ("rotation", re.compile(r"_quantize_(\w+_)?kernel|_rotate")),
    ("matmuls", re.compile(r"matmul|wgmma_kernel|_dequantize|nvjet|gemm|gemv|cublas|splitK|cutlass")),
    ("attention", re.compile(r"_attend_kernel|_join_kernel|sdpa|fmha|flash|attention|softmax|index_copy|where_kernel")),
    ("norms", re.compile(r"mean_mul_pow_rsqrt|MeanOps|pow_tensor|rms_norm")),
    ("GatedDeltaNet", re.compile(r"_prepare_kernel|_delta_kernel")),
)


@dataclass(frozen=True)
class Kernel:
    """A kernel of a profile: its name, and when it ran, in microseconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class KindOfWork:
    """microseconds and kernels of a step, mean over its replays; `gaps` are the times between kernels."""

    provider: str
    batch: int
    kind: str
    microseconds: float
    kernels: float


def profile_step(model: PreTrainedModel, provider: str, batch: int) -> list[KindOfWork]:
    """The graph of `batch` rows over the shortest cache, replayed; empty on a CPU, which has none."""
    if model.device.type != "cuda":
        return []
    step = model._decoder.first_step(batch)
    step()
    torch.cuda.synchronize(model.device)
    replays = []
    for _ in range(_REPLAYS):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            torch.cuda.synchronize(model.device)
        on_gpu = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        replays.append([Kernel(event.name, event.time_range.start, event.time_range.end) for event in on_gpu])
    return kinds_of_work(replays, provider, batch)


def kinds_of_work(replays: Sequence[Sequence[Kernel]], provider: str, batch: int) -> list[KindOfWork]:
    """The replays' kernels by kind, longest first. The head is the last product of a step."""
    times: dict[str, float] = {}
    counts: dict[str, int] = {}
    for replay in replays:
        kernels = sorted(replay, key=lambda kernel: kernel.start)
        kinds = [_kind(kernel.name) for kernel in kernels]
        if "matmuls" in kinds:
            kinds[len(kinds) - 1 - kinds[::-1].index("matmuls")] = "head"
        for kind, kernel in zip(kinds, kernels, strict=True):
            times[kind] = times.get(kind, 0.0) + kernel.end - kernel.start
            counts[kind] = counts.get(kind, 0) + 1
        gaps = sum(max(0.0, after.start - before.end) for before, after in pairwise(kernels))
        times["gaps"] = times.get("gaps", 0.0) + gaps
    rows = [
        KindOfWork(provider, batch, kind, time / len(replays), counts.get(kind, 0) / len(replays))
        for kind, time in times.items()
    ]
    return sorted(rows, key=lambda row: -row.microseconds)


def _kind(name: str) -> str:
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), "elementwise")
