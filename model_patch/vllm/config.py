"""The checkpoint's config as vLLM wants it: which method serves which of vLLM's layers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from model_patch.architectures import Kind, canonical, kind_of
from model_patch.config import METHOD, PolarQuantConfig, matches
from model_patch.errors import CheckpointError, ConfigError
from model_patch.vllm.versions import check_version

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_MIN_CAPABILITY = 80  # bf16 in Triton's dot
_EXPERTS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class QuantizedWeight:
    """What a method must know of the weight it serves. name: for messages; levels: the table, of 2^bits; awq: whether
    there are awq_scales."""

    name: str
    levels: tuple[float, ...]
    awq: bool

    @property
    def bits(self) -> int:
        return len(self.levels).bit_length() - 1

    def centroids(self, device: torch.device) -> torch.Tensor:
        return torch.tensor(self.levels, dtype=torch.float32, device=device)


class VllmPolarConfig(QuantizationConfig):
    """`quantization_config` of config.json, and the layers of the checkpoint it belongs to.

    bits: canonical layer name -> bits; levels: bits -> table. Both come from the headers of the checkpoint, which are
    compared with the model first, so that nothing is missing, left over or of another shape when vLLM, which would
    not notice, reads the tensors. They are plain numbers, since this is sent to every worker.
    """

    def __init__(self, stated: PolarQuantConfig) -> None:
        super().__init__()
        self.stated = stated
        self.bits: dict[str, int] = {}
        self.levels: dict[int, tuple[float, ...]] = {}
        self.tied_head = False
        self._read = False

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "VllmPolarConfig":
        """Raises ConfigError for an unknown key, version or value."""
        check_version()
        return cls(PolarQuantConfig(**config))

    def maybe_update_config(
        self, model_name: str, hf_config: "PreTrainedConfig | None" = None, revision: str | None = None
    ) -> None:
        """Read the headers of the checkpoint `model_name`, a folder or a Hub name.

        Raises CheckpointError listing all that is wrong with them.
        """
        from model_patch.load import find_headers
        from model_patch.stored import open_quantized

        stored = open_quantized(*find_headers(model_name, revision))
        self.bits = {canonical(name): bits for name, bits in stored.bits.items()}
        self.levels = {bits: tuple(table.tolist()) for bits, table in stored.tables.items()}
        self.tied_head = stored.tied_head is not None
        self._read = True

    def get_quant_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        """The method for one of vLLM's layers; None leaves an embedding, a head or experts as they are.

        Raises ConfigError where vLLM merges layers that are not quantised alike.
        """
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        from model_patch.vllm.embedding import PolarEmbeddingMethod, TiedHeadMethod
        from model_patch.vllm.experts import PolarExpertsMethod
        from model_patch.vllm.linear import PolarLinearMethod

        if not self._read:
            raise CheckpointError(prefix, "vLLM has not said which checkpoint this layer is of")
        if isinstance(layer, RoutedExperts):
            found = [self._weight([f"{prefix}.{leaf}"]) for leaf in _EXPERTS]
            gate_up, down = found
            return PolarExpertsMethod(layer.moe_config, gate_up, down) if gate_up and down else None
        if isinstance(layer, ParallelLMHead):
            if self.tied_head and kind_of(prefix) is Kind.HEAD:
                return TiedHeadMethod()
            weight = self._weight([prefix])
            return PolarLinearMethod(weight) if weight else None
        if isinstance(layer, VocabParallelEmbedding):
            weight = self._weight([prefix or "embed_tokens"])  # Qwen3.5's is not told its name
            return PolarEmbeddingMethod(weight, self.tied_head) if weight else None
        if isinstance(layer, LinearBase):
            weight = self._weight(self._merged(prefix))
            return PolarLinearMethod(weight) if weight else UnquantizedLinearMethod()
        return None

    def _merged(self, prefix: str) -> list[str]:
        """The checkpoint's names of the layers that vLLM has merged into its layer `prefix`."""
        parent, _, leaf = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(leaf, [leaf])
        return [f"{parent}.{part}" if parent else part for part in parts]

    def _weight(self, names: list[str]) -> QuantizedWeight | None:
        """What the layers `names`, merged into one, have in common; None when none is quantised."""
        bits = [self.bits.get(canonical(name)) for name in names]
        if len(set(bits)) > 1:
            found = ", ".join(f"{name}: {b or 'not quantised'}" for name, b in zip(names, bits, strict=True))
            raise ConfigError(
                f"vLLM multiplies by these layers as one, so that they must have the same bits; found {found}"
            )
        if bits[0] is None:
            self._check_plain(names)
            return None
        awq = self.stated.awq and kind_of(names[0]) is not Kind.EMBEDDING
        return QuantizedWeight(" + ".join(names), self.levels[bits[0]], awq)

    def _check_plain(self, names: list[str]) -> None:
        """Raise CheckpointError where layers would be quantised if transformers' model of this config had them: vLLM
        does not miss their tensors, and would compute with what is in memory."""
        patterns = self.stated.modules_to_not_convert
        for name in names:
            if kind_of(name) is Kind.LINEAR and not any(matches(pattern, name) for pattern in patterns):
                raise CheckpointError("config.json", f"vLLM builds a layer {name} that the checkpoint does not have")

    @classmethod
    def get_name(cls) -> Any:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return _MIN_CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []
