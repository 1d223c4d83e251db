"""What the layers share: the stored weight as buffers, whose dtypes survive `.to()`, and no bf16 weight."""

from collections.abc import Callable

import torch
from torch import nn

from polar_kernels.codebook import bits_of, lloyd_max_levels
from polar_kernels.errors import PolarError
from polar_kernels.hadamard import BLOCK_SIZE, padded_size
from polar_kernels.packing import packed_size
from polar_kernels.weight import PolarWeight

# Bit patterns and scales: a model's `.to(bfloat16)` must not touch them.
_STORED_DTYPES = {
    "packed": torch.uint8,
    "norms": torch.float16,
    "awq_scales": torch.float16,
    "centroids": torch.float32,
}


class NoDenseWeightError(PolarError, AttributeError):
    """Something asked a quantised layer for the bf16 weight it does not have."""


class PolarModule(nn.Module):
    """A module that holds one weight [rows, columns] in its stored form.

    Buffers (all in the state dict): packed uint8 [rows, Kp * bits / 8], norms fp16 [rows, Kp / 128], centroids fp32
    [2^bits], and awq_scales fp16 [columns] or None.
    """

    packed: torch.Tensor
    norms: torch.Tensor
    awq_scales: torch.Tensor | None
    centroids: torch.Tensor

    def __init__(self, rows: int, columns: int, bits: int, awq: bool, device: torch.device | str | None) -> None:
        super().__init__()
        blocks = padded_size(columns) // BLOCK_SIZE
        size = packed_size(blocks * BLOCK_SIZE, bits)
        self.register_buffer("packed", torch.zeros(rows, size, dtype=torch.uint8, device=device))
        self.register_buffer("norms", torch.zeros(rows, blocks, dtype=torch.float16, device=device))
        scales = torch.ones(columns, dtype=torch.float16, device=device) if awq else None
        self.register_buffer("awq_scales", scales)
        self.register_buffer("centroids", lloyd_max_levels(bits).to(device, copy=True))

    def _set_weight(self, weight: PolarWeight) -> None:
        self.packed, self.norms, self.awq_scales = weight.packed, weight.norms, weight.awq_scales
        self.centroids = weight.centroids

    def _polar_weight(self, in_features: int) -> PolarWeight:
        return PolarWeight(self.packed, self.norms, self.awq_scales, self.centroids, in_features)

    @property
    def bits(self) -> int:
        return bits_of(self.centroids)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "PolarModule":
        def move(tensor: torch.Tensor) -> torch.Tensor:
            """`fn`'s device with the stored dtype; a cast is not undone (it has already rounded) but not made."""
            target = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            return fn(tensor) if target.dtype == tensor.dtype else tensor.to(target.device)

        stored = {name: self._buffers.pop(name) for name in _STORED_DTYPES}
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update({n: t if t is None else move(t) for n, t in stored.items()})
        return self

    def __getattr__(self, name: str) -> torch.Tensor | nn.Module:
        if name == "weight" and name not in self._parameters:
            raise NoDenseWeightError(
                f"{type(self).__name__} holds {self.bits}-bit codes and no dense weight: "
                "call .dequantize(dtype) for one, or leave this layer unquantised"
            )
        return super().__getattr__(name)


def cast_for_autocast(x: torch.Tensor) -> torch.Tensor:
    """What autocast would do to the input of `nn.Linear`: it cannot see into our operators."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
