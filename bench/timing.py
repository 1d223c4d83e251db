"""Time of a GPU call with the L2 cache cold, and the rates the memory reaches on the same GPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

L2_BYTES = 200_000_000  # weights in rotation at the least: more than three times the largest L2 in use
_REPLAYS = 20


@dataclass(frozen=True)
class Timing:
    """microseconds: median of the replays' means a call; spread: (90 % - 10 % quantile) / median."""

    microseconds: float
    spread: float


def copies_needed(nbytes: int) -> int:
    """How many weights of `nbytes` must take turns so that none is found in L2."""
    return max(2, min(16, -(-L2_BYTES // nbytes)))


def time_calls(calls: Sequence[Callable[[], object]], replays: int = _REPLAYS) -> Timing:
    """Capture all `calls` (the same work on different weights) in one CUDA graph and time its replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = sorted(_replay(graph) * 1000 / len(calls) for _ in range(replays))
    median = times[len(times) // 2]
    return Timing(median, (times[int(0.9 * len(times))] - times[int(0.1 * len(times))]) / median)


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    """Milliseconds of one replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def memory_rates() -> tuple[float, float]:
    """Bytes a second of reading 1 GiB, and of copying 1 GiB (read and written bytes both counted)."""
    source = torch.ones(1 << 27, dtype=torch.int64, device="cuda")
    target = torch.empty_like(source)
    read = time_calls([source.sum])
    # An elementwise kernel: a captured copy_ becomes a driver copy, which is slower here.
    copy = time_calls([lambda: torch.add(source, 1, out=target)])
    return source.nbytes / read.microseconds * 1e6, 2 * source.nbytes / copy.microseconds * 1e6
