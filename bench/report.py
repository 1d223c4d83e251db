"""What a run leaves: table, JSON, CSV, charts, and docs/benchmarks.md made from the JSON."""

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from polar_bench import model_chart, model_report
from polar_bench.measurement import Measurement
from polar_bench.peers import PEERS, package_version

from model_patch.checkpoint.writer import write_whole
from polar_kernels.version import __version__

# 12288 x 4096 stands for two layers of the model: gate or up, and the merged GatedDeltaNet projections.
_WEIGHTS = {(12288, 4096): 2}
Result = dict[str, Any]


def assemble(measurements: list[Measurement], rates: tuple[float, float]) -> Result:
    """The result as it is written to JSON."""
    providers = {measurement.provider for measurement in measurements}
    return describe([peer.package for peer in PEERS if peer.name in providers]) | {
        "read_bytes_per_second": rates[0],
        "copy_bytes_per_second": rates[1],
        "rows": [asdict(measurement) for measurement in measurements],
    }


def describe(packages: Sequence[str] = ()) -> Result:
    """What a result was measured on and with. packages: beside those that every result is."""
    found = {name: package_version(name) for name in ("torch", "triton", "transformers", *packages)}
    versions = {"polar": __version__} | {name: number for name, number in found.items() if number}
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": versions,
        "cuda": torch.version.cuda,
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write(result: Result, folder: Path) -> Path:
    """Write JSON, CSV and charts; returns the JSON's path."""
    path = write_json(result, folder, f"kernels-{gpu_name(result)}")
    stem = path.stem
    with (folder / f"{stem}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Measurement)])
        writer.writeheader()
        writer.writerows(result["rows"])
    _draw_ratios(result, "linear", folder / f"{stem}-ratio.png")
    if _has_experts(result):
        _draw_ratios(result, "experts", folder / f"{stem}-experts.png")
    _draw_roofline(result, folder / f"{stem}-roofline.png")
    return path


def write_models(result: Result, folder: Path, stem: str) -> Path:
    """Write JSON and chart of whole models; returns the JSON's path."""
    path = write_json(result, folder, stem)
    model_chart.draw(result, path.with_suffix(".png"))
    return path


def gpu_name(result: Result) -> str:
    """The GPU as it is in the names of files."""
    return str(result["gpu"]).lower().replace(" ", "-")


def write_json(result: Result, folder: Path, stem: str) -> Path:
    """Write <stem>.json into the folder; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.json"
    write_whole(path, (json.dumps(result, indent=1) + "\n").encode())
    return path


def table(result: Result) -> list[list[str]]:
    """Rows for people: shape, M, provider, microseconds, ratio to bf16, GB/s, fraction of the memory's rate, error."""
    rows = []
    for row in result["rows"]:
        timed = row["microseconds"] is not None
        rows.append(
            [
                f"{row['kernel']} {row['N']}x{row['K']}",
                str(row["M"]) if row["M"] else "-",
                f"{row['provider']} {row['mode']}",
                f"{row['microseconds']:.1f} +- {row['spread']:.0%}" if timed else "wrong",
                f"{row['ratio']:.2f}" if row["ratio"] else "-",
                f"{row['bandwidth'] / 1e9:.0f}" if timed else "-",
                f"{row['bandwidth_fraction']:.0%}" if timed else "-",
                f"{row['error']:.5f}",
            ]
        )
    return rows


COLUMNS = ["kernel", "M", "provider", "us", "bf16 / this", "GB/s", "of memory", "error"]


def mean_ratios(result: Result, kernel: str = "linear") -> dict[str, dict[int, float]]:
    """Provider and mode -> M -> geometric mean over the shapes of bf16's time over the provider's."""
    logs: dict[str, dict[int, list[float]]] = {}
    for row in result["rows"]:
        if row["kernel"] == kernel and row["ratio"]:
            times = _WEIGHTS.get((row["N"], row["K"]), 1)
            name = f"{row['provider']} {row['mode']}"
            logs.setdefault(name, {}).setdefault(row["M"], []).extend([math.log(row["ratio"])] * times)
    return {name: {m: math.exp(sum(v) / len(v)) for m, v in by_m.items()} for name, by_m in logs.items()}


def document(folder: Path, out: Path) -> None:
    """Write docs/benchmarks.md from the result files in `folder`."""
    parts = [_INTRODUCTION]
    sections: dict[str, Callable[[Result, Path], str]] = {
        "model": lambda result, path: model_report.section(result, relative_link(path.with_suffix(".png"), out.parent)),
        "vllm-engine": lambda result, path: model_report.engine_section(result),
        "vllm": lambda result, path: model_report.plug_in_section(result),
        "kernels": lambda result, path: _section(result, path, out.parent),
    }
    for kind, section in sections.items():
        for path in sorted(folder.glob(f"{kind}-*.json")):
            if kind == "vllm" and path.name.startswith("vllm-engine-"):
                continue
            parts.append(section(json.loads(path.read_text(encoding="utf-8")), path))
    write_whole(out, "\n".join(parts).encode())


_INTRODUCTION = """# Benchmarks

Made by `polar bench` and this file from its results; do not edit. Each call of a kernel runs in a CUDA graph over
weights that take turns, more of them than the L2 holds; times are medians, the rotation of the activation included. The
ratio is the time of cuBLAS bf16 (`F.linear`) in the same run over the time of the provider: above 1 is faster than
bf16. No time is given where the result is wrong. Errors are relative, against fp64 with the dequantised weight. The
other quantised products have a scale for 128 weights each, as ours, and x and y in bf16.
"""


def _section(result: Result, path: Path, base: Path) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"\n## {result['gpu']}\n",
        f"{versions}, CUDA {result['cuda']}, commit {result['commit']}, {result['date']}.",
        f"Memory: {result['read_bytes_per_second'] / 1e12:.2f} TB/s read, "
        f"{result['copy_bytes_per_second'] / 1e12:.2f} TB/s copied.\n",
        "Geometric mean of the ratio to bf16 over the layers of Qwen3.5-9B:\n",
        *_ratio_lines(mean_ratios(result)),
        "",
        *(
            f"![{kind}]({relative_link(path.with_name(f'{path.stem}-{kind}.png'), base)})\n"
            for kind in ("ratio", "roofline")
        ),
        *_peers_lines(result),
        *(_experts_lines(result, path, base) if _has_experts(result) else ()),
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
        *("| " + " | ".join(row) + " |" for row in table(result)),
    ]
    return "\n".join(lines) + "\n"


def _ratio_lines(ratios: dict[str, dict[int, float]]) -> list[str]:
    counts = sorted({m for by_m in ratios.values() for m in by_m})
    return [
        "| | " + " | ".join(f"M = {m}" for m in counts) + " |",
        "|---" * (len(counts) + 1) + "|",
        *(
            f"| {name} | " + " | ".join(f"{by_m[m]:.2f}" if m in by_m else "" for m in counts) + " |"
            for name, by_m in ratios.items()
        ),
    ]


def peer_ratios(result: Result, ours: str) -> dict[tuple[str, int, int], dict[int, float]]:
    """Other quantised products by name, N and K -> M -> the peer's time over that of `ours`, where both have one."""
    times = {
        (f"{row['provider']} {row['mode']}", row["N"], row["K"], row["M"]): row["microseconds"]
        for row in result["rows"]
        if row["kernel"] == "linear" and row["microseconds"]
    }
    ratios: dict[tuple[str, int, int], dict[int, float]] = {}
    for (name, *shape, m), microseconds in sorted(times.items()):
        if not name.startswith("polar") and not name.endswith("bf16") and (ours, *shape, m) in times:
            ratios.setdefault((name, *shape), {})[m] = microseconds / times[ours, *shape, m]
    return ratios


def _peers_lines(result: Result) -> list[str]:
    lines = []
    for ours, what in (("polar 5-bit int8", "x rounded to int8"), ("polar 5-bit exact", "x in bf16, as the peers'")):
        if ratios := peer_ratios(result, ours):
            counts = sorted({m for by_m in ratios.values() for m in by_m})
            lines += [
                f"The time of other quantised products over that of {ours} ({what}):\n",
                "| | N x K | " + " | ".join(f"M = {m}" for m in counts) + " |",
                "|---" * (len(counts) + 2) + "|",
                *(
                    f"| {name} | {n}x{k} | " + " | ".join(_compared(by_m.get(m)) for m in counts) + " |"
                    for (name, n, k), by_m in ratios.items()
                ),
                "",
            ]
    return lines


def _compared(ratio: float | None) -> str:
    """A peer's time over ours, with a word where ours is slower."""
    if ratio is None:
        return ""
    return f"{ratio:.2f}" + (", slower" if round(ratio, 2) < 1 else "")


def _experts_lines(result: Result, path: Path, base: Path) -> list[str]:
    return [
        "Experts of Qwen3.5-35B-A3B, 256 of them and 8 for each of M tokens, no two tokens to the same as long as "
        "there are enough; the ratio to `torch._grouped_mm` in bf16, for which the order of the pairs is given:\n",
        *_ratio_lines(mean_ratios(result, "experts")),
        "",
        f"![experts]({relative_link(path.with_name(f'{path.stem}-experts.png'), base)})\n",
    ]


def relative_link(path: Path, base: Path) -> str:
    """A link from a file in `base` to `path`."""
    return Path(os.path.relpath(path, base)).as_posix()


def _commit() -> str:
    """The checkout's commit, marked when files differ from it; unknown outside one."""
    where = Path(__file__).resolve().parent
    git = ["git", "-C", str(where), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _has_experts(result: Result) -> bool:
    return any(row["kernel"] == "experts" for row in result["rows"])


def _draw_ratios(result: Result, kernel: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, by_m in mean_ratios(result, kernel).items():
        counts = sorted(by_m)
        axes.plot(counts, [by_m[m] for m in counts], marker="o", label=name)
    of_experts = kernel == "experts"
    axes.set(xscale="log", xlabel="tokens" if of_experts else "rows of the activation, M", ylim=(0, None))
    axes.set_ylabel(f"speed-up over {'torch._grouped_mm' if of_experts else 'cuBLAS'} bf16")
    axes.set_xscale("log", base=2)
    what = "Experts of Qwen3.5-35B-A3B" if of_experts else "Geometric mean over the layers of Qwen3.5-9B"
    axes.set_title(f"{what}, {result['gpu']}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _draw_roofline(result: Result, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in mean_ratios(result):
        rows = [r for r in result["rows"] if f"{r['provider']} {r['mode']}" == name and r["microseconds"]]
        linear = [r for r in rows if r["kernel"] == "linear"]
        intensity = [2 * r["M"] * r["N"] * r["K"] / (r["bandwidth"] * r["microseconds"] / 1e6) for r in linear]
        rate = [2 * r["M"] * r["N"] * r["K"] / r["microseconds"] / 1e6 for r in linear]
        axes.scatter(intensity, rate, s=12, label=name)
    edges = [1, 1e5]
    axes.plot(
        edges, [e * result["read_bytes_per_second"] / 1e12 for e in edges], color="grey", label="memory, measured"
    )
    axes.set(xscale="log", yscale="log", xlabel="operations a byte of weight", ylabel="TFLOP/s", ylim=(0.5, 2e3))
    axes.set_title(f"Roofline, {result['gpu']}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":  # python -m polar_bench.report RESULTS DOCUMENT: the document again, without a GPU
    document(Path(sys.argv[1]), Path(sys.argv[2]))
