"""PolarLinear: `nn.Linear` served from its quantised weight."""

import torch
from torch import nn

from polar_kernels.errors import ArgumentError
from polar_kernels.group import PolarGroup
from polar_kernels.module import PolarModule
from polar_kernels.quantize import quantize_weight
from polar_kernels.weight import PolarWeight


class PolarLinear(PolarModule):
    """A drop-in for `nn.Linear`: y = x @ W_hat^T + bias without ever holding W_hat.

    x: [..., in_features] in fp16, bf16 or fp32, on the layer's device; y: [..., out_features] in x's dtype (under
    autocast, in autocast's). Differentiable in x and bias.

    Raises: ArgumentError for a wrong shape, dtype or device.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 5,
        awq: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """An all-zero layer to load a state dict into. `awq` says whether it has awq_scales; `dtype` is the bias's."""
        self._place: tuple[PolarGroup, int] | None = None  # a tuple, so that the group is not registered as a child
        super().__init__(out_features, in_features, bits, awq, device)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_weight(cls, weight: PolarWeight, bias: torch.Tensor | None = None) -> "PolarLinear":
        """A layer around an already quantised weight; tensors are shared, not copied."""
        layer = cls(weight.in_features, weight.out_features, bias=False, bits=weight.bits, device="meta")
        layer._set_weight(weight)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
        return layer

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        bits: int = 5,
        *,
        awq_scales: torch.Tensor | None = None,
        centroids: torch.Tensor | None = None,
    ) -> "PolarLinear":
        """Quantise a linear layer on its device; see `quantize_weight` for the options and errors."""
        weight = quantize_weight(linear.weight.detach(), bits, awq_scales=awq_scales, centroids=centroids)
        return cls.from_weight(weight, linear.bias).train(linear.training)

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """W_hat [out_features, in_features], a new tensor."""
        return self._dense(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._place is not None and self._place[0].is_merged:
            group, index = self._place
            return group.output_of(index, x)
        return self.multiply_alone(x)

    def multiply_alone(self, x: torch.Tensor) -> torch.Tensor:
        """The product whether or not the layer is in a group."""
        return self.multiply(x, self.bias)

    def join(self, group: PolarGroup, index: int) -> None:
        """Become member `index` of a group. Raises ArgumentError for a layer that is in one already."""
        if self._place is not None:
            raise ArgumentError("the layer is in a group already: dissolve that one first")
        self._place = group, index

    def leave(self) -> None:
        self._place = None

    @property
    def group(self) -> PolarGroup | None:
        """The group the layer is in."""
        return None if self._place is None else self._place[0]

    def settle(self) -> None:
        super().settle()
        if self._place is not None:
            group, index = self._place
            group.member_changed(index)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, awq={self.awq_scales is not None}, activation={self.activation}"
        )
