"""`polar chat`: a conversation in the terminal."""

import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from model_patch.cli.decoding import load_for_decoding
from model_patch.cli.generate import sampling, speed
from model_patch.cli.options import Accelerated, Device, DType, Exact, Folder, pick_device, pick_dtype
from model_patch.errors import CheckpointError
from model_patch.load import load_tokenizer
from polar_kernels.errors import ArgumentError

Messages = list[dict[str, str]]


def chat(
    folder: Folder,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens an answer has at the most.")] = 512,
    max_length: Annotated[int, typer.Option(min=2, help="How many tokens the conversation has at the most.")] = 4096,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.7,
    device: Device = None,
    dtype: DType = None,
    exact: Exact = False,
    accelerated: Accelerated = None,
) -> None:
    """Talk with the model in DIR, a line at a time; Ctrl-C stops an answer, Ctrl-D ends. Speed goes to stderr."""
    target = pick_device(device)
    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template:
        raise CheckpointError(
            folder, "its tokenizer has no chat template (chat_template.jinja): `polar generate` continues plain text"
        )
    as_dtype = pick_dtype(dtype, target)
    model = load_for_decoding(folder, target, as_dtype, exact=exact, accelerated=accelerated, max_length=max_length)
    messages: Messages = [{"role": "system", "content": system}] if system else []
    options = {"max_new_tokens": max_new_tokens, **sampling(temperature)}
    for line in _lines():
        _turn(model, tokenizer, messages, line, max_length, options)


def _turn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    line: str,
    max_length: int,
    options: dict[str, Any],
) -> None:
    """Add `line` and the answer to `messages`; neither when the answer is stopped."""
    asked = [*messages, {"role": "user", "content": line}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    room = max_length - inputs["input_ids"].shape[1]
    if room < 1:
        raise ArgumentError(f"the conversation has {max_length - room} tokens: begin anew, or with more --max-length")
    options = options | {"max_new_tokens": min(options["max_new_tokens"], room)}
    try:
        answer = _answer(model, tokenizer, inputs.to(model.device), options)
    except KeyboardInterrupt:
        typer.echo("\n(stopped)", err=True)
        return
    messages[:] = [*asked, {"role": "assistant", "content": answer}]


def _answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: Any, options: dict[str, Any]) -> str:
    """The model's answer, printed as it comes."""
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    start = time.perf_counter()
    with torch.inference_mode():
        ids = model.generate(**inputs, streamer=streamer, **options)[0]
    new = ids[inputs["input_ids"].shape[1] :]
    typer.echo(speed(len(new), time.perf_counter() - start), err=True)
    return tokenizer.decode(new, skip_special_tokens=True)


def _lines() -> Iterator[str]:
    """What the user types; empty lines are passed over."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            yield line
