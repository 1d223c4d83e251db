"""`polar bench`: the kernels' microbenchmarks on this GPU; `polar bench model`: whole models."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from model_patch.cli.options import (
    AsJson,
    Device,
    check_results,
    parse_dtype,
    pick_device,
    print_json,
    print_table,
    warn,
    writing,
)
from model_patch.errors import ConfigError
from model_patch.progress import progress_bar

bench = typer.Typer(name="bench", invoke_without_command=True, no_args_is_help=False)
OutFolder = Annotated[Path | None, typer.Option(help="Write the results into this folder.")]
Document = Annotated[Path | None, typer.Option(help="Write the results in OUT as this Markdown file.")]
_MODEL = "qwen3.5-9b"  # where no other is named
Quick = Annotated[bool, typer.Option("--quick", help="Fewer sizes, in a minute or two.")]


@bench.callback()
def kernels(
    context: typer.Context,
    quick: Quick = False,
    peers: Annotated[
        bool | None,
        typer.Option(
            "--peers/--no-peers",
            help="Also time GemLite and Humming where installed, which takes minutes; by default unless --quick.",
        ),
    ] = None,
    out: OutFolder = None,
    document: Document = None,
    as_json: AsJson = False,
) -> None:
    """Time the kernels beside bf16 and other 4- and 5-bit kernels on layers of Qwen3.5-9B and experts of 35B-A3B: needs
    a GPU."""
    if context.invoked_subcommand is not None:
        return
    check_results(out, document, charts=True)
    if not torch.cuda.is_available():
        raise ConfigError("polar bench needs a CUDA GPU, and torch finds none")
    from polar_bench import experts, kernels, report
    from polar_bench.peers import installed

    others, missing = installed() if (not quick if peers is None else peers) else ([], [])
    if missing:
        warn([f"not compared with {' and '.join(missing)}: not installed"])
    shapes, rows = (kernels.QUICK_SHAPES, kernels.QUICK_ROWS) if quick else (kernels.SHAPES, kernels.ROWS)
    tokens = experts.QUICK_TOKENS if quick else experts.TOKENS
    with progress_bar("bench") as progress:
        measurements, rates = kernels.run(shapes, rows, tokens, progress, others)
    result = report.assemble(measurements, rates)
    if as_json:
        print_json(result)
    else:
        print_table(f"{result['gpu']}, {rates[0] / 1e12:.2f} TB/s read", report.COLUMNS, report.table(result))
    if out is not None:
        with writing(out):
            report.write(result, out)
            if document is not None:
                report.document(out, document)


@bench.command()
def model(
    checkpoint: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A checkpoint folder, or a name on the Hub, measured with its weights."),
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option(
            help="qwen3.5-4b, qwen3.5-9b (the default), qwen3.5-27b, qwen3.5-35b-a3b, or a folder or Hub name whose "
            "config.json gives the shape; may be given again."
        ),
    ] = None,
    random: Annotated[
        bool, typer.Option("--random", help="Random weights of MODEL's shape; always of those that --config names.")
    ] = False,
    bits: Annotated[int, typer.Option(help="Of the quantised model.")] = 5,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    quick: Quick = False,
    load: Annotated[
        bool, typer.Option("--load", help="Also save the quantised model to a temporary folder and time its loading.")
    ] = False,
    plain: Annotated[
        bool, typer.Option("--plain/--no-plain", help="Also measure the model that is not quantised.")
    ] = True,
    profile: Annotated[bool, typer.Option("--profile", help="Also say where a step's time goes: needs a GPU.")] = False,
    out: OutFolder = None,
    document: Document = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Time prompts and decoding of models, quantised and plain, accelerated and not."""
    from polar_bench import models, report
    from polar_bench.random_model import model_config

    check_results(out, document, charts=True)
    if checkpoint is not None and config:
        raise ConfigError("give either MODEL or --config: one is measured with its weights, the other with random ones")
    target, as_dtype = pick_device(device), parse_dtype(dtype)
    if profile and target.type != "cuda":
        raise ConfigError("--profile needs a CUDA GPU: a step on a CPU is no graph")
    names = config or [checkpoint or _MODEL]
    own_weights = checkpoint is not None and not random
    sizes: dict[str, Any] = {}
    if quick:
        sizes = {"prefill": (512, 2048), "contexts": (128,), "batches": (1, 16), "runs": 2}
    if own_weights:
        makes_of = {names[0]: models.checkpoint_providers(names[0], bits, target, as_dtype, plain=plain)}
    else:
        makes_of = {name: models.providers(model_config(name), bits, target, as_dtype, plain=plain) for name in names}
    result = report.describe() | {"checkpoint": checkpoint if own_weights else None, "rows": [], "profile": []}
    for name, makes in makes_of.items():
        with progress_bar(f"bench model {name}") as progress:
            measured, works = models.run(name, makes, **sizes, load=load, profile=profile, progress=progress)
        result["rows"] += [asdict(measurement) for measurement in measured]
        result["profile"] += [{"model": name} | asdict(work) for work in works]
        if not as_json:
            print_table(f"{name} on {result['gpu']}", models.COLUMNS, models.table(measured))
    if as_json:
        print_json(result)
    if out is not None:
        with writing(out):
            others = "".join(f"-{Path(name).name}" for name in names if name != _MODEL)
            report.write_models(result, out, f"model-{report.gpu_name(result)}{others}")
            if document is not None:
                report.document(out, document)


@bench.command()
def vllm(
    config: Annotated[
        str,
        typer.Option(
            help="qwen3.5-4b, qwen3.5-9b, qwen3.5-27b, or a folder or Hub name of a dense Qwen3.5; with --engine also "
            "qwen3-8b, or a dense Qwen3."
        ),
    ] = _MODEL,
    bits: Annotated[int, typer.Option(help="Of the quantised layers.")] = 5,
    engine: Annotated[bool, typer.Option("--engine", help="Run vLLM itself, which must be installed.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="With --engine: few requests, without CUDA graphs, to see that it runs.")
    ] = False,
    out: OutFolder = None,
    document: Document = None,
    as_json: AsJson = False,
) -> None:
    """Time the matrix products of a decode step by the vLLM plug-in's layers beside bf16: needs a GPU, and no vLLM.

    With --engine, vLLM itself: tokens a second that its engine decodes.
    """
    from polar_bench import report, vllm_layers
    from polar_bench.random_model import model_config

    check_results(out, document, charts=False)
    if quick and not engine:
        raise ConfigError("--quick goes with --engine: without it, all is done in less than a minute")
    if engine:
        _engine(config, bits, quick, out, document, as_json)
        return
    layers = vllm_layers.layers_of(model_config(config))
    if not torch.cuda.is_available():
        raise ConfigError("polar bench vllm needs a CUDA GPU, and torch finds none")
    with progress_bar(f"bench vllm {config}") as progress:
        measured = vllm_layers.run(layers, bits=bits, progress=progress)
    result = report.describe() | {"model": config, "rows": [asdict(measurement) for measurement in measured]}
    if as_json:
        print_json(result)
    else:
        print_table(f"{config} on {result['gpu']}", vllm_layers.COLUMNS, vllm_layers.table(measured))
    if out is not None:
        with writing(out):
            report.write_json(result, out, f"vllm-{report.gpu_name(result)}")
            if document is not None:
                report.document(out, document)


def _engine(config: str, bits: int, quick: bool, out: Path | None, document: Path | None, as_json: bool) -> None:
    from polar_bench import report, vllm_engine
    from polar_bench.random_model import model_config

    shape = model_config(config)
    vllm_engine.check_vllm()
    with progress_bar(f"bench vllm --engine {config}") as progress:
        measured = vllm_engine.run(shape, vllm_engine.QUICK if quick else None, bits=bits, progress=progress)
    result = report.describe(["vllm"]) | {"model": config, "rows": [asdict(measurement) for measurement in measured]}
    if as_json:
        print_json(result)
    else:
        print_table(f"vLLM, {config} on {result['gpu']}", vllm_engine.COLUMNS, vllm_engine.table(measured))
    if out is not None:
        with writing(out):
            other = "" if config == _MODEL else f"-{Path(config).name}"
            report.write_json(result, out, f"vllm-engine-{report.gpu_name(result)}{other}")
            if document is not None:
                report.document(out, document)
