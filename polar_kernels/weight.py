"""The stored form of one weight: packed codes, block norms, AWQ scales and the table of levels."""

from dataclasses import dataclass

import torch

from polar_kernels.codebook import bits_of
from polar_kernels.errors import ArgumentError
from polar_kernels.hadamard import BLOCK_SIZE, padded_size
from polar_kernels.packing import packed_size


@dataclass(frozen=True)
class PolarWeight:
    """A quantised weight W [N, K]; N = out_features (rows), K = in_features.

    packed: uint8 [N, Kp * bits / 8], Kp = K rounded up to 128s, codes LSB-first.
    norms: fp16 [N, Kp / 128], the scale of each block.
    awq_scales: fp16 [K] the weight's columns were multiplied by, or None for all ones.
    centroids: fp32 [2^bits], the levels in units of the rotated, normalised coordinates.

    Raises ArgumentError where a dtype or shape disagrees.
    """

    packed: torch.Tensor
    norms: torch.Tensor
    awq_scales: torch.Tensor | None
    centroids: torch.Tensor
    in_features: int

    def __post_init__(self) -> None:
        check_weight(self.packed, self.norms, self.awq_scales, self.centroids, self.in_features)

    @property
    def bits(self) -> int:
        return bits_of(self.centroids)

    @property
    def out_features(self) -> int:
        return self.packed.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes on disk; the table is shared by a whole checkpoint and not counted."""
        tensors = [self.packed, self.norms] + ([] if self.awq_scales is None else [self.awq_scales])
        return sum(t.nbytes for t in tensors)


def check_weight(
    packed: torch.Tensor,
    norms: torch.Tensor,
    awq_scales: torch.Tensor | None,
    centroids: torch.Tensor,
    in_features: int,
) -> None:
    """Raise ArgumentError unless the parts agree in dtype, shape and device. Looks at no value."""
    bits, blocks = bits_of(centroids), padded_size(in_features) // BLOCK_SIZE
    expect("centroids", centroids, torch.float32, (1 << bits,))
    rows = packed.shape[0] if packed.dim() == 2 else "N"
    expect("packed", packed, torch.uint8, (rows, packed_size(blocks * BLOCK_SIZE, bits)))
    expect("norms", norms, torch.float16, (rows, blocks))
    if awq_scales is not None:
        expect("awq_scales", awq_scales, torch.float16, (in_features,))
    for name, part in (("norms", norms), ("awq_scales", awq_scales), ("centroids", centroids)):
        if part is not None and part.device != packed.device:
            raise ArgumentError(f"{name} is on {part.device} and packed on {packed.device}; move them together")


def expect(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[object, ...]) -> None:
    """Raise ArgumentError unless the tensor is contiguous and of this dtype and shape."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ArgumentError(f"{name} must be {dtype} {list(shape)}, found {tensor.dtype} {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ArgumentError(f"{name} must be contiguous, found strides {tensor.stride()}: call .contiguous() once")
