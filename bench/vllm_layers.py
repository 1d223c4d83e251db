"""The matrix products of one decode step in vLLM, by the methods of the plug-in, in one CUDA graph, beside bf16.

vLLM itself does not run, nor attention, norms or sampling: a layer's `create_weights`, `process_weights_after_loading`
and `apply` are called as vLLM calls them, for all layers of a model in their order. What they inherit from vLLM, base
classes and parameters that know how to be loaded, is stood in for by classes that hold tensors and compute nothing, so
that the numbers are the same whether vLLM is installed or not.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from polar_bench.timing import time_calls
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from model_patch.errors import ConfigError
from model_patch.progress import Progress, no_progress
from polar_kernels import lloyd_max_levels

ROWS = (1, 8, 32, 128)
_MAX_ERROR = 0.012  # relative, as in `providers.py`
_CHECKED_ROWS = 8192  # of a weight's outputs, in fp64
_VOCABULARY_PADDING = 64
Call = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """One of vLLM's linear layers: the rows of the projections it merges, and in_features."""

    name: str
    rows: tuple[int, ...]
    in_features: int


@dataclass(frozen=True)
class StepMeasurement:
    """microseconds: of all products of a step of so many `requests`, None where a product was wrong; error: the largest
    of a layer, relative; ratio: the time of bf16 over this one's."""

    provider: str
    requests: int
    weight_bytes: int
    error: float
    microseconds: float | None
    spread: float | None
    ratio: float | None


def layers_of(config: PreTrainedConfig) -> list[Layer]:
    """The layers of a dense Qwen3.5, merged as vLLM merges them, and its head. Raises ConfigError for another model."""
    if config.model_type != "qwen3_5_text":
        raise ConfigError(f"polar bench vllm knows dense Qwen3.5, found model_type {config.model_type!r}")
    hidden, head = config.hidden_size, config.head_dim
    key = config.linear_num_key_heads * config.linear_key_head_dim
    value = config.linear_num_value_heads * config.linear_value_head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    layers = []
    for kind in config.layer_types:
        if kind == "linear_attention":
            layers += [Layer("in_proj_qkvz", (key, key, value, value), hidden), Layer("out_proj", (hidden,), value)]
        else:  # queries come with a gate each
            layers += [Layer("qkv_proj", (2 * queries, keys, keys), hidden), Layer("o_proj", (hidden,), queries)]
        layers.append(Layer("gate_up_proj", (config.intermediate_size,) * 2, hidden))
        layers.append(Layer("down_proj", (hidden,), config.intermediate_size))
    vocabulary = -(-config.vocab_size // _VOCABULARY_PADDING) * _VOCABULARY_PADDING
    return [*layers, Layer("lm_head", (vocabulary,), hidden)]


def run(
    layers: Sequence[Layer], rows: Sequence[int] = ROWS, bits: int = 5, progress: Progress = no_progress
) -> list[StepMeasurement]:
    """Measurements of bf16 and of the plug-in, with random weights, for each number of requests."""
    device = torch.device("cuda")
    makes = {"bfloat16": partial(plain_calls, layers, device)}
    makes[f"polar {bits}-bit in vLLM's layers"] = partial(plug_in_calls, layers, bits, device)
    baseline: dict[int, float] = {}
    results = []
    for index, (provider, make) in enumerate(makes.items()):
        progress(index, len(makes), provider)
        calls, weights, nbytes = make()
        for count in rows:
            x = {k: torch.randn(count, k, device=device).bfloat16() for k in {layer.in_features for layer in layers}}
            error = max(_errors(layers, calls, weights, x))
            timing = None
            if error <= _MAX_ERROR:
                steps = [partial(call, x[layer.in_features]) for layer, call in zip(layers, calls, strict=True)]
                timing = time_calls(steps)
            microseconds = None if timing is None else timing.microseconds * len(layers)
            if index == 0 and microseconds is not None:
                baseline[count] = microseconds
            ratio = baseline[count] / microseconds if microseconds and count in baseline else None
            spread = None if timing is None else timing.spread
            results.append(StepMeasurement(provider, count, nbytes, error, microseconds, spread, ratio))
        del calls, weights
        torch.cuda.empty_cache()
    progress(len(makes), len(makes), "done")
    return results


COLUMNS = ["provider", "requests", "us a step", "bf16 / this", "tokens/s at most", "GB/s", "weights", "error"]


def table(measurements: Sequence[StepMeasurement]) -> list[list[str]]:
    """Rows for people; tokens/s are those of a step that is nothing but its products."""
    return [
        [
            m.provider,
            str(m.requests),
            "-" if m.microseconds is None else f"{m.microseconds:.0f}",
            "-" if m.ratio is None else f"{m.ratio:.2f}",
            "-" if m.microseconds is None else f"{m.requests / m.microseconds * 1e6:.0f}",
            "-" if m.microseconds is None else f"{m.weight_bytes / m.microseconds / 1e3:.0f}",
            f"{m.weight_bytes / 1e9:.2f} GB",
            f"{m.error:.2%}",
        ]
        for m in measurements
    ]


Made = tuple[list[Call], list[Callable[[], torch.Tensor]], int]
"""Calls x -> y, functions that give the weight of each densely, and the bytes of all."""


def plain_calls(layers: Sequence[Layer], device: torch.device) -> Made:
    """What vLLM's unquantised layers do on a GPU."""
    weights = [torch.randn(sum(layer.rows), layer.in_features, device=device).mul_(0.02).bfloat16() for layer in layers]
    calls: list[Call] = [partial(F.linear, weight=weight) for weight in weights]
    return calls, [partial(_same, weight) for weight in weights], sum(weight.nbytes for weight in weights)


def plug_in_calls(layers: Sequence[Layer], bits: int, device: torch.device) -> Made:
    """What the plug-in's do, with random codes and norms."""
    method_class, weight_class = load_method()
    levels = tuple(lloyd_max_levels(bits).tolist())
    calls: list[Call] = []
    weights: list[Callable[[], torch.Tensor]] = []
    nbytes = 0
    for layer in layers:
        module: Any = nn.Module()
        method = method_class(weight_class(layer.name, levels, True))
        size = layer.in_features, list(layer.rows), layer.in_features, sum(layer.rows)
        with torch.device(device):
            method.create_weights(module, *size, torch.bfloat16, weight_loader=None)
        module.packed.data.random_(0, 256)
        module.norms.data.normal_(0.02 * 128**0.5, 0.02)
        nbytes += module.packed.nbytes + module.norms.nbytes
        method.process_weights_after_loading(module)
        calls.append(partial(method.apply, module))
        weights.append(partial(module.polar[0].dequantize, torch.float32))
    return calls, weights, nbytes


def _same(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _errors(
    layers: Sequence[Layer],
    calls: Sequence[Call],
    weights: Sequence[Callable[[], torch.Tensor]],
    x: dict[int, torch.Tensor],
) -> Iterator[float]:
    """Of the first layer of each kind, against the product with its dense weight in fp64."""
    kinds: set[str] = set()
    for layer, call, weight in zip(layers, calls, weights, strict=True):
        if layer.name not in kinds:
            kinds.add(layer.name)
            given = x[layer.in_features]
            exact = given.double() @ weight()[:_CHECKED_ROWS].double().T
            yield float((call(given)[:, :_CHECKED_ROWS].double() - exact).norm() / exact.norm())


def load_method() -> tuple[Any, Any]:
    """`PolarLinearMethod` and `QuantizedWeight` of the plug-in, imported over the stand-ins and forgotten again."""
    ours = {name: module for name, module in sys.modules.items() if _is_replaced(name)}
    for name in ours:
        del sys.modules[name]
    try:
        sys.modules.update(_stand_ins())
        from model_patch.vllm.config import QuantizedWeight
        from model_patch.vllm.linear import PolarLinearMethod

        return PolarLinearMethod, QuantizedWeight
    finally:
        for name in [name for name in sys.modules if _is_replaced(name)]:
            del sys.modules[name]
        sys.modules.update(ours)


def _is_replaced(name: str) -> bool:
    return name == "vllm" or name.startswith(("vllm.", "model_patch.vllm"))


class _Base:
    """In the place of vLLM's base classes of methods and configs, of which nothing is used."""


class _Parameter(nn.Parameter):
    """In the place of vLLM's parameters: without their loaders, since nothing is loaded."""

    def __new__(cls, data: torch.Tensor, **attributes: object) -> "_Parameter":
        return super().__new__(cls, data, requires_grad=False)


def _stand_ins() -> dict[str, ModuleType]:
    contents: dict[str, dict[str, object]] = {
        "vllm.model_executor.layers.linear": {
            "LinearMethodBase": _Base,
            "register_weight_loader_v2_supported_method": lambda cls: cls,
        },
        "vllm.model_executor.layers.quantization.base_config": {
            "QuantizationConfig": _Base,
            "QuantizeMethodBase": _Base,
        },
        "vllm.model_executor.parameter": {
            "GroupQuantScaleParameter": _Parameter,
            "ModelWeightParameter": _Parameter,
        },
        "vllm.model_executor.utils": {"set_weight_attrs": lambda parameter, attributes: None},
    }
    found: dict[str, ModuleType] = {}
    for name, content in contents.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            found.setdefault(".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        vars(found[name]).update(content)
    return found
