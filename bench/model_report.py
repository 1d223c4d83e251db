"""The parts of docs/benchmarks.md about whole models, from the JSON of `polar bench model` and `polar bench vllm`."""

from typing import Any

from polar_bench import vllm_engine, vllm_layers
from polar_bench.model_chart import charted
from polar_bench.models import COLUMNS, ModelMeasurement, table


def section(result: dict[str, Any], chart: str) -> str:
    """Markdown: a chart, a table a model, and where the time of an accelerated step goes."""
    lines = [
        f"\n## {', '.join(dict.fromkeys(row['model'] for row in result['rows']))}, {result['gpu']}\n",
        _origin(result),
        f"{_weights(result)} Decoding is `generate`, of the plain model and after `accelerate`; "
        "tokens/s are of the whole batch, GB/s those at which the weights are read.",
    ]
    rows = [ModelMeasurement(**row) for row in result["rows"]]
    if charted(result):
        lines.append(f"\n![accelerated decoding]({chart})")
    for model in dict.fromkeys(row.model for row in rows):
        lines += [f"\n### {model}\n", *_markdown(COLUMNS, table([row for row in rows if row.model == model]))]
        works = [work for work in result["profile"] if work["model"] == model]
        if works:
            lines += [
                "\nMicroseconds (and kernels) of an accelerated step, by the kernels' names:\n",
                *_profile(works),
            ]
    return "\n".join(lines) + "\n"


def _weights(result: dict[str, Any]) -> str:
    checkpoint = result.get("checkpoint")
    return f"The weights of {checkpoint}." if checkpoint else "Random weights of the true shape."


def plug_in_section(result: dict[str, Any]) -> str:
    """Markdown: the products of a decode step in vLLM."""
    lines = [
        f"\n## The vLLM plug-in's layers, {result['gpu']}\n",
        _origin(result),
        f"All matrix products of one decode step of {result['model']}, by the methods that vLLM calls, in one CUDA "
        "graph, on random weights of the true shape. vLLM itself did not run, nor attention, norms and sampling: "
        "tokens/s are what the products alone would allow.\n",
        *_markdown(
            vllm_layers.COLUMNS, vllm_layers.table([vllm_layers.StepMeasurement(**row) for row in result["rows"]])
        ),
    ]
    return "\n".join(lines) + "\n"


def engine_section(result: dict[str, Any]) -> str:
    """Markdown: what vLLM's engine decodes."""
    lines = [
        f"\n## vLLM, {result['model']}, {result['gpu']}\n",
        _origin(result),
        "vLLM's engine, greedy, with its own compilation and CUDA graphs, on random weights of the true shape. So many "
        "requests with prompts of 128 tokens write 256 more at a time; tokens/s are of all of them, and of decoding "
        "alone: the time of 16 tokens is taken off that of 272. The error is that of the log-probabilities of tokens, "
        "against transformers over the same checkpoint, relative to how much logits differ.\n",
        *_markdown(
            vllm_engine.COLUMNS, vllm_engine.table([vllm_engine.EngineMeasurement(**row) for row in result["rows"]])
        ),
    ]
    return "\n".join(lines) + "\n"


def _origin(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{versions}, CUDA {result['cuda']}, commit {result['commit']}, {result['date']}."


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
