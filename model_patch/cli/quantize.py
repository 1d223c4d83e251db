"""`polar quantize`: a plain checkpoint into a quantised one."""

from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from model_patch.checkpoint.package import DEFAULT_SHARD_SIZE
from model_patch.checkpoint.writer import check_output, shard_bytes
from model_patch.cli.options import (
    AsJson,
    Device,
    Out,
    Overwrite,
    ShardSize,
    megabytes,
    pick_device,
    print_json,
    print_table,
    rare_experts_warning,
    warn,
)
from model_patch.cli.quantize_options import Method, check_options, parse_bits_for, parse_target, pick_streamed
from model_patch.config import PolarQuantConfig
from model_patch.demo import CALIBRATION_TEXT, CALIBRATION_WINDOWS
from model_patch.load import find_checkpoint, find_headers
from model_patch.memory import peak_memory
from model_patch.progress import progress_bar
from model_patch.quantize import (
    Calibrated,
    QuantizePlan,
    Target,
    calibrate_plan,
    measure_parts,
    plan_checkpoint,
    plan_for_target,
    quantize_checkpoint,
    write_absmax,
)
from model_patch.quantize.resume import make_record, open_work

_BITS = 5  # where nothing else is asked for


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder, or a name on the Hub.")],
    out: Out,
    bits: Annotated[int | None, typer.Option(help="Bits a weight, 2 to 8; 5 by default.")] = None,
    target_bits: Annotated[
        float | None,
        typer.Option(help="Mean bits a weight, from 3 to 8; each layer's own are chosen by what they cost."),
    ] = None,
    target_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="The same, for a size of all tensors, such as 5GB.")
    ] = None,
    bits_for: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN=BITS", help="Other bits for layers; repeatable, the last wins.")
    ] = None,
    awq: Annotated[bool | None, typer.Option("--awq/--no-awq", help="AWQ scales; the default but for absmax.")] = None,
    feedback: Annotated[
        bool, typer.Option("--feedback/--no-feedback", help="Choose codes for the error of the layers' outputs.")
    ] = False,
    calibration: Annotated[Path | None, typer.Option(help="Text file; an excerpt of WikiText-2 by default.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 512 tokens to calibrate on.")] = CALIBRATION_WINDOWS,
    method: Annotated[Method, typer.Option(help="absmax writes the rounded baseline, in plain bf16.")] = Method.polar,
    embeddings: Annotated[bool, typer.Option(help="Quantise the embedding.")] = True,
    lm_head: Annotated[bool, typer.Option(help="Quantise the output head.")] = True,
    exclude: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="Layers to leave; repeatable.")] = None,
    max_shard_size: ShardSize = DEFAULT_SHARD_SIZE,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the sizes; without a target from the headers alone.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what is done when interrupted, and go on from there.")
    ] = False,
    layer_by_layer: Annotated[
        bool | None,
        typer.Option(
            "--layer-by-layer/--whole",
            help="Calibrate with one layer in memory at a time; the default where the model does not fit.",
        ),
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Quantise MODEL into the folder OUT, one tensor and one output shard in memory at a time.

    Calibration (--awq, --feedback) runs the model; --feedback also runs it backwards, and gains most with --no-awq. A
    target also runs the model once for every input that layers share, to measure what quantising them costs; layers
    that --bits-for names keep theirs. Patterns are layer names with the shell's wildcards.
    """
    check_options(method, awq, feedback, resume, dry_run)
    awq = method is Method.polar if awq is None else awq
    target = parse_target(target_bits, target_size, bits, method)
    left = [*(exclude or []), *([] if embeddings else ["embed_tokens"]), *([] if lm_head else ["lm_head"])]
    fixed = parse_bits_for(bits_for or [])
    start = (_BITS if bits is None else bits) if target is None else target.start
    config = PolarQuantConfig(start, fixed, left)
    picked = pick_device(device)
    if dry_run and target is None:
        folder, checkpoint = find_headers(model)
        _report(plan_checkpoint(folder, config, awq, checkpoint), None, as_json, method, peak_memory(picked))
        return
    if not dry_run:
        check_output(out, overwrite)
    text = calibration or CALIBRATION_TEXT
    plan = plan_checkpoint(find_checkpoint(model), config, awq)
    with ExitStack() as stack:
        work = None
        if resume:
            read = text if awq or feedback or target is not None else None
            options = {"windows": windows, "feedback": feedback, "target": target and asdict(target), "fixed": fixed}
            options |= {"config": plan.config.to_dict(), "max_shard_size": shard_bytes(max_shard_size)}
            with progress_bar("fingerprint") as progress:
                record = make_record(plan.source.where, read, picked, options, progress)
            work = stack.enter_context(open_work(out, overwrite, record))
        saved = None if work is None else work.load(plan.source.where)
        streamed = pick_streamed(layer_by_layer, plan.source.where, picked, target)
        plan, found = saved or _calibrate(plan, fixed, target, text, picked, windows, feedback, streamed)
        if dry_run:
            _report(plan, None, as_json, method, peak_memory(picked))
            return
        if work is not None and saved is None:
            work.save(plan, found)
        kept = None if work is None else work.checkpoint
        quantize_all = partial(quantize_checkpoint, awq_scales=found.awq_scales, moments=found.moments, kept=kept)
        write = write_absmax if method is Method.absmax else quantize_all
        with progress_bar("quantize") as progress:
            warnings = write(
                plan, out, device=picked, max_shard_size=max_shard_size, overwrite=overwrite, progress=progress
            )
        if work is not None:
            work.delete()
    warn(warnings)
    _report(plan, out, as_json, method, peak_memory(picked))


def _calibrate(
    plan: QuantizePlan,
    fixed: dict[str, int],
    target: Target | None,
    text: Path,
    device: torch.device,
    windows: int,
    feedback: bool,
    streamed: bool,
) -> tuple[QuantizePlan, Calibrated]:
    """What the text says: the plan that meets the target, and scales and moments for its layers."""
    found = Calibrated()
    if plan.config.awq or feedback:
        with progress_bar("calibrate") as progress:
            found = calibrate_plan(plan, text, device, windows, feedback=feedback, streamed=streamed, progress=progress)
        warn([rare_experts_warning(layer, experts) for layer, experts in found.rare_experts.items()])
    if target is None:
        return plan, found
    with progress_bar("measure") as progress:
        parts = measure_parts(plan, fixed, found, text, device, progress=progress)
    return plan_for_target(plan, fixed, target, parts), found


def _report(plan: QuantizePlan, out: Path | None, as_json: bool, method: Method, peak: dict[str, int | None]) -> None:
    typer.echo("peak memory: " + ", ".join(f"{megabytes(n)} ({place})" for place, n in peak.items() if n), err=True)
    sizes = {name: plan.layer_bytes(name) for name in plan.layers.bits}
    if as_json:
        layers = {n: {"bits": plan.layers.bits[n], "bytes_before": b, "bytes_after": a} for n, (b, a) in sizes.items()}
        print_json(
            {
                "method": method.value,
                "out": None if out is None else str(out),
                "layers": layers,
                "kept": plan.layers.kept,
                "mean_bits": plan.mean_bits,
                "peak_bytes": peak,
                "bytes_before": plan.source_bytes,
                "bytes_after": plan.output_bytes if method is Method.polar else plan.source_bytes,
            }
        )
        return
    if out is None:
        rows = [[n, str(plan.layers.bits[n]), megabytes(b), megabytes(a)] for n, (b, a) in sizes.items()]
        print_table("Layers to quantise", ["layer", "bits", "before", "after"], rows)
    total = f"{megabytes(plan.source_bytes)} -> {megabytes(plan.output_bytes)}"
    if method is Method.absmax:
        total = f"rounded by absmax to {plan.config.bits} bits, stored unpacked: {megabytes(plan.source_bytes)}"
    where = "nothing written" if out is None else f"written to {out}"
    typer.echo(f"{len(sizes)} layers of {plan.mean_bits:.2f} bits, {len(plan.layers.kept)} kept; {total}; {where}")
