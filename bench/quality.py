"""What `polar ablate` leaves: table, JSON, chart, and docs/quality.md made from the JSON."""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from polar_bench import ablate, report
from polar_bench.report import Result
from polar_bench.variants import BASELINE, FULL, VARIANTS

from model_patch.checkpoint.writer import write_whole

MIXED = ["layers", "bits a weight", "perplexity", "mean KL", "of uniform", "99 % KL", "same top-1"]
COLUMNS = ["weights", "bits a weight", "perplexity", "mean KL", "of baseline", "99 % KL", "same top-1"]


def assemble(measurements: Sequence[ablate.Measurement], device: torch.device, **settings: Any) -> Result:
    """The result as it is written to JSON. device: that it ran on; settings: what was measured on what."""
    described = report.describe() | ({"gpu": "CPU"} if device.type == "cpu" else {})
    return described | settings | {"rows": [_flat(asdict(measurement)) for measurement in measurements]}


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    return row | row.pop("evaluation")


def write(result: Result, folder: Path) -> Path:
    """Write JSON and chart, named by the model and the windows that were scored; returns the JSON's path."""
    name = result["model"].rpartition("/")[-1]
    path = report.write_json(result, folder, f"quality-{name}-{result['rows'][0]['windows']}-windows")
    chart(result).savefig(path.with_suffix(".png"), dpi=120)
    return path


def tables(result: Result) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and rows for people, of all bits that were measured."""
    where = f"{result['rows'][0]['windows']} windows of {result['text']}"
    found = [(f"{result['model']} at {b} bits, {where}", COLUMNS, table(result, b)) for b in widths(result)]
    mixed = [
        (f"{result['model']} at a mean of {b} bits, {where}", MIXED, mixed_table(result, b)) for b in means(result)
    ]
    return found + mixed


def table(result: Result, bits: int) -> list[list[str]]:
    """Rows for people, of the original and of all variants at `bits`, the same in all layers."""
    rows = [row for row in result["rows"] if row["uniform"] and row["bits"] in (0, bits)]
    baseline = next(row["kl_divergence"] for row in rows if row["variant"] == BASELINE)
    return [_cells(row, row["variant"], baseline if row["bits"] else None) for row in rows]


def mixed_table(result: Result, mean: float) -> list[list[str]]:
    """Rows for people, of `FULL` at the whole bits below `mean` and at bits of each layer's own."""
    below, mixed = (
        next(row for row in result["rows"] if (row["variant"], row["bits"], row["uniform"]) == wanted)
        for wanted in ((FULL, int(mean), True), (FULL, mean, False))
    )
    baseline = below["kl_divergence"]
    return [_cells(below, f"{int(mean)} bits in all layers", baseline), _cells(mixed, f"{mean} on average", baseline)]


def _cells(row: dict[str, Any], name: str, baseline: float | None) -> list[str]:
    return [
        name,
        f"{row['bits_per_weight']:.3f}",
        f"{row['perplexity']:.3f} +- {row['perplexity_error']:.3f}",
        f"{row['kl_divergence']:.6f}",
        f"{row['kl_divergence'] / baseline:.2f}" if baseline else "-",
        f"{row['kl_divergence_99']:.4f}",
        f"{row['top1_agreement']:.2%}",
    ]


def widths(result: Result) -> list[int]:
    """The uniform bits at which there is a baseline, in the order they were measured."""
    return [row["bits"] for row in result["rows"] if row["variant"] == BASELINE]


def means(result: Result) -> list[float]:
    """The same of bits that differ from layer to layer."""
    return [row["bits"] for row in result["rows"] if not row["uniform"]]


def command(result: Result) -> str:
    """The command that measures it again; local files are named without the folders they were in."""
    scored = result["rows"][0]
    words = ["polar", "ablate", result["model"], "--calibration", result["calibration"]]
    words += ["--windows", result["calibration_windows"], "--text", result["text"], "--window", scored["window"]]
    words += ["--limit", scored["windows"], *(word for bits in widths(result) for word in ("--bits", bits))]
    words += [word for mean in means(result) for word in ("--target-bits", mean)]
    named = [row["variant"] for row in result["rows"] if row["bits"] == widths(result)[0]]
    if len(named) < len(VARIANTS):
        words += [word for name in named if name != BASELINE for word in ("--variant", name)]
    words += ["--dtype", result["dtype"], *(["--device", "cpu"] if result["gpu"] == "CPU" else [])]
    return shlex.join(map(str, words))


def document(results: Sequence[Path], out: Path) -> None:
    """Write docs/quality.md from result files."""
    parts = [_INTRODUCTION]
    parts += [_section(_read(path), path, out.parent) for path in results]
    write_whole(out, "\n".join(parts).encode())


def _read(path: Path) -> Result:
    """A result file; those from before there were mixed bits do not say that theirs are uniform, nor hash the texts."""
    result = json.loads(path.read_text(encoding="utf-8"))
    for row in result["rows"]:
        row.setdefault("uniform", True)
    return result


# Model -> what it is.
_MODELS = {
    "docs-qwen3_5-tiny": "the embedded model, the folder `model_patch/demo/model`, under this name",
    "docs-qwen3_5-moe-tiny": "a mixture of 16 experts, 10 M weights, trained on the same texts as the embedded model",
}

# SHA-256 of a text -> where a reader finds it.
_TOKENISED = "`{}` of the tokenised WikiText-2 (`wikitext-2-v1`; on the Hub in `Salesforce/wikitext`, CC BY-SA)"
_ORIGINS = {
    "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0": _TOKENISED.format("wiki.test.tokens"),
    "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8": _TOKENISED.format("wiki.valid.tokens"),
}

_INTRODUCTION = f"""# Quality

Made by `polar ablate` and `bench/quality.py` from its results; do not edit. Every linear layer and the head are
quantised at the same bits, the embedding stays as it is. Perplexity with its standard error over the windows; KL
divergence to the predictions of the original weights, in nats, its mean and what 99 % of the tokens do not exceed; how
often both rank the same token first. The first row, the original by its dtype, shows what keeping those predictions in
16 bits for the comparison costs. "of baseline" is the mean KL over that of
"{BASELINE}" at the same bits. Lines that begin with + are Hadamard +
Lloyd-Max with the converged table. All variants score the same tokens, so that their differences are far surer than the
standard error of one perplexity says.
"""


def _text_to_bring(result: Result, role: str) -> str:
    digest = result.get(f"{role}_sha256")
    if digest is None:
        return f"- `{result[role]}`: a text whose hash was not written down"
    return f"- `{result[role]}`: {_ORIGINS.get(digest, 'a text of its own')}, SHA-256 `{digest}`"


def _section(result: Result, path: Path, base: Path) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    scored = result["rows"][0]
    lines = [
        f"\n## {result['model']}, {scored['windows']} windows\n",
        f"{versions}, {result['gpu']}, {result['dtype']} arithmetic, commit {result['commit']}, {result['date']}.",
        f"Evaluated on {scored['windows']} windows of {scored['window']} tokens of {result['text']}, stride "
        f"{scored['stride']}, {scored['tokens']} tokens scored; calibrated on {result['calibration_windows']} windows "
        f"of 512 tokens of {result['calibration']}:\n",
        f"    {command(result)}\n",
        "What the command wants beside it, of which only the embedded model comes with this package:\n",
        f"- `{result['model']}`: {_MODELS.get(result['model'], 'the checkpoint of that name')}",
        *(_text_to_bring(result, role) for role in ("calibration", "text")),
        "",
        f"![Mean KL divergence over the baseline's]({report.relative_link(path.with_suffix('.png'), base)})",
    ]
    for bits in widths(result):
        lines += [f"\n### {bits} bits\n", *_markdown(COLUMNS, table(result, bits))]
    for mean in means(result):
        lines += [f"\n### {mean} bits on average, each layer's own\n", *_markdown(MIXED, mixed_table(result, mean))]
    return "\n".join(lines) + "\n"


def _markdown(columns: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in (columns, *rows)]
    return [lines[0], "|---" * len(columns) + "|", *lines[1:]]


def chart(result: Result) -> Any:
    """A matplotlib figure: mean KL divergence over the baseline's, a bar for each variant and width."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["variant"] for row in result["rows"] if row["bits"]))
    thickness = 0.8 / len(widths(result))
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for index, bits in enumerate(widths(result)):
        rows = [row for row in result["rows"] if row["bits"] == bits and row["uniform"]]
        found = {row["variant"]: row["kl_divergence"] for row in rows}
        places = [place + index * thickness for place in range(len(names))]
        axes.barh(places, [found[name] / found[BASELINE] for name in names], thickness, label=f"{bits} bits")
    axes.set_yticks([place + 0.4 - thickness / 2 for place in range(len(names))], names)
    axes.invert_yaxis()
    axes.axvline(1, color="grey", linewidth=0.8)
    original = next(row["variant"] for row in result["rows"] if not row["bits"])
    axes.set(xlabel=f"mean KL divergence to {original}, over the baseline's")
    axes.set_title(f"{result['model']}, {result['rows'][0]['windows']} windows of {result['text']}")
    axes.grid(alpha=0.3, axis="x")
    axes.legend()
    return figure


if __name__ == "__main__":  # python -m polar_bench.quality RESULTS DOCUMENT: the document again, without measuring
    document(sorted(Path(sys.argv[1]).glob("quality-*.json")), Path(sys.argv[2]))
