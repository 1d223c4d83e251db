"""`polar demo`: the whole path on the small model that comes with the package."""

import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, PreTrainedModel

from model_patch.checkpoint.writer import check_output
from model_patch.cli.options import AsJson, Device, megabytes, pick_device, pick_dtype, print_json, print_table
from model_patch.config import PolarQuantConfig
from model_patch.demo import CALIBRATION_TEXT, CALIBRATION_WINDOWS, EVALUATION_TEXT, EVALUATION_WINDOWS, MODEL
from model_patch.evaluate import Evaluation, evaluate, tokenize_file
from model_patch.load import load_model, load_tokenizer
from model_patch.progress import progress_bar
from model_patch.quantize import calibrate_plan, plan_checkpoint, quantize_checkpoint

_PROMPT = "The kernel is"


def demo(
    out: Annotated[Path | None, typer.Option(help="Keep the quantised checkpoint in this new folder.")] = None,
    bits: Annotated[int, typer.Option(help="Bits a weight, 2 to 8.")] = 5,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Quantise a small Qwen3.5 that comes with the package, load it with transformers, compare and generate."""
    target, start = pick_device(device), time.perf_counter()
    if out is not None:
        check_output(out, overwrite=False)
    with tempfile.TemporaryDirectory() as scratch:
        folder = out or Path(scratch) / "quantized"
        sizes = _quantize(folder, bits, target)
        dtype = pick_dtype(None, target)
        quantized = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": target})
        original = load_model(MODEL, device=target, dtype=dtype)
        results = _compare(original, quantized)
        text = _generate(quantized)
    seconds = time.perf_counter() - start
    if as_json:
        scores = {name: asdict(result) for name, result in results.items()}
        print_json({"device": str(target), "bytes": sizes, "scores": scores, "text": text, "seconds": seconds})
        return
    _print(sizes, results, text, f"{seconds:.0f} s on {_device_name(target)}", folder if out else None)


def _quantize(folder: Path, bits: int, device: torch.device) -> dict[str, int]:
    plan = plan_checkpoint(MODEL, PolarQuantConfig(bits), awq=True)
    with progress_bar("calibrate") as progress:
        found = calibrate_plan(plan, CALIBRATION_TEXT, device, CALIBRATION_WINDOWS, progress=progress)
    with progress_bar("quantize") as progress:
        quantize_checkpoint(plan, folder, awq_scales=found.awq_scales, device=device, progress=progress)
    return {"bf16": plan.source_bytes, f"{bits} bits": plan.output_bytes}


def _compare(original: PreTrainedModel, quantized: PreTrainedModel) -> dict[str, Evaluation]:
    tokens = tokenize_file(load_tokenizer(MODEL), EVALUATION_TEXT)
    bits = f"{quantized.config.quantization_config.bits} bits"
    with progress_bar("score") as progress:
        plain = evaluate(original, tokens, limit=EVALUATION_WINDOWS, progress=progress)
        packed = evaluate(quantized, tokens, limit=EVALUATION_WINDOWS, reference=original, progress=progress)
    return {"bf16": plain, bits: packed}


@torch.inference_mode()
def _generate(model: PreTrainedModel) -> str:
    tokenizer = load_tokenizer(MODEL)
    inputs = tokenizer(_PROMPT, return_tensors="pt").to(model.device)
    ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0]
    return tokenizer.decode(ids, skip_special_tokens=True)


def _print(sizes: dict[str, int], results: dict[str, Evaluation], text: str, took: str, kept: Path | None) -> None:
    rows: list[list[str]] = []
    for name, result in results.items():
        distance: list[Any] = ["-", "-"]
        if result.kl_divergence is not None:
            distance = [f"{result.kl_divergence:.4f}", f"{result.top1_agreement:.1%}"]
        perplexity = f"{result.perplexity:.2f} +- {result.perplexity_error:.2f}"
        rows.append([name, megabytes(sizes[name]), perplexity, *distance])
    title = f"docs-qwen3_5-tiny, {EVALUATION_WINDOWS} windows of WikiText-2 test"
    print_table(title, ["weights", "size", "perplexity", "KL to bf16", "same top-1"], rows)
    typer.echo(f"{text.strip()}\n\n{took}" + (f"; the checkpoint is in {kept}" if kept else ""))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
