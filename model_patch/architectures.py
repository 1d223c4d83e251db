"""Which layers of which architecture are quantised, and which of them read the same activation.

Everything is decided by the name, which is the same in a module tree and in a checkpoint but for its prefix.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from model_patch.errors import UnsupportedModelError

# model_type in config.json -> what people call it
SUPPORTED = {
    "qwen2": "Qwen2, Qwen2.5",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3": "Qwen3",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_moe": "Qwen3-MoE",
    "qwen3_5_text": "Qwen3.5, text only",
    "qwen3_5": "Qwen3.5",
    "qwen3_5_moe_text": "Qwen3.5-MoE, text only",
    "qwen3_5_moe": "Qwen3.5-MoE",
}

_EXPERTS = "mlp.experts"

# Block -> projection -> the activation it reads. Projections of one site share their AWQ scales and their rotation.
_PROJECTIONS = {
    "self_attn": {"q_proj": "in", "k_proj": "in", "v_proj": "in", "o_proj": "out"},
    "linear_attn": {"in_proj_qkv": "in", "in_proj_z": "in", "out_proj": "out"},
    "mlp": {"gate_proj": "in", "up_proj": "in", "down_proj": "out"},
    "mlp.shared_expert": {"gate_proj": "in", "up_proj": "in", "down_proj": "out"},
    _EXPERTS: {"gate_up_proj": "in", "down_proj": "out"},
}
_LAYER = re.compile(r"layers\.(\d+)\.([\w.]+)\.(\w+)")

# Why a linear layer, embedding or convolution outside the table stays as it is; the first match is reported.
_KEPT = (
    (re.compile(r"(^|\.)(visual|vision_tower)\."), "vision tower"),
    (re.compile(r"^mtp\."), "multi-token prediction head"),
    (re.compile(r"\.in_proj_[ab]$"), "decay and beta gates of GatedDeltaNet"),
    (re.compile(r"\.conv1d$"), "short convolution"),
    (re.compile(r"\.shared_expert_gate$"), "gate of the shared expert"),
)


class Kind(Enum):
    """EXPERTS: one projection of all experts of a layer, a weight [E, N, K]."""

    LINEAR = "linear"
    EXPERTS = "experts"
    HEAD = "head"
    EMBEDDING = "embedding"


@dataclass(frozen=True)
class Role:
    """What a quantisable weight is: its kind and, for those that read an activation, the input site it shares."""

    kind: Kind
    site: str | None


def canonical(name: str) -> str:
    """A module or tensor name without the prefixes that differ between text-only and vision-language models."""
    return re.sub(r"^(model\.)?(language_model\.)?(model\.)?", "", name)


def role_of(name: str) -> Role | None:
    """The role of the module `name`, or None when it is not one that is quantised."""
    short = canonical(name)
    if short == "embed_tokens":
        return Role(Kind.EMBEDDING, None)
    if short == "lm_head":
        return Role(Kind.HEAD, "lm_head")
    match = _LAYER.fullmatch(short)
    if match is None or match[3] not in _PROJECTIONS.get(match[2], {}):
        return None
    kind = Kind.EXPERTS if match[2] == _EXPERTS else Kind.LINEAR
    return Role(kind, f"layers.{match[1]}.{match[2]}.{_PROJECTIONS[match[2]][match[3]]}")


def kind_of(name: str) -> Kind | None:
    """The kind of the layer `name`, or None when it is not one that is quantised."""
    role = role_of(name)
    return None if role is None else role.kind


def weight_name(name: str) -> str:
    """The plain weight of the layer `name`, in a model and in a checkpoint: the layer itself where it is experts."""
    return name if kind_of(name) is Kind.EXPERTS else f"{name}.weight"


def keep_reason(name: str) -> str:
    """Why the module `name`, which has no role, is left in its dtype."""
    short = canonical(name)
    return next((reason for pattern, reason in _KEPT if pattern.search(short)), "not a projection of the decoder")


def check_model_type(model_type: object) -> str:
    """Return `model_type`, or raise `UnsupportedModelError` with the list of those that are known."""
    if not isinstance(model_type, str) or model_type not in SUPPORTED:
        known = ", ".join(f"{key} ({name})" for key, name in SUPPORTED.items())
        raise UnsupportedModelError(f"architecture {model_type!r} is not supported; known are {known}")
    return model_type


def is_vision_language(model_type: str) -> bool:
    return model_type in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_5_moe")


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of each linear layer and embedding of a model.

    bits: name -> bits, of those to quantise, in the order given. A tied head is not among them: it is the embedding.
    kept: name -> reason, of all others.
    tied_head: name of the head that shares the embedding's quantised tensors, or None.
    """

    bits: dict[str, int] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    tied_head: str | None = None

    def sites(self) -> dict[str, list[str]]:
        """Input site -> names of the quantised layers that read it."""
        found: dict[str, list[str]] = {}
        for name in self.bits:
            role = role_of(name)
            if role is not None and role.site is not None:
                found.setdefault(role.site, []).append(name)
        return found


def names_of_kind(names: Iterable[str], kind: Kind) -> list[str]:
    return [name for name in names if kind_of(name) is kind]
