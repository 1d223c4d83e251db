"""The plug into transformers' quantizer registry: `from_pretrained` and `save_pretrained` of PolarQuant models.

Without this registration transformers only warns of an unknown method, skips it and leaves random weights; so
importing `model_patch` registers.
"""

import os
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from model_patch.architectures import Kind, names_of_kind
from model_patch.checkpoint.experts import FUSED
from model_patch.checkpoint.reader import Checkpoint
from model_patch.checkpoint.strict import PARTS, check_checkpoint, expected_tensors, value_problems
from model_patch.checkpoint.writer import polar_metadata, sort_metadata
from model_patch.config import METHOD, PolarQuantConfig
from model_patch.errors import CheckpointError, UnsupportedModelError
from model_patch.patch import dequantize_model, plan_model, swap_to_empty
from polar_kernels import PolarEmbedding, PolarError, PolarLinear, PolarModule, quantize_weight


def register() -> None:
    """Make transformers know `quant_method: polarquant`. Harmless to call again."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(PolarQuantConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(PolarHfQuantizer)


def attach_quantizer(model: PreTrainedModel, config: PolarQuantConfig) -> None:
    """Give a model patched in memory what a loaded one has, so that `save_pretrained` writes the format."""
    model.hf_quantizer = PolarHfQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    model.is_quantized = True
    model.quantization_method = METHOD
    _prepare(model)


class PolarHfQuantizer(HfQuantizer):
    """Loads checkpoints of the format, quantises plain ones on the fly, and saves either."""

    requires_calibration = False
    quantization_config: PolarQuantConfig

    def __init__(self, quantization_config: PolarQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._checkpoint: Checkpoint | None = None
        self._plain_dtypes: dict[str, torch.dtype] = {}
        self.problems: list[str] = []

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True  # otherwise generate() would not compile its decode step

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        plan = plan_model(model, self.quantization_config)
        self._plain_dtypes = {name: p.dtype for name, p in model.named_parameters()}
        if self.pre_quantized:
            if not checkpoint_files:
                raise UnsupportedModelError("a PolarQuant model is loaded from safetensors files; found none")
            self._checkpoint = Checkpoint.from_files(checkpoint_files)
            swap_to_empty(model, plan, self.quantization_config.awq)
            check_checkpoint(model, self._checkpoint)
        else:
            if self.quantization_config.awq:
                raise UnsupportedModelError(
                    "quantising on the fly does not calibrate: leave out awq=True, or use `polar quantize`"
                )
            if names_of_kind(plan.bits, Kind.EXPERTS):
                raise UnsupportedModelError(
                    "experts are not quantised on the fly: use `polar quantize`, or load the model and `patch_model` it"
                )
            swap_to_empty(model, plan, awq=False)
            self.quantization_config = self.quantization_config.resolved(plan, awq=False)
            for name in plan.bits:
                # The key under which transformers brings the plain weight; gone once it is quantised.
                module = model.get_submodule(name)
                module.register_parameter("weight", nn.Parameter(_meta_weight(module), requires_grad=False))
        _prepare(model)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        polar = {name: m for name, m in model.named_modules() if isinstance(m, PolarModule)}
        problems = list(self.problems)
        tables = self._checkpoint.centroids() if self._checkpoint else {}
        for name, module in polar.items():
            if "weight" in module._parameters:
                problems.append(f"{name}.weight is missing")
            if self._checkpoint:
                module.centroids = tables[module.bits].to(next(module.buffers()).device, copy=True)
                problems += value_problems(name, module.polar_weight, self._checkpoint)
        if problems:
            raise CheckpointError(getattr(model, "name_or_path", None) or "checkpoint", problems)
        self._restore_dtypes(model)
        for module in polar.values():
            module.settle()
        return model

    def _restore_dtypes(self, model: PreTrainedModel) -> None:
        """transformers 5.17 leaves renamed keys of quantised checkpoints in the dtype they have on disk."""
        for name, parameter in model.named_parameters():
            wanted = self._plain_dtypes.get(name, parameter.dtype)
            if parameter.dtype != wanted:
                parameter.data = parameter.data.to(wanted)

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Also reads quantised experts that are stored one by one. Later versions of transformers pass the model."""
        own = _expert_converters(self) if self.pre_quantized else []
        return [*super().update_weight_conversions(weight_conversions, *model), *own]

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        name, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and isinstance(model.get_submodule(name), PolarModule)

    def get_quantize_ops(self) -> ConversionOps:
        return QuantizeOnLoad(self)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        polar = {n: m for n, m in model.named_modules() if isinstance(m, PolarModule)}
        tables = {module.bits: module.centroids for module in polar.values()}
        bits = {name: module.bits for name, module in polar.items()}
        return expected_tensors(model), polar_metadata(tables, bits)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        dequantize_model(model, dtype or model.dtype)
        return model


class QuantizeOnLoad(ConversionOps):
    """Turns one plain weight into the buffers of its layer as it is read."""

    def __init__(self, hf_quantizer: PolarHfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        full_layer_name: str | None = None,
        model: Any = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        name = str(full_layer_name).rpartition(".")[0]
        module = model.get_submodule(name)
        module._parameters.pop("weight", None)
        if missing_keys is not None:
            missing_keys.discard(f"{name}.weight")
        try:
            quantized = quantize_weight(weight, module.bits)
        except PolarError as error:
            # An exception from here would come out as transformers' own, with ours in its text.
            self.hf_quantizer.problems.append(f"{full_layer_name}: {error}")
            return {}
        return {f"{name}.{part}": getattr(quantized, part) for part in ("packed", "norms", "centroids")}


class TakeOne(ConversionOps):
    """Of tensors that must all be the same, one."""

    def __init__(self, hf_quantizer: PolarHfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> "TakeOne":
        return self  # transformers copies converters; what is wrong is to come to the quantizer itself

    def convert(
        self, input_dict: dict[str, list[torch.Tensor]], full_layer_name: str | None = None, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        first, *others = [tensor for tensors in input_dict.values() for tensor in tensors]
        if not all(torch.equal(first, other) for other in others):
            self.hf_quantizer.problems.append(f"{full_layer_name} must be the same for all experts of the layer")
        return {str(full_layer_name): first}


def _expert_converters(hf_quantizer: PolarHfQuantizer) -> list[WeightConverter]:
    """What makes fused experts of quantised single ones."""
    converters = []
    for target, leaves in FUSED.items():
        for part in PARTS:
            sources = [f"mlp.experts.*.{leaf}.{part}" for leaf in leaves]
            fuse: list[ConversionOps] = [MergeModulelist(0), *([Concatenate(1)] if len(leaves) > 1 else [])]
            operations = [TakeOne(hf_quantizer)] if part == "awq_scales" else fuse
            converters.append(WeightConverter(sources, f"mlp.experts.{target}.{part}", operations=operations))
    return converters


def _meta_weight(module: PolarLinear | PolarEmbedding) -> torch.Tensor:
    """A stand-in with the shape of the plain weight."""
    if isinstance(module, PolarEmbedding):
        return torch.empty(module.num_embeddings, module.embedding_dim, device="meta")
    return torch.empty(module.out_features, module.in_features, device="meta")


def _prepare(model: PreTrainedModel) -> None:
    """What transformers must know of this very model, whose class it shares with unquantised ones."""
    # Tables of levels come from the metadata, so that their absence among the tensors is no news.
    model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), r"\.centroids$"}
    # A bound method, which a deep copy of the model rebinds to the copy.
    model.save_pretrained = MethodType(_save_pretrained, model)


def _save_pretrained(self: PreTrainedModel, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
    """The class's own, with the shards' headers in a fixed order: the same tensors are the same bytes."""
    # Experts are saved fused: transformers would take their codes for its own fused weights, and split them.
    conversions = getattr(self, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(self, add_legacy=False)
    self._weight_conversions = [c for c in conversions if not _is_of_experts(c)]
    type(self).save_pretrained(self, save_directory, *args, **kwargs)
    for file in Path(save_directory).glob("*.safetensors"):
        sort_metadata(file)


def _is_of_experts(conversion: object) -> bool:
    """Whether it makes fused experts of single ones."""
    return isinstance(conversion, WeightConverter) and any(".experts." in p for p in conversion.target_patterns)
