"""`polar ppl`: perplexity of a text, and the distance to another model."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import PreTrainedModel

from model_patch.cli.options import AsJson, Device, DType, Exact, Folder, pick_device, pick_dtype, print_json
from model_patch.errors import ConfigError
from model_patch.evaluate import Convention, Evaluation, check_windows, evaluate, tokenize_file
from model_patch.load import find_checkpoint, load_model, load_tokenizer
from model_patch.logits_cache import LogitsCache, open_cache
from model_patch.patch import set_activation
from model_patch.progress import progress_bar
from polar_kernels.module import Activation


def ppl(
    folder: Folder,
    text: Annotated[Path, typer.Option(metavar="FILE", help="The text to score.", show_default=False)],
    window: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 512,
    stride: Annotated[int | None, typer.Option(min=1, help="Tokens between windows; --window by default.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="WINDOWS", help="Score only the first windows.")] = None,
    convention: Annotated[
        Convention, typer.Option(help="Which tokens of a window are scored: new ones, or those of its second half.")
    ] = Convention.hugging_face,
    against: Annotated[str | None, typer.Option(metavar="OTHER", help="A model to compare with.")] = None,
    logits_cache: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep OTHER's predictions here, and read them from there.")
    ] = None,
    device: Device = None,
    dtype: DType = None,
    exact: Exact = False,
    as_json: AsJson = False,
) -> None:
    """Perplexity of the checkpoint in DIR, quantised or plain, on a text.

    With --against also the mean KL divergence of OTHER's predictions to it, and how often both rank the same token
    first. --logits-cache keeps OTHER's predictions, two bytes times its vocabulary a token, so that many models can be
    compared with one run of it.
    """
    if logits_cache is not None and against is None:
        raise ConfigError("--logits-cache keeps the predictions of another model: name it with --against")
    check_windows(convention, window, stride)
    target = pick_device(device)
    picked = pick_dtype(dtype, target)
    tokens = tokenize_file(load_tokenizer(folder), text)
    activation: Activation = "exact" if exact else "int8"
    load = partial(_load, device=target, dtype=picked, activation=activation)
    model = load(folder)
    reference: PreTrainedModel | LogitsCache | None = None
    if against is not None and logits_cache is None:
        reference = load(against)
    elif against is not None and logits_cache is not None:
        with progress_bar("fingerprint") as progress:
            reference = open_cache(
                logits_cache,
                find_checkpoint(against),
                tokens,
                partial(load, against),
                window=window,
                stride=stride,
                convention=convention,
                dtype=picked,
                device=target,
                activation=activation,
                progress=progress,
            )
    with progress_bar("score") as progress:
        result = evaluate(
            model,
            tokens,
            window=window,
            stride=stride,
            limit=limit,
            convention=convention,
            reference=reference,
            progress=progress,
        )
    if as_json:
        print_json({"model": folder, "text": str(text), "against": against, **asdict(result)})
        return
    typer.echo(describe(result, folder, str(text), against))


def _load(source: str, *, device: torch.device, dtype: torch.dtype | str, activation: Activation) -> PreTrainedModel:
    model = load_model(source, device=device, dtype=dtype)
    set_activation(model, activation)
    return model


_SCORED = {
    Convention.hugging_face: "each scoring what no earlier one has (Hugging Face)",
    Convention.llama_cpp: "each scoring its second half (llama.cpp)",
}


def describe(result: Evaluation, model: str, text: str, against: str | None) -> str:
    """The result in lines for people."""
    scored = _SCORED[Convention(result.convention)]
    lines = [
        f"model       {model}",
        f"text        {text}",
        f"windows     {result.windows} of {result.window} tokens, stride {result.stride}, {scored}",
        f"tokens      {result.tokens} scored",
        f"perplexity  {result.perplexity:.4f} +- {result.perplexity_error:.4f}",
    ]
    if against is not None:
        lines += [
            f"against     {against}",
            f"mean KL     {result.kl_divergence:.6f} nats, 99 % below {result.kl_divergence_99:.4f}",
            f"same top-1  {result.top1_agreement:.2%}",
        ]
    return "\n".join(lines)
