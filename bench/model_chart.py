"""The chart of `polar bench model`: what accelerated decoding reaches, and the memory it takes."""

from pathlib import Path
from typing import Any

from polar_bench.models import ModelMeasurement


def charted(result: dict[str, Any]) -> list[ModelMeasurement]:
    """What the chart shows: without any of it there is none."""
    rows = [ModelMeasurement(**row) for row in result["rows"]]
    return [row for row in rows if row.phase == "decode" and row.provider.endswith("accelerated")]


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the chart, bars a provider at each context and batch."""
    from matplotlib.figure import Figure

    decoded = charted(result)
    if not decoded:
        return
    several = len({row.model for row in decoded}) > 1
    names = list(dict.fromkeys(_name(row, several) for row in decoded))
    points = sorted({(row.batch, row.context) for row in decoded})
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, title, height in zip(
        figure.subplots(1, 2), ("tokens/s", "peak memory, GB"), (lambda r: r.tokens_per_second, _gigabytes), strict=True
    ):
        for index, name in enumerate(names):
            own = {(row.batch, row.context): row for row in decoded if _name(row, several) == name}
            at = [place for place, point in enumerate(points) if point in own]
            width = 0.8 / len(names)
            places = [place + (index - (len(names) - 1) / 2) * width for place in at]
            axes.bar(places, [height(own[points[place]]) for place in at], width, label=name)
        axes.set_xticks(range(len(points)), [f"{batch} x {context}" for batch, context in points], rotation=45)
        axes.set(xlabel="batch x context", title=title)
        axes.grid(alpha=0.3, axis="y")
        axes.legend()
    figure.suptitle(f"Accelerated decoding, {result['gpu']}")
    figure.savefig(path, dpi=120)


def _name(row: ModelMeasurement, several: bool) -> str:
    provider = row.provider.removesuffix(", accelerated")
    return f"{row.model}, {provider}" if several else provider


def _gigabytes(row: ModelMeasurement) -> float:
    return (row.peak_bytes or row.weight_bytes) / 1e9
