"""`quantization_config` of config.json: what a PolarQuant checkpoint says of itself, and how to ask for one."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from model_patch.architectures import Kind, LayerPlan, canonical, keep_reason, names_of_kind, role_of
from model_patch.errors import ConfigError
from polar_kernels.codebook import MAX_BITS, MIN_BITS
from polar_kernels.hadamard import BLOCK_SIZE

METHOD = "polarquant"
FORMAT_VERSION = 1
BIT_ORDER = "lsb"


class PolarQuantConfig(QuantizationConfigMixin):
    """How a model's layers are quantised.

    bits: 2 to 8, for every layer that `bits_per_layer` does not name.
    bits_per_layer: pattern -> bits; a later match overrides an earlier one.
    modules_to_not_convert: patterns of layers left in their dtype, among those that would be quantised.
    awq: whether every quantised linear layer that is not tied to the embedding carries `awq_scales`.

    Patterns are layer names with the shell's wildcards; a `model.` or `model.language_model.` prefix does not matter.
    Excluding one projection of a layer's experts excludes both.
    The other arguments exist to be written to and checked in config.json; each has one valid value.

    Raises ConfigError for an unknown key or value.
    """

    def __init__(
        self,
        bits: int = 5,
        bits_per_layer: Mapping[str, int] | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
        awq: bool = False,
        block_size: int = BLOCK_SIZE,
        bit_order: str = BIT_ORDER,
        format_version: int = FORMAT_VERSION,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ConfigError(f"quantization_config has unknown keys {sorted(unknown)}; a newer version may know them")
        _check_constant("quant_method", quant_method, METHOD)
        _check_constant("format_version", format_version, FORMAT_VERSION)
        _check_constant("block_size", block_size, BLOCK_SIZE)
        _check_constant("bit_order", bit_order, BIT_ORDER)
        if not isinstance(awq, bool):
            raise ConfigError(f"quantization_config.awq must be true or false, found {awq!r}")
        self.quant_method = METHOD
        self.format_version, self.block_size, self.bit_order = FORMAT_VERSION, BLOCK_SIZE, BIT_ORDER
        self.bits = _check_bits("bits", bits)
        self.bits_per_layer = _check_bits_per_layer(bits_per_layer)
        self.modules_to_not_convert = _check_patterns(modules_to_not_convert)
        self.awq = awq

    def to_dict(self) -> dict[str, Any]:
        """What is written to config.json."""
        return {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "bits": self.bits,
            "bits_per_layer": dict(self.bits_per_layer),
            "block_size": self.block_size,
            "bit_order": self.bit_order,
            "awq": self.awq,
            "modules_to_not_convert": list(self.modules_to_not_convert),
        }

    def plan(self, names: Iterable[str], tied: bool) -> LayerPlan:
        """Decide for each of `names`, a model's linear layers and embeddings.

        tied: whether the head shares the embedding's weight; the pair is then one tensor, quantised or left together.
        Raises ConfigError when a pattern matches none of the layers that could be quantised.
        """
        names = list(names)
        eligible = [name for name in names if role_of(name) is not None]
        patterns = [*self.modules_to_not_convert, *self.bits_per_layer]
        if unmatched := [p for p in patterns if not any(matches(p, name) for name in eligible)]:
            raise ConfigError(f"patterns {unmatched} match no layer that could be quantised; see `polar inspect`")
        plan = LayerPlan(kept={name: keep_reason(name) for name in names if role_of(name) is None})
        for name in eligible:
            if any(matches(pattern, name) for pattern in self.modules_to_not_convert):
                plan.kept[name] = "excluded"
            else:
                plan.bits[name] = self.bits_for(name)
        plan = _pair_experts(plan)
        return _tie(plan) if tied else plan

    def bits_for(self, name: str) -> int:
        """Bits of the layer `name`."""
        chosen = [bits for pattern, bits in self.bits_per_layer.items() if matches(pattern, name)]
        return chosen[-1] if chosen else self.bits

    def resolved(self, plan: LayerPlan, awq: bool) -> "PolarQuantConfig":
        """This config with its patterns replaced by the names they chose: what a checkpoint states."""
        excluded = [name for name, reason in plan.kept.items() if reason == "excluded"]
        special = {name: bits for name, bits in plan.bits.items() if bits != self.bits}
        return PolarQuantConfig(self.bits, special, excluded, awq)


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern means the module `name`, whatever prefix either has for the language model of others.

    A wildcard that follows a prefix stays below it: "model.*" does not mean the head beside the model.
    """
    if fnmatchcase(name, pattern):
        return True
    short, rest = canonical(name), canonical(pattern)
    if rest != pattern and short == name and any(sign in rest.partition(".")[0] for sign in "*?["):
        return False
    return fnmatchcase(short, rest)


def _pair_experts(plan: LayerPlan) -> LayerPlan:
    """Leave out the experts of whose two projections one is excluded: a layer computes with both."""
    excluded = {name.rpartition(".")[0] for name in names_of_kind(plan.kept, Kind.EXPERTS)}
    left_out = [name for name in names_of_kind(plan.bits, Kind.EXPERTS) if name.rpartition(".")[0] in excluded]
    bits = {name: b for name, b in plan.bits.items() if name not in left_out}
    return LayerPlan(bits, plan.kept | dict.fromkeys(left_out, "excluded"))


def _tie(plan: LayerPlan) -> LayerPlan:
    """Make the head follow the embedding it shares its weight with."""
    heads = names_of_kind([*plan.bits, *plan.kept], Kind.HEAD)
    embedded = names_of_kind(plan.bits, Kind.EMBEDDING)
    shared = heads[0] if heads and heads[0] not in plan.kept and embedded else None
    bits = {name: b for name, b in plan.bits.items() if name not in heads and (shared or name not in embedded)}
    left_out = [name for name in plan.bits if name not in bits and name != shared]
    kept = plan.kept | dict.fromkeys(left_out, "tied to a weight that is excluded")
    return LayerPlan(bits, kept, shared)


def _check_constant(key: str, value: object, expected: object) -> None:
    if type(value) is not type(expected) or value != expected:
        raise ConfigError(f"quantization_config.{key} must be {expected!r} for this version, found {value!r}")


def _check_bits(key: str, bits: object) -> int:
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise ConfigError(f"quantization_config.{key} must be an integer from {MIN_BITS} to {MAX_BITS}, found {bits!r}")
    return bits


def _check_bits_per_layer(value: object) -> dict[str, int]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"quantization_config.bits_per_layer must map layer names to bits, found {value!r}")
    return {key: _check_bits(f"bits_per_layer[{key!r}]", bits) for key, bits in value.items()}


def _check_patterns(value: object) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
        raise ConfigError(f"quantization_config.modules_to_not_convert must be a list of names, found {value!r}")
    return list(value)
