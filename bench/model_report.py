"""The part of docs/benchmarks.md about whole models, from the JSON of `polar bench model`."""

from typing import Any

from polar_bench.models import COLUMNS, ModelMeasurement, table


def section(result: dict[str, Any]) -> str:
    """Markdown: a table a model, and where the time of an accelerated step goes."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"\n## Whole models, {result['gpu']}\n",
        f"{versions}, CUDA {result['cuda']}, commit {result['commit']}, {result['date']}.",
        "Random weights of the true shape. Decoding is `generate`, of the plain model and after `accelerate`; "
        "tokens/s are of the whole batch, GB/s those at which the weights are read.",
    ]
    rows = [ModelMeasurement(**row) for row in result["rows"]]
    for model in dict.fromkeys(row.model for row in rows):
        lines += [f"\n### {model}\n", *_markdown(COLUMNS, table([row for row in rows if row.model == model]))]
        works = [work for work in result["profile"] if work["model"] == model]
        if works:
            lines += [
                "\nMicroseconds (and kernels) of an accelerated step, by the kernels' names:\n",
                *_profile(works),
            ]
    return "\n".join(lines) + "\n"


def _profile(works: list[dict[str, Any]]) -> list[str]:
    """Kinds as rows, providers and batches as columns."""
    columns = list(dict.fromkeys((work["provider"], work["batch"]) for work in works))
    cells = {
        (work["kind"], work["provider"], work["batch"]): f"{work['microseconds']:.0f} ({work['kernels']:.0f})"
        for work in works
    }
    kinds = dict.fromkeys(work["kind"] for work in works)
    header = ["", *(f"{provider}, batch {batch}" for provider, batch in columns)]
    return _markdown(header, [[kind, *(cells.get((kind, *column), "") for column in columns)] for kind in kinds])


def _markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(header) + " |", "|---" * len(header) + "|", *("| " + " | ".join(r) + " |" for r in rows)]
