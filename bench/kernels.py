"""Shapes x rows x providers: correctness first, then time beside cuBLAS bf16 on the same GPU in the same run."""

from collections.abc import Sequence
from functools import partial

import torch
from polar_bench import experts
from polar_bench.measurement import Measurement
from polar_bench.providers import Provider, providers, random_layer
from polar_bench.timing import copies_needed, memory_rates, time_calls

from model_patch.progress import Progress, no_progress

# Out x in features of Qwen3.5-9B: gate or up, and GatedDeltaNet qkv and z merged, which is the same shape; gate and up
# merged; down; q with gate; o; k or v; head.
SHAPES = (
    (12288, 4096),
    (24576, 4096),
    (4096, 12288),
    (8192, 4096),
    (4096, 4096),
    (1024, 4096),
    (248320, 4096),
)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
QUICK_SHAPES, QUICK_ROWS = (SHAPES[0], SHAPES[4], SHAPES[5]), (1, 8, 64)
_CHECKED_ROWS = 8192  # of a weight's outputs at a time, in fp64


def run(
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    tokens: Sequence[int] = (),
    progress: Progress = no_progress,
    peers: Sequence[Provider] = (),
) -> tuple[list[Measurement], tuple[float, float]]:
    """All measurements, and the read and copy rates of the memory in bytes a second. tokens: for experts; peers: other
    packages' providers (`peers.py`), after those that are always measured."""
    rates = memory_rates()
    results: list[Measurement] = []
    for index, (out_features, in_features) in enumerate(shapes):
        progress(index, len(shapes), f"{out_features} x {in_features}")
        baseline: dict[int, float] = {}
        for provider in (*providers(), *peers):
            results += _measure_provider(provider, out_features, in_features, rows, baseline, rates[0])
            torch.cuda.empty_cache()
        results.append(_measure_dequantize(out_features, in_features, rates[1]))
        torch.cuda.empty_cache()
    if tokens:
        results += experts.run(experts.SHAPE, tokens, rates[0], progress)
    progress(len(shapes), len(shapes), "done")
    return results, rates


def _measure_provider(
    provider: Provider,
    out_features: int,
    in_features: int,
    rows: Sequence[int],
    baseline: dict[int, float],
    read_rate: float,
) -> list[Measurement]:
    nbytes = provider.bytes(out_features, in_features)
    made = [provider.make(out_features, in_features) for _ in range(copies_needed(nbytes))]
    results = []
    for count in rows:
        if not provider.min_rows <= count <= provider.max_rows:
            continue
        x = torch.randn(count, in_features, device="cuda", dtype=torch.bfloat16)
        error = _error(made[0][0](x), x, made[0][1]())
        timing = None
        if error <= provider.max_error:
            timing = time_calls([partial(call, x) for call, _ in made])
        if provider.mode == "bf16" and timing is not None:
            baseline[count] = timing.microseconds
        bandwidth = None if timing is None else nbytes / timing.microseconds * 1e6
        results.append(
            Measurement(
                "linear",
                provider.name,
                provider.mode,
                out_features,
                in_features,
                count,
                error,
                None if timing is None else timing.microseconds,
                None if timing is None else timing.spread,
                baseline.get(count),
                None if timing is None or count not in baseline else baseline[count] / timing.microseconds,
                bandwidth,
                None if bandwidth is None else bandwidth / read_rate,
            )
        )
    return results


def _measure_dequantize(out_features: int, in_features: int, copy_rate: float) -> Measurement:
    """The one-shot dequantisation to bf16, into a new tensor."""
    nbytes = out_features * in_features * (5.125 / 8 + 2)
    layers = [random_layer(out_features, in_features) for _ in range(min(4, copies_needed(int(nbytes))))]
    dense, exact = layers[0].dequantize(torch.bfloat16)[:64].double(), layers[0].dequantize(torch.float32)[:64].double()
    error = float((dense - exact).norm() / exact.norm())
    timing = time_calls([layer.dequantize for layer in layers]) if error < 0.004 else None
    bandwidth = None if timing is None else nbytes / timing.microseconds * 1e6
    return Measurement(
        "dequantize",
        "polar 5-bit",
        "bf16",
        out_features,
        in_features,
        0,
        error,
        None if timing is None else timing.microseconds,
        None if timing is None else timing.spread,
        None,
        None,
        bandwidth,
        None if bandwidth is None else bandwidth / copy_rate,
    )


def _error(y: torch.Tensor, x: torch.Tensor, dense: torch.Tensor) -> float:
    """Relative error of y against x @ dense^T in fp64, over at most the first outputs."""
    exact = x.double() @ dense[:_CHECKED_ROWS].double().T
    return float((y[:, :_CHECKED_ROWS].double() - exact).norm() / exact.norm())
