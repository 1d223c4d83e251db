"""`polar bench`: the kernels' microbenchmarks on this GPU."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from model_patch.cli.options import AsJson, print_json, print_table
from model_patch.errors import ConfigError
from model_patch.progress import progress_bar


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Three shapes and three sizes, in a minute.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write JSON, CSV and charts into this folder.")] = None,
    document: Annotated[Path | None, typer.Option(help="Write the results in OUT as this Markdown file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time the kernels beside cuBLAS bf16 and tinygemm on the layers of Qwen3.5-9B: needs a GPU."""
    if not torch.cuda.is_available():
        raise ConfigError("polar bench needs a CUDA GPU, and torch finds none")
    from polar_bench import kernels, report

    shapes, rows = (kernels.QUICK_SHAPES, kernels.QUICK_ROWS) if quick else (kernels.SHAPES, kernels.ROWS)
    with progress_bar("bench") as progress:
        measurements, rates = kernels.run(shapes, rows, progress)
    result = report.assemble(measurements, rates)
    if out is not None:
        report.write(result, out)
        if document is not None:
            report.document(sorted(out.glob("kernels-*.json")), document)
    if as_json:
        print_json(result)
    else:
        print_table(f"{result['gpu']}, {rates[0] / 1e12:.2f} TB/s read", report.COLUMNS, report.table(result))
