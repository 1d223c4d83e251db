"""`polar ablate`: what each part of the scheme gives on a model and a text."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from model_patch.checkpoint.fingerprint import file_digest
from model_patch.cli.options import (
    AsJson,
    Device,
    check_results,
    parse_dtype,
    pick_device,
    print_json,
    print_table,
    rare_experts_warning,
    warn,
    writing,
)
from model_patch.demo import CALIBRATION_WINDOWS
from model_patch.evaluate import tokenize_file
from model_patch.load import find_checkpoint, load_model, load_tokenizer
from model_patch.progress import progress_bar
from model_patch.quantize import Target
from model_patch.quantize.calibrated import calibration_batch


def ablate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A plain checkpoint folder or Hub name.")],
    calibration: Annotated[Path, typer.Option(metavar="FILE", help="The text to calibrate on.", show_default=False)],
    text: Annotated[Path, typer.Option(metavar="FILE", help="The text to score.", show_default=False)],
    bits: Annotated[list[int] | None, typer.Option(help="Bits a weight; repeatable; 5, 4 and 3 by default.")] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A row of the table beside the baseline; repeatable, all by default."),
    ] = None,
    target_bits: Annotated[
        list[float] | None,
        typer.Option(help="Mean bits, each layer's own, beside uniform ones; repeatable, none by default."),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 512 tokens to calibrate on.")] = CALIBRATION_WINDOWS,
    window: Annotated[int, typer.Option(min=2, help="Tokens a window that is scored.")] = 512,
    limit: Annotated[int | None, typer.Option(min=1, metavar="WINDOWS", help="Score only the first windows.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the arithmetic: float32, bfloat16 or float16.")] = "float32",
    out: Annotated[Path | None, typer.Option(help="Write results and chart into this folder.")] = None,
    document: Annotated[Path | None, typer.Option(help="Write the results in OUT as this Markdown file.")] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Quantise MODEL by baselines and by the scheme part after part, and compare each with the original.

    The predictions of the original are kept meanwhile, two bytes times the vocabulary a scored token: in memory where
    they take less than half of what is free, else on disk.
    """
    from polar_bench import ablate as runner
    from polar_bench import quality
    from polar_bench.variants import pick_variants

    check_results(out, document, charts=True)
    target, picked, source = pick_device(device), parse_dtype(dtype), find_checkpoint(model)
    variants = pick_variants(variant or [])
    goals = [Target(mean) for mean in target_bits or []]
    wanted = bits or [5, 4, 3]
    plans = runner.plans(source, list(dict.fromkeys([*wanted, *(goal.start for goal in goals)])))
    tokens = tokenize_file(load_tokenizer(source), text)
    batch = calibration_batch(source, calibration, windows)
    original = load_model(source, device=target, dtype=picked)
    with progress_bar("calibrate") as progress:
        calibrated = runner.calibrate_sites(original, batch, plans[wanted[0]].layers.sites(), progress)
    warn([rare_experts_warning(layer, experts) for layer, experts in calibrated.rare_experts.items()])
    with progress_bar("measure") as progress:
        mixed = runner.choose_plans(original, plans, goals, calibrated, batch, progress)
    steps = runner.steps_of(plans, wanted, mixed, variants)
    with tempfile.TemporaryDirectory() as scratch, progress_bar("ablate") as progress:
        reference = runner.keep_predictions(original, tokens, window, limit, Path(scratch))
        measurements = runner.run(
            original, calibrated, tokens, reference, steps, window=window, limit=limit, progress=progress
        )
    result = quality.assemble(
        measurements,
        target,
        model=source.resolve().name if Path(model).is_dir() else model,
        text=text.name,
        text_sha256=file_digest(text),
        calibration=calibration.name,
        calibration_sha256=file_digest(calibration),
        calibration_windows=len(batch),
        dtype=dtype,
    )
    if as_json:
        print_json(result)
    else:
        for title, columns, rows in quality.tables(result):
            print_table(title, columns, rows)
    if out is not None:
        with writing(out):
            quality.write(result, out)
            if document is not None:
                quality.document(sorted(out.glob("quality-*.json")), document)
