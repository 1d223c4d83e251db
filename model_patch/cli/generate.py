"""`polar generate`: text from a checkpoint, as it comes."""

import time
from typing import Annotated, Any

import torch
import typer
from transformers import TextStreamer

from model_patch.cli.decoding import load_for_decoding
from model_patch.cli.options import (
    Accelerated,
    AsJson,
    Device,
    DType,
    Exact,
    Folder,
    pick_device,
    pick_dtype,
    print_json,
)
from model_patch.load import load_tokenizer
from polar_kernels.errors import ArgumentError


def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on from.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens at the most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    device: Device = None,
    dtype: DType = None,
    exact: Exact = False,
    accelerated: Accelerated = None,
    as_json: AsJson = False,
) -> None:
    """Continue PROMPT with the model in DIR; a line on stderr tells the speed."""
    target = pick_device(device)
    tokenizer = load_tokenizer(folder)
    inputs = tokenizer(prompt, return_tensors="pt").to(target)
    if not inputs.input_ids.numel():
        raise ArgumentError("the prompt has no tokens: give it at least a word")
    model = load_for_decoding(
        folder,
        target,
        pick_dtype(dtype, target),
        exact=exact,
        accelerated=accelerated,
        max_length=inputs.input_ids.shape[1] + max_new_tokens,
        compile=False,  # one prompt does not give back what torch.compile takes
    )
    streamer = None if as_json else TextStreamer(tokenizer, skip_special_tokens=True)
    start = time.perf_counter()
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling(temperature))[0]
    seconds = time.perf_counter() - start
    new = len(ids) - inputs.input_ids.shape[1]
    if as_json:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        print_json({"text": text, "new_tokens": new, "seconds": seconds})
    typer.echo(speed(new, seconds), err=True)


def sampling(temperature: float) -> dict[str, Any]:
    """Options of `generate` for --temperature."""
    return {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}


def speed(new_tokens: int, seconds: float) -> str:
    return f"{new_tokens} tokens in {seconds:.2f} s, {new_tokens / seconds:.1f} tok/s"
