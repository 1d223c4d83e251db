"""PolarExperts: a mixture of experts served from their quantised weights."""

import torch
from torch import nn

from polar_kernels import ops
from polar_kernels.errors import ArgumentError, PolarError
from polar_kernels.module import PolarModule, cast_for_autocast
from polar_kernels.quantize import quantize_weight
from polar_kernels.weight import PolarWeight


class PolarExpertProjection(PolarModule):
    """One projection of all experts, weights [E, N, K] that share awq_scales.

    Its buffers and its state dict are those of `PolarModule`, packed and norms with a dimension [E] in front. As one
    weight, in `polar_weight` and `dequantize_into`, it is [E * N, K], an expert's rows after the other's. On every
    device it stays in its stored form.
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
        super().__init__(num_experts * out_features, in_features, bits, awq, device)
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        self._to_stack(*self._stored())

    @classmethod
    def from_weight(cls, weight: PolarWeight, num_experts: int) -> "PolarExpertProjection":
        """A projection around already quantised weights [E * N, K]; tensors are shared, not copied."""
        rows = weight.out_features // num_experts
        layer = cls(num_experts, weight.in_features, rows, bits=weight.bits, device="meta")
        layer._set_weight(weight)
        layer._to_stack(weight.packed, weight.norms)
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

    def _to_stack(self, packed: torch.Tensor, norms: torch.Tensor) -> None:
        shape = (self.num_experts, self.out_features, -1)
        self.packed, self.norms = packed.view(shape), norms.view(shape)

    def _multiplies(self) -> bool:
        return False  # from tile layout

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
    NaN.

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

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        parts = [
            part for p in (self.gate_up_proj, self.down_proj) for part in (p.packed, p.norms, p.awq_scales, p.centroids)
        ]
        return ops.experts(cast_for_autocast(hidden_states), top_k_index, top_k_weights, *parts)


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
