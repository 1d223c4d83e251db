"""accelerate(): the tokens are those of the plain path, whatever was decoded before. On a CPU steps run op by op."""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from model_patch import UnsupportedModelError, accelerate, decelerate, group_projections, patch_model, set_activation
from model_patch.decode import decoder as decoder_module
from model_patch.decode import fusion
from model_patch.decode.step import Step
from model_patch.demo import MODEL
from model_patch.load import load_model, load_tokenizer
from polar_kernels import PolarGroup

pytestmark = pytest.mark.filterwarnings("error:.*without the captured steps:UserWarning")
GREEDY = {"max_new_tokens": 18, "min_new_tokens": 18, "do_sample": False, "pad_token_id": 0}
LENGTH, ROWS = 64, 3


@pytest.fixture(autouse=True)
def _short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of these tests go from a step of 32 tokens to one of 64."""
    monkeypatch.setattr(decoder_module, "_SHORTEST", 16)


def patched(zoo: Any, name: str) -> PreTrainedModel:
    model = zoo.model(name)
    patch_model(model)
    set_activation(model, "exact")
    return model


def prompts(device: torch.device, rows: int = ROWS, length: int = 17) -> dict[str, torch.Tensor]:
    """Prompts of different lengths, padded on the left."""
    generator = torch.Generator().manual_seed(rows * 100 + length)
    ids = torch.randint(1, 500, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 5 * row] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.sent: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        assert value.device.type == "cpu"
        self.sent.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("quantized", [True, False])
def test_tokens_are_those_of_the_plain_path(zoo: Any, architecture: str, quantized: bool) -> None:
    if "moe" in architecture and not quantized and zoo.device.type == "cuda":
        with pytest.raises(UnsupportedModelError, match=r"experts: transformers' experts wait"):
            accelerate(zoo.model(architecture), max_length=LENGTH)
        return
    model = patched(zoo, architecture) if quantized else zoo.model(architecture)
    asked = [prompts(zoo.device, rows) | GREEDY for rows in (ROWS, 2, 1)]
    sampled = prompts(zoo.device) | {"max_new_tokens": 8, "do_sample": True, "pad_token_id": 0, "top_k": 5}
    expected = [model.generate(**arguments) for arguments in asked]
    torch.manual_seed(1)
    drawn = model.generate(**sampled)
    accelerate(model, compile=False, max_length=LENGTH, batch_size=ROWS)
    for arguments, ids in zip(asked, expected, strict=True):
        assert torch.equal(model.generate(**arguments), ids)
    torch.manual_seed(1)
    assert torch.equal(model.generate(**sampled), drawn)
    assert drawn.unique(dim=0).shape[0] == ROWS


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_vl_tied"])
def test_prompts_with_an_image(zoo: Any, name: str) -> None:
    model = patched(zoo, name)
    arguments = zoo.inputs(name) | GREEDY
    expected = model.generate(**arguments)
    without = model.generate(arguments["input_ids"], **GREEDY)
    accelerate(model, compile=False, max_length=LENGTH, batch_size=2)
    assert torch.equal(model.generate(**arguments), expected)
    assert torch.equal(model.generate(arguments["input_ids"], **GREEDY), without)
    assert not torch.equal(expected, without)


def test_inference_mode_and_none_in_turns(zoo: Any) -> None:
    model = patched(zoo, "qwen3_5_text")
    arguments = [prompts(zoo.device, rows) | GREEDY for rows in (2, 1)]
    expected = [model.generate(**each) for each in arguments]
    with torch.inference_mode():
        accelerate(model, compile=False, max_length=LENGTH, batch_size=ROWS)
        assert torch.equal(model.generate(**arguments[0]), expected[0])  # its steps are made now
    assert torch.equal(model.generate(**arguments[0]), expected[0])
    assert torch.equal(model.generate(**arguments[1]), expected[1])


def test_the_longest_sequence_that_fits(zoo: Any) -> None:
    model = patched(zoo, "qwen3_5_text")
    prompt = prompts(zoo.device)
    new = LENGTH + 1 - prompt["input_ids"].shape[1]  # the last token is not read again
    arguments = prompt | GREEDY | {"max_new_tokens": new, "min_new_tokens": new}
    expected = model.generate(**arguments)
    accelerate(model, compile=False, max_length=LENGTH, batch_size=ROWS)
    assert torch.equal(model.generate(**arguments), expected)


def test_nothing_stays_of_sequences_before(zoo: Any) -> None:
    model = patched(zoo, "qwen3_5_text")
    arguments = prompts(zoo.device) | GREEDY
    expected = model.generate(**arguments)
    accelerate(model, compile=False, max_length=LENGTH, batch_size=ROWS)
    for layer in model._decoder._state._layers:
        for tensor in vars(layer).values():
            tensor.fill_(float("nan"))
    assert torch.equal(model.generate(**arguments), expected)


class _Program(TorchDispatchMode):
    """The operators of a step: names, numbers and the shapes of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def describe(value: Any) -> str:
            if isinstance(value, torch.Tensor):
                return f"{value.dtype}{tuple(value.shape)}"
            return f"[{', '.join(map(describe, value))}]" if isinstance(value, (list, tuple)) else repr(value)

        self.calls.append(f"{func} {describe(args)} {describe(list((kwargs or {}).items()))}")
        return func(*args, **(kwargs or {}))


def test_a_step_is_the_same_program_at_every_token(zoo: Any, architecture: str) -> None:
    """What a CUDA graph needs: no number that changes from token to token, and none read from a tensor."""
    model = patched(zoo, architecture)
    accelerate(model, compile=False, max_length=LENGTH, batch_size=ROWS)
    model.generate(**prompts(zoo.device) | GREEDY | {"max_new_tokens": 5, "min_new_tokens": 5})
    decoder, programs = model._decoder, []
    for _ in range(3):
        step = decoder._steps[ROWS, 32]
        with _Program() as program:
            step.run()
        programs.append(program.calls)
    assert len(programs[0]) > 50
    assert programs[0] == programs[1] == programs[2]
    assert not [call for call in programs[0] if "_local_scalar_dense" in call or "nonzero" in call]


def test_rows_stop_by_themselves(zoo: Any) -> None:
    model = patched(zoo, "qwen3_5_text")
    free = prompts(zoo.device) | GREEDY
    written = model.generate(**free)[:, 17:]
    ends = [written[0, 3].item(), written[1, 9].item()]
    arguments = free | {"eos_token_id": ends, "min_new_tokens": 0}
    expected, streamed = model.generate(**arguments), Recorder()
    accelerate(model, compile=False, max_length=LENGTH, batch_size=ROWS)
    assert torch.equal(model.generate(**arguments), expected)
    one = arguments | {key: free[key][:1] for key in ("input_ids", "attention_mask")}
    ids = model.generate(**one, streamer=streamed)
    assert ids.shape[1] <= 17 + 4
    assert [token for sent in streamed.sent for token in sent] == ids[0].tolist()
    assert streamed.ended == 1


def test_stop_strings_and_own_criteria(zoo: Any) -> None:
    model, tokenizer = load_model(MODEL, device=zoo.device, dtype=torch.float32), load_tokenizer(MODEL)
    asked = tokenizer("The kernel is", return_tensors="pt").to(zoo.device) | {"max_new_tokens": 30, "do_sample": False}
    text = tokenizer.decode(model.generate(**asked)[0])
    stops = {"stop_strings": [text[30:34]], "tokenizer": tokenizer}

    class AtTwenty(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 20, device=input_ids.device)

    expected = model.generate(**asked, **stops), model.generate(**asked, stopping_criteria=[AtTwenty()])
    accelerate(model, compile=False, max_length=LENGTH)
    assert torch.equal(model.generate(**asked, **stops), expected[0])
    assert torch.equal(model.generate(**asked, stopping_criteria=[AtTwenty()]), expected[1])
    assert expected[0].shape[1] < asked["input_ids"].shape[1] + 30
    assert expected[1].shape[1] == 20


def test_scores_logits_and_cache_are_returned(zoo: Any) -> None:
    model = patched(zoo, "qwen3_5_text")
    arguments = prompts(zoo.device) | GREEDY
    asked = arguments | {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected = model.generate(**asked)
    accelerate(model, compile=False, max_length=LENGTH, batch_size=ROWS)
    found = model.generate(**asked)
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(found[name]), torch.stack(expected[name]), rtol=1e-4, atol=1e-4)
    cache, other = found[model._decoder.cache_name], expected[model._decoder.cache_name]
    assert cache.get_seq_length() == other.get_seq_length() == 17 + 18 - 1
    for layer, wanted in zip(cache.layers, other.layers, strict=True):
        names = ("keys", "values") if isinstance(getattr(wanted, "keys", None), torch.Tensor) else ()
        pairs = [(getattr(layer, name), getattr(wanted, name)) for name in names]
        pairs = pairs or [(layer.conv_states[0], wanted.conv_states[0])]
        pairs += [] if names else [(layer.recurrent_states[0], wanted.recurrent_states[0])]
        for mine, theirs in pairs:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_a_conversation_goes_on_in_its_cache(zoo: Any) -> None:
    model = patched(zoo, "qwen3_5_text")
    first = prompts(zoo.device, 1)["input_ids"]
    more = torch.randint(1, 500, (1, 6), generator=torch.Generator().manual_seed(5)).to(zoo.device)

    def talk() -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        ids = model.generate(first, past_key_values=cache, **GREEDY)
        return model.generate(torch.cat([ids, more], 1), past_key_values=cache, **GREEDY)

    expected = talk()
    accelerate(model, compile=False, max_length=LENGTH)
    assert torch.equal(talk(), expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing_behind(zoo: Any, error: type[BaseException]) -> None:
    class Stops(Recorder):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.sent) == 5:
                raise error

    model = patched(zoo, "qwen3_5_text")
    arguments = prompts(zoo.device, 1) | GREEDY
    expected = model.generate(**arguments)
    accelerate(model, compile=False, max_length=LENGTH)
    with pytest.raises(error):
        model.generate(**arguments, streamer=Stops())
    assert torch.equal(model.generate(**arguments), expected)


def test_layers_may_change_afterwards(zoo: Any) -> None:
    model = zoo.model("qwen3_5_text")
    arguments = prompts(zoo.device) | GREEDY
    accelerate(model, compile=False, max_length=LENGTH, batch_size=ROWS)
    before = model._decoder._steps[1, 16]
    model.generate(**arguments)
    assert model._decoder._steps[1, 16] is before
    patch_model(model)
    set_activation(model, "exact")
    found = model.generate(**arguments)
    assert model._decoder._steps[1, 16] is not before
    model.to(torch.bfloat16)
    wide = model.generate(**arguments)
    decelerate(model)
    assert torch.equal(model.generate(**arguments), wide)
    model.to(torch.float32)
    assert torch.equal(model.generate(**arguments), found)


@pytest.mark.parametrize("name", ["embedded", "qwen3_vl_tied"])
def test_fused_regions_are_compiled_once_for_all_layers(zoo: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(fusion, "BACKEND", counter)
    if name == "embedded":  # three layers of GatedDeltaNet
        model = load_model(MODEL, device=zoo.device, dtype=torch.float32)
        patch_model(model)
    else:
        model = patched(zoo, name)
    accelerate(model, compile=False, max_length=LENGTH, batch_size=ROWS)
    plain = [getattr(*region) for region in fusion.regions(model)]
    counts = []
    for rows in (1, ROWS, 1, ROWS):
        with fusion.fused(model):
            model._decoder.first_step(rows).run()
        counts.append(counter.frame_count)
    norms = 3  # of the hidden state, of queries and of keys; anything else has one shape
    once = len(plain) - 1 + norms
    assert counts == [once, 2 * once, 2 * once, 2 * once]
    assert [getattr(*region) for region in fusion.regions(model)] == plain


@pytest.mark.parametrize("name", ["qwen3_5_text", "qwen2_tied_odd"])
def test_tokens_with_fused_regions(zoo: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are captured on a GPU; the compiler's front end alone, which is quick."""
    monkeypatch.setattr(fusion, "BACKEND", "eager")
    model = patched(zoo, name)
    arguments = prompts(zoo.device) | GREEDY
    expected = model.generate(**arguments)
    accelerate(model, compile=False, max_length=LENGTH, batch_size=ROWS)
    run = Step.run

    def fused_run(self: Step) -> torch.Tensor:
        with fusion.fused(self._model):
            return run(self)

    monkeypatch.setattr(Step, "__call__", fused_run)
    assert torch.equal(model.generate(**arguments), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_graphs_write_the_same_tokens(zoo: Any, dtype: torch.dtype) -> None:
    model = zoo.model("qwen3_5_text", dtype)
    patch_model(model)
    set_activation(model, "exact")
    arguments = prompts(zoo.device, 2) | GREEDY
    expected = model.generate(**arguments)
    accelerate(model, max_length=LENGTH, batch_size=2)
    assert torch.equal(model.generate(**arguments), expected)


@pytest.mark.gpu
def test_a_step_is_one_graph_and_weights_are_not_copied(zoo: Any) -> None:
    model = patched(zoo, "qwen3_5_text")
    model.generate(**prompts(zoo.device) | GREEDY)
    accelerate(model, compile=False, max_length=LENGTH, batch_size=ROWS)
    assert all(step._graph is not None for step in model._decoder._steps.values())
    assert {rows for rows, _ in model._decoder._steps} == {1, ROWS}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model._decoder._steps[1, 16]()
    assert sum(event.count for event in profile.key_averages() if event.key == "cudaGraphLaunch") == 1
    assert not [event.key for event in profile.key_averages() if event.key == "cudaLaunchKernel"]


@pytest.mark.gpu
def test_projections_are_grouped_meanwhile(zoo: Any) -> None:
    model = patched(zoo, "qwen3_5_text")

    def groups() -> int:
        return sum(isinstance(module, PolarGroup) for module in model.modules())

    accelerate(model, max_length=LENGTH, batch_size=ROWS)
    assert groups() > 0
    decelerate(model)
    assert groups() == 0
    group_projections(model)
    accelerate(model, max_length=LENGTH, batch_size=ROWS)
    decelerate(model)
    assert groups() > 0  # which accelerate did not make
