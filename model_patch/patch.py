"""Swapping the layers of a model for quantised ones, in place, and saying what was done."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from model_patch.architectures import Kind, LayerPlan, check_model_type, kind_of, names_of_kind, weight_name
from model_patch.config import PolarQuantConfig
from model_patch.errors import UnsupportedModelError
from model_patch.groups import ungroup_projections
from polar_kernels import (
    PolarEmbedding,
    PolarError,
    PolarExpertProjection,
    PolarExperts,
    PolarLinear,
    PolarModule,
    TiedPolarHead,
)
from polar_kernels.module import Activation


@dataclass(frozen=True)
class PatchReport:
    """What `patch_model` did.

    replaced: layer name -> bits; kept: layer name -> why it was left; tied_head: the head that shares the
    embedding's quantised tensors, if there is one; bytes_before, bytes_after: of the replaced layers' weights.
    """

    replaced: dict[str, int]
    kept: dict[str, str]
    tied_head: str | None
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        tied = f"; {self.tied_head} shares the embedding" if self.tied_head else ""
        sizes = f"{self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB"
        return f"{len(self.replaced)} layers quantised, {sizes}; {len(self.kept)} kept{tied}"


def patch_model(
    model: PreTrainedModel,
    config: PolarQuantConfig | None = None,
    *,
    awq_scales: Mapping[str, torch.Tensor] | None = None,
) -> PatchReport:
    """Quantise the layers of a transformers model in place, one at a time on its own device.

    config: bits and exclusions; 5 bits everywhere when None. awq_scales: layer name -> [in_features], from
    `model_patch.quantize.search_awq_scales`; when given, layers it does not name get ones.

    The model then saves in the documented format with `save_pretrained`. Raises UnsupportedModelError for an
    architecture that is not known or when there is nothing to replace, ConfigError for patterns that match nothing,
    QuantizationError naming the layer whose weight cannot be quantised; the layers before it are patched by then.
    """
    from model_patch.hf import attach_quantizer

    config = config or PolarQuantConfig()
    scales = dict(awq_scales or {})
    plan = plan_model(model, config)
    before = sum(model.get_parameter(weight_name(name)).nbytes for name in plan.bits)
    for name, bits in plan.bits.items():
        if scales and kind_of(name) is not Kind.EMBEDDING and name not in scales:
            # The format has them on every linear layer or on none.
            scales[name] = torch.ones(model.get_parameter(weight_name(name)).shape[-1])
        set_module(model, name, _quantize_module(name, _plain_layer(model, name), bits, scales.get(name)))
    join_experts(model, plan)
    tie_head(model, plan)
    attach_quantizer(model, config.resolved(plan, awq=bool(scales)))
    after = sum(model.get_submodule(name).stored_bytes for name in plan.bits)
    return PatchReport(plan.bits, plan.kept, plan.tied_head, before, after)


def set_activation(model: PreTrainedModel, activation: Activation) -> None:
    """Set `activation` of every quantised layer: "int8", the default, or "exact"."""
    for module in model.modules():
        if isinstance(module, PolarModule):
            module.activation = activation


def plan_model(model: PreTrainedModel, config: PolarQuantConfig) -> LayerPlan:
    """Which layers of an unpatched model `config` quantises. Raises as `patch_model` does."""
    check_model_type(getattr(getattr(model, "config", None), "model_type", None))
    if any(isinstance(module, PolarModule) for module in model.modules()):
        raise UnsupportedModelError("this model is quantised already; load the original one to quantise it differently")
    names = _layer_names(model)
    plan = config.plan(names, tied=bool(getattr(model.config, "tie_word_embeddings", False)))
    if not plan.bits:
        raise UnsupportedModelError(f"no layer to quantise: all {len(plan.kept)} are excluded or not of a known kind")
    return plan


def _layer_names(model: PreTrainedModel) -> list[str]:
    """Linear layers, embeddings and the projections of experts, in the model's order."""
    names = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            names.append(name)
        experts = [f"{name}.{leaf}" for leaf, _ in module.named_parameters(recurse=False)]
        names += [projection for projection in experts if kind_of(projection) is Kind.EXPERTS]
    activation = getattr(model.config.get_text_config(), "hidden_act", None)
    if names_of_kind(names, Kind.EXPERTS) and activation != "silu":
        raise UnsupportedModelError(f"experts must have hidden_act 'silu' in config.json, found {activation!r}")
    return names


def swap_to_empty(model: PreTrainedModel, plan: LayerPlan, awq: bool, device: torch.device | str = "meta") -> None:
    """Replace the planned layers by empty quantised ones that a checkpoint is then loaded into."""
    for name, bits in plan.bits.items():
        set_module(model, name, _empty_module(name, _plain_layer(model, name), bits, awq, device))
    join_experts(model, plan)
    tie_head(model, plan)


def join_experts(model: PreTrainedModel, plan: LayerPlan) -> None:
    """Put `PolarExperts` in the place of the modules whose two projections have been replaced.

    It takes what transformers' router gives whichever experts implementation is set, and has one of its own for all.
    """
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in names_of_kind(plan.bits, Kind.EXPERTS)):
        experts = model.get_submodule(parent)
        joined = PolarExperts(experts.gate_up_proj, experts.down_proj).train(experts.training)
        set_module(model, parent, joined)


def tie_head(model: PreTrainedModel, plan: LayerPlan) -> None:
    """Make a tied head read the embedding's codes, and stop transformers from tying weights that no longer exist."""
    if plan.tied_head is None:
        return
    embedding_name = next(name for name in plan.bits if kind_of(name) is Kind.EMBEDDING)
    embedding = model.get_submodule(embedding_name)
    assert isinstance(embedding, PolarEmbedding)  # plan.bits holds it, so it was replaced
    set_module(model, plan.tied_head, TiedPolarHead(embedding))
    model._tied_weights_keys, model.all_tied_weights_keys = None, {}


def set_module(model: PreTrainedModel, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    parent = model.get_submodule(owner)
    if leaf in parent._parameters:  # experts, which are no modules before
        delattr(parent, leaf)
    setattr(parent, leaf, module)


def dequantize_model(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace every quantised layer by a plain one holding its dequantised weight in `dtype`, in place."""
    ungroup_projections(model)
    _dense_experts(model, dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, PolarLinear):
            set_module(model, name, _dense_linear(module, dtype))
        elif isinstance(module, PolarEmbedding):
            embedding = _dense_embedding(module, dtype)
            set_module(model, name, embedding)
            _untie_head(model, module, embedding)


def _dense_experts(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Put transformers' own experts back, with dequantised weights."""
    quantized = {name: module for name, module in model.named_modules() if isinstance(module, PolarExperts)}
    if not quantized:
        return
    with torch.device("meta"):
        original = type(model)(model.config)
    for name, module in quantized.items():
        experts = original.get_submodule(name)
        for leaf, projection in (("gate_up_proj", module.gate_up_proj), ("down_proj", module.down_proj)):
            setattr(experts, leaf, nn.Parameter(projection.dequantize(dtype), requires_grad=False))
        set_module(model, name, experts.train(module.training))


def _dense_linear(module: PolarLinear, dtype: torch.dtype) -> nn.Linear:
    dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(module.dequantize(dtype), requires_grad=False)
    if module.bias is not None:
        dense.bias = module.bias
    return dense.train(module.training)


def _dense_embedding(module: PolarEmbedding, dtype: torch.dtype) -> nn.Embedding:
    dense = nn.Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx, device="meta")
    dense.weight = nn.Parameter(module.dequantize(dtype), requires_grad=False)
    return dense.train(module.training)


def _untie_head(model: PreTrainedModel, quantized: PolarEmbedding, dense: nn.Embedding) -> None:
    """Give a head that read the codes of `quantized` the parameter of `dense`, tied as transformers ties it."""
    for name, module in list(model.named_modules()):
        if isinstance(module, TiedPolarHead) and module.embedding is quantized:
            head = nn.Linear(dense.embedding_dim, dense.num_embeddings, bias=False, device="meta")
            head.weight = dense.weight
            set_module(model, name, head)
            del model._tied_weights_keys  # the class's own shows again
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _plain_layer(model: PreTrainedModel, name: str) -> nn.Module | nn.Parameter:
    """The layer `name` of an unpatched model: a module, or the weight itself of experts, [E, N, K]."""
    return model.get_parameter(name) if kind_of(name) is Kind.EXPERTS else model.get_submodule(name)


def _quantize_module(
    name: str, module: nn.Module | nn.Parameter, bits: int, awq_scales: torch.Tensor | None
) -> PolarModule:
    try:
        if isinstance(module, nn.Parameter):
            return PolarExpertProjection.from_dense(module.detach(), bits, awq_scales=awq_scales)
        if isinstance(module, nn.Embedding):
            return PolarEmbedding.from_embedding(module, bits)
        assert isinstance(module, nn.Linear)
        return PolarLinear.from_linear(module, bits, awq_scales=awq_scales)
    except PolarError as error:
        raise type(error)(f"{name}: {error}") from error


def _empty_module(
    name: str, module: nn.Module | nn.Parameter, bits: int, awq: bool, device: torch.device | str
) -> PolarModule:
    if isinstance(module, nn.Parameter):
        count, rows, columns = module.shape
        return PolarExpertProjection(count, columns, rows, bits=bits, awq=awq, device=device)
    dtype = module.weight.dtype
    assert isinstance(dtype, torch.dtype)
    if isinstance(module, nn.Embedding):
        shape = (module.num_embeddings, module.embedding_dim, module.padding_idx)
        return PolarEmbedding(*shape, bits=bits, device=device, dtype=dtype)
    assert isinstance(module, nn.Linear)
    has_bias = module.bias is not None
    shape = (module.in_features, module.out_features, has_bias)
    return PolarLinear(*shape, bits=bits, awq=awq, device=device, dtype=dtype)
