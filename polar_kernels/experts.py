"""PolarExperts: a mixture of experts served from their quantised weights."""

import torch
from torch import nn

from polar_kernels import ops
from polar_kernels.errors import ArgumentError, PolarError
from polar_kernels.module import Activation, PolarModule, cast_for_autocast
from polar_kernels.quantize import quantize_weight
from polar_kernels.tiles import TILE_ROWS, is_tileable
from polar_kernels.weight import PolarWeight


class PolarExpertProjection(PolarModule):
    """One projection of all experts, weights [E, N, K] that share awq_scales.

    Its buffers and its state dict are those of `PolarModule`, packed and norms with a dimension [E] in front. As one
    weight, in `polar_weight` and `dequantize_into`, it is [E * N, K], an expert's rows after the other's. It takes tile
    layout once it is one of two in `PolarExperts`, and if both can: their rows N must be multiples of 32.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        *,
        bits: int = 5,
        awq: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        """All-zero weights to load a state dict into."""
        self._partner: tuple[PolarExpertProjection, ...] = ()  # not registered as a child
        super().__init__(num_experts * out_features, in_features, bits, awq, device)
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        self.packed, self.norms = self._stored()

    @classmethod
    def from_weight(cls, weight: PolarWeight, num_experts: int) -> "PolarExpertProjection":
        """A projection around already quantised weights [E * N, K]; tensors are shared, not copied."""
        rows = weight.out_features // num_experts
        layer = cls(num_experts, weight.in_features, rows, bits=weight.bits, device="meta")
        layer._set_weight(weight)
        return layer

    @classmethod
    def from_dense(
        cls, weight: torch.Tensor, bits: int = 5, *, awq_scales: torch.Tensor | None = None
    ) -> "PolarExpertProjection":
        """Quantise weights [E, N, K] on their device; see `quantize_experts`."""
        return cls.from_weight(quantize_experts(weight, bits, awq_scales=awq_scales), weight.shape[0])

    @property
    def polar_weight(self) -> PolarWeight:
        packed, norms = (part.flatten(0, 1) for part in self._stored())
        return PolarWeight(packed, norms, self.awq_scales, self.centroids, self._columns)

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """W_hat [E, N, K], a new tensor."""
        return self._dense(dtype).unflatten(0, (self.num_experts, self.out_features))

    def join(self, partner: "PolarExpertProjection") -> None:
        """Be multiplied by together with `partner`: on a GPU that has tile layout, take it."""
        self._partner = (partner,)
        self.settle()

    def settle(self) -> None:
        super().settle()
        for partner in self._partner:
            if (self.tiles is None) != (partner.tiles is None):  # it may have settled before this one could
                PolarModule.settle(partner)

    def _stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        packed, norms = super()._stored()
        shape = (self.num_experts, self.out_features, -1)
        return packed.view(shape), norms.view(shape)

    def _multiplies(self) -> bool:
        return bool(self._partner) and self._fits_tiles() and self._partner[0]._fits_tiles()

    def _fits_tiles(self) -> bool:
        """Whether an expert's rows fill tiles, so that the next one's begin with a tile."""
        return self.out_features % TILE_ROWS == 0 and not self.centroids.is_meta and is_tileable(self.centroids)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bits={self.bits}, awq={self.awq_scales is not None}"
        )


class PolarExperts(nn.Module):
    """The experts of a mixture: for each token the sum over its k experts e of weight * down[e](silu(gate) * up), where
    gate_up[e] gives gate and then up.

    hidden_states: [T, H] in fp16, bf16 or fp32; top_k_index: int [T, k]; top_k_weights: float [T, k]; result: [T, H] in
    the dtype of hidden_states (under autocast, in autocast's). A NaN stays in the row of its token. A gradient is
    refused. An index outside 0..E-1 raises IndexError on a CPU; on a GPU, where that cannot be seen, its token's row is
    NaN. activation: as `PolarModule`'s, of both projections.

    Raises: ArgumentError for a wrong shape, dtype or device.
    """

    def __init__(self, gate_up_proj: PolarExpertProjection, down_proj: PolarExpertProjection) -> None:
        """gate_up_proj: [E, 2 * I, H]; down_proj: [E, H, I]."""
        super().__init__()
        given, found = (p.num_experts for p in (gate_up_proj, down_proj))
        shapes = (gate_up_proj.out_features, gate_up_proj.in_features), (down_proj.out_features, down_proj.in_features)
        if given != found or shapes[0] != (2 * down_proj.in_features, down_proj.out_features):
            raise ArgumentError(
                "gate_up_proj must be [E, 2 * I, H] and down_proj [E, H, I], "
                f"found {[given, *shapes[0]]} and {[found, *shapes[1]]}"
            )
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj
        gate_up_proj.join(down_proj)
        down_proj.join(gate_up_proj)

    @property
    def activation(self) -> Activation:
        return "exact" if "exact" in (self.gate_up_proj.activation, self.down_proj.activation) else "int8"

    @activation.setter
    def activation(self, activation: Activation) -> None:
        self.gate_up_proj.activation = self.down_proj.activation = activation

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        gate_up, down = self.gate_up_proj, self.down_proj
        routed = (cast_for_autocast(hidden_states), top_k_index, top_k_weights)
        if gate_up.tiles is not None:
            parts = [
                part for p in (gate_up, down)
                for part in (p.tiles, p.tile_norms, p.awq_scales, p.level_table, p.centroids)
            ]  # fmt: skip
            exact = self.activation == "exact"
            return ops.tiled_experts(*routed, *parts, gate_up.num_experts, down.in_features, exact)
        parts = [part for p in (gate_up, down) for part in (p.packed, p.norms, p.awq_scales, p.centroids)]
        return ops.experts(*routed, *parts)


def quantize_experts(
    weight: torch.Tensor,
    bits: int = 5,
    *,
    awq_scales: torch.Tensor | None = None,
    moments: torch.Tensor | None = None,
) -> PolarWeight:
    """Quantise weights [E, N, K] one at a time, on their device, to one weight [E * N, K]; awq_scales, of all experts,
    moments, of all or [E, K, K] of each, and errors as `quantize_weight`'s, with the number of the expert in front."""
    if weight.dim() != 3 or not len(weight):
        raise ArgumentError(f"weight must be [E, N, K] with E > 0, found {list(weight.shape)}")
    each = [moments] * len(weight) if moments is None or moments.dim() != 3 else list(moments)
    if len(each) != len(weight):
        raise ArgumentError(f"moments of each expert must be [{len(weight)}, K, K], found {len(each)} of them")
    made = []
    for expert, single in enumerate(weight):
        try:
            made.append(quantize_weight(single, bits, awq_scales=awq_scales, moments=each[expert]))
        except PolarError as error:
            raise type(error)(f"expert {expert}: {error}") from error
    packed, norms = (torch.cat([getattr(part, name) for part in made]) for name in ("packed", "norms"))
    return PolarWeight(packed, norms, made[0].awq_scales, made[0].centroids, weight.shape[2])
