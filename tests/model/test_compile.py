"""torch.compile, torch.export, static caches and CUDA graphs over patched models, and what they hold in memory."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from model_patch import PolarQuantConfig, load_model, patch_model
from model_patch.quantize import plan_checkpoint, quantize_checkpoint
from polar_kernels import PolarModule

MODELS = ("qwen3_5_text", "qwen3_tied")
ROUNDING = 1e-5  # relative, of fp32 sums in another order through a whole model
Distance = Callable[[torch.Tensor, torch.Tensor], float]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def patched(zoo: Any, name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = load_model(zoo.checkpoint(name), device=zoo.device, dtype=dtype)
    patch_model(model, awq_scales=zoo.awq_scales(model))
    return model


def polar_calls(graph: torch.fx.Graph) -> dict[str, int]:
    """Operator -> calls, of those of this project in an exported graph; products of either weight layout together."""
    targets = [str(node.target) for node in graph.nodes]
    names = [target.removeprefix("polar.").removeprefix("tiled_") for target in targets if target.startswith("polar.")]
    return {name: names.count(name) for name in ("embedding.default", "linear.default", "dequantize.default")}


@pytest.mark.parametrize(("name", "backend"), [("qwen3_5_text", "aot_eager"), ("qwen3_tied", "inductor")])
@torch.no_grad()
def test_the_forward_is_one_graph(zoo: Any, name: str, backend: str, relative_error: Distance) -> None:
    model = patched(zoo, name)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    ids = zoo.inputs(name)["input_ids"]
    logits = compiled(ids, use_cache=False).logits
    assert counter.frame_count == 1
    assert relative_error(logits, model(ids, use_cache=False).logits) < ROUNDING
    other = ids.flip(1).contiguous()
    assert relative_error(compiled(other, use_cache=False).logits, model(other, use_cache=False).logits) < ROUNDING
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_export_keeps_the_codes_and_calls_one_operator_per_layer(zoo: Any, name: str, relative_error: Distance) -> None:
    model = patched(zoo, name)
    ids = zoo.inputs(name)["input_ids"]
    program = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
    layers = len([module for module in model.modules() if isinstance(module, PolarModule)])
    tied = name == "qwen3_tied"
    assert polar_calls(program.graph) == {
        "embedding.default": 1,
        "linear.default": layers - 1 + tied,
        "dequantize.default": 0,
    }
    held = [*program.state_dict.values(), *program.constants.values()]
    assert (
        len([tensor for tensor in held if tensor.dim() == 2 and tensor.dtype in (torch.uint8, torch.int32)]) == layers
    )
    result = program.module()(ids, use_cache=False)
    assert relative_error(result.logits, model(ids, use_cache=False).logits) < ROUNDING


@pytest.mark.parametrize("name", MODELS)
def test_a_static_cache_gives_the_same_tokens(zoo: Any, name: str) -> None:
    model = patched(zoo, name)
    expected = zoo.tokens(name, model)
    model.generation_config.disable_compile = zoo.device.type == "cpu"
    assert zoo.tokens(name, model, cache_implementation="static") == expected


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_a_captured_forward_replays_to_the_eager_logits(
    zoo: Any, name: str, dtype: torch.dtype, relative_error: Distance
) -> None:
    model = patched(zoo, name, dtype)
    ids = zoo.inputs(name, length=24)["input_ids"]
    static = ids[:1, :8].clone()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(static, use_cache=False)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(static, use_cache=False).logits

    for start in range(0, 17, 4):
        window = ids[1:, start : start + 8]
        static.copy_(window)
        graph.replay()
        expected = model(window.contiguous(), use_cache=False).logits
        assert relative_error(logits, expected) < ROUNDING  # also unpatched, fp32 differs by 5e-7 under capture
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@pytest.fixture(scope="module")
def large_checkpoint(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, int]:
    """A quantised random Qwen3 of 300 M parameters; its folder, bytes stored, and bf16 bytes of what is quantised."""
    folder = tmp_path_factory.mktemp("large")
    config = Qwen3Config(
        vocab_size=32_768,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
    )
    with torch.device(device):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "plain")
    del model
    torch.cuda.empty_cache()
    plan = plan_checkpoint(folder / "plain", PolarQuantConfig(), awq=False)
    quantize_checkpoint(plan, folder / "polar", device=device)
    dense = sum(plan.layer_bytes(name)[0] for name in plan.layers.bits)
    return folder / "polar", plan.output_bytes, dense


@pytest.mark.gpu
def test_loading_and_generating_never_hold_the_dense_weights(
    large_checkpoint: tuple[Path, int, int], device: torch.device
) -> None:
    folder, stored, dense = large_checkpoint
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = load_model(folder, device=device, dtype=torch.bfloat16)
    ids = torch.randint(0, 32_768, (1, 16), device=device)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    peak = torch.cuda.max_memory_allocated() - before
    assert stored < 0.35 * dense  # or the bound would say nothing
    assert stored <= peak < stored + 0.5 * dense
