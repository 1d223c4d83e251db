"""accelerate(): what does not fit takes the plain path and says so; switching on and off; wrong arguments."""

import copy
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from transformers import DynamicCache, Qwen2Config
from transformers.models.qwen2 import Qwen2ForCausalLM

from model_patch import PolarError, UnsupportedModelError, accelerate, decelerate, patch_model
from polar_kernels import ArgumentError

PROMPT = torch.arange(1, 27).view(2, 13)
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
REFUSED = {
    "too long": (PROMPT[:1], {"max_new_tokens": 20, "min_new_tokens": 20}, "need 32 places, more than accelerate"),
    "too many": (PROMPT.repeat(2, 1), {}, r"a batch of 4 is more than accelerate\(batch_size=3\)"),
    "too many returned": (PROMPT, {"num_return_sequences": 2, "do_sample": True}, "a batch of 4"),
    "beams": (PROMPT, {"num_beams": 2}, "beam search"),
    "assisted": (PROMPT[:1], {"prompt_lookup_num_tokens": 2}, "assisted decoding"),
    "no cache": (PROMPT, {"use_cache": False}, r"cache is of another kind \(NoneType\)"),
    "static cache": (PROMPT, {"cache_implementation": "static"}, r"another kind \(StaticCache\)"),
    "hidden states": (
        PROMPT,
        {"return_dict_in_generate": True, "output_hidden_states": True},
        "attentions or hidden states",
    ),
}


@pytest.fixture(scope="module")
def model(zoo: Any) -> Any:
    model = zoo.model("qwen3")
    patch_model(model)
    accelerate(model, compile=False, max_length=24, batch_size=3)
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_takes_the_plain_path(zoo: Any, model: Any, case: str) -> None:
    ids, options, reason = REFUSED[case]
    arguments = {"input_ids": ids.to(zoo.device)} | GREEDY | options
    torch.manual_seed(2)
    with pytest.warns(UserWarning, match=reason) as caught:
        found = model.generate(**arguments)
    assert len([w for w in caught if "without the captured steps" in str(w.message)]) == 1
    plain = zoo.model("qwen3")
    patch_model(plain)
    torch.manual_seed(2)
    expected = plain.generate(**arguments)
    if isinstance(expected, dict):
        found, expected = found.sequences, expected.sequences
    assert torch.equal(found, expected)


def test_training_mode_takes_the_plain_path(zoo: Any, model: Any) -> None:
    expected = model.generate(PROMPT.to(zoo.device), **GREEDY)
    model.train()
    try:
        with pytest.warns(UserWarning, match="training mode"):
            found = model.generate(PROMPT.to(zoo.device), **GREEDY)
    finally:
        model.eval()
    assert torch.equal(found, expected)  # these models have no dropout


def test_a_call_during_another(zoo: Any, model: Any) -> None:
    arguments = {"inputs": PROMPT.to(zoo.device)} | GREEDY
    expected = model.generate(**arguments)
    inside: list[torch.Tensor] = []

    class Asks:
        def put(self, value: torch.Tensor) -> None:
            if value.dim() == 1 and not inside:  # not the prompt
                thread = threading.Thread(target=lambda: inside.append(model.generate(**arguments)))
                thread.start()
                thread.join()

        def end(self) -> None:
            pass

    one = arguments | {"inputs": arguments["inputs"][:1]}
    with pytest.warns(UserWarning, match="another call is decoding"):
        ids = model.generate(**one, streamer=Asks())
    assert torch.equal(inside[0], expected)
    assert torch.equal(ids, expected[:1])


@pytest.mark.filterwarnings("error:.*without the captured steps:UserWarning")
def test_positions_that_do_not_cover_the_cache(zoo: Any, model: Any) -> None:
    cache, ids = DynamicCache(config=model.config), PROMPT[:1].to(zoo.device)
    model.generate(ids, past_key_values=cache, **GREEDY)
    longer = torch.cat([ids, ids], 1)
    positions = torch.arange(20, 26, device=zoo.device)[None]
    options = GREEDY | {"position_ids": positions, "past_key_values": cache}
    with pytest.raises(ArgumentError, match="must cover what the cache holds"):
        model.generate(longer, **options)


def test_twice_and_undone(zoo: Any, tmp_path: Path) -> None:
    model = zoo.model("qwen3_5_text")
    own, names = type(model), set(vars(model))
    accelerate(model, compile=False, max_length=16)
    accelerate(model, compile=False, max_length=32, batch_size=2)
    assert isinstance(model, own)
    assert type(model).__mro__.count(own) == 1
    assert (model._decoder.max_length, model._decoder.batch_size) == (32, 2)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen3_5ForCausalLM"]
    with pytest.raises(PolarError, match="call decelerate"):
        copy.deepcopy(model)
    decelerate(model)
    assert type(model) is own
    assert set(vars(model)) == names
    decelerate(model)
    assert copy.deepcopy(model) is not model


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "8"])
@pytest.mark.parametrize("name", ["max_length", "batch_size"])
def test_wrong_sizes(model: Any, name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"{name} must be a positive integer, found"):
        accelerate(model, **{"max_length": 8, name: value})


def test_models_it_does_not_know(zoo: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="is not supported; known are"):
        accelerate(torch.nn.Linear(2, 2), max_length=8)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "num_hidden_layers": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=64, **shape, **sliding)).eval()
    with pytest.raises(UnsupportedModelError, match="layer 1 keeps its past in a DynamicSlidingWindowLayer"):
        accelerate(model, compile=False, max_length=8)
    with torch.device("meta"):
        empty = Qwen2ForCausalLM(Qwen2Config(vocab_size=64, **shape, num_hidden_layers=1))
    with pytest.raises(UnsupportedModelError, match="one CPU or CUDA device, found it on meta"):
        accelerate(empty, compile=False, max_length=8)
    split = zoo.model("qwen3")
    split.lm_head.to("meta")
    with pytest.raises(UnsupportedModelError, match="found it on"):
        accelerate(split, compile=False, max_length=8)


def test_no_memory(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    model = zoo.model("qwen3")
    own = type(model)
    monkeypatch.setattr("model_patch.decode.decoder.DecodeState", fails)
    with pytest.raises(PolarError, match=r"3 sequences of 99 tokens .* lower batch_size or max_length"):
        accelerate(model, compile=False, max_length=99, batch_size=3)
    assert type(model) is own


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "lower batch_size or max_length"),
        (BackendCompilerFailed(print, RuntimeError("no compiler"), None), r"torch.compile failed .*compile=False"),
    ],
)
def test_a_step_that_cannot_be_captured(zoo: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str) -> None:
    """Of a batch size that comes later; the model goes on with those that it has."""
    model = zoo.model("qwen3")
    accelerate(model, compile=False, max_length=24, batch_size=3)
    ids = PROMPT.to(zoo.device)
    expected = model.generate(ids[:1], **GREEDY)

    def fails(*args: Any) -> None:
        raise error

    monkeypatch.setattr("model_patch.decode.decoder.Step", fails)
    with pytest.raises(PolarError, match=told):
        model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids[:1], **GREEDY), expected)
