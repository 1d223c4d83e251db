"""What is measured: each provider makes weights of a shape, multiplies by one, and says how wrong it may be."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch.nn import functional as F

from polar_kernels import PolarLinear, PolarWeight, lloyd_max_levels
from polar_kernels.packing import packed_size

Call = Callable[[torch.Tensor], torch.Tensor]


class Provider(ABC):
    """A way to multiply by a weight [N, K]."""

    name: str
    mode: str
    max_error: float  # relative, against the product with the dense weight it stands for
    min_rows, max_rows = 1, 1 << 30

    @abstractmethod
    def bytes(self, rows: int, columns: int) -> int:
        """Bytes of one weight as this provider reads it."""

    @abstractmethod
    def make(self, rows: int, columns: int) -> tuple[Call, Callable[[], torch.Tensor]]:
        """A call x -> y on a fresh random weight, and a function giving that weight densely."""


class Cublas(Provider):
    """bf16 through `F.linear`."""

    name, mode, max_error = "cuBLAS", "bf16", 0.01

    def bytes(self, rows: int, columns: int) -> int:
        return 2 * rows * columns

    def make(self, rows: int, columns: int) -> tuple[Call, Callable[[], torch.Tensor]]:
        weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
        return (lambda x: F.linear(x, weight)), (lambda: weight)


class Polar(Provider):
    """This package, rotation of the activation included."""

    def __init__(self, mode: str, bits: int = 5) -> None:
        self.name, self.mode, self.bits = f"polar {bits}-bit", mode, bits
        self.max_error = 0.012 if mode == "int8" else 0.004

    def bytes(self, rows: int, columns: int) -> int:
        return rows * (packed_size(columns, self.bits) + columns // 64)

    def make(self, rows: int, columns: int) -> tuple[Call, Callable[[], torch.Tensor]]:
        layer = random_layer(rows, columns, self.bits)
        layer.activation = self.mode  # type: ignore[assignment]
        return layer, layer.dequantize


class Tinygemm(Provider):
    """torch's int4 kernel, groups of 128; 4 bits and a scale and zero point a group."""

    name, mode, max_error = "tinygemm", "int4", 0.01
    max_rows = 64  # it is a decoding kernel

    def bytes(self, rows: int, columns: int) -> int:
        return rows * columns // 2 + rows * columns // 128 * 4

    def make(self, rows: int, columns: int) -> tuple[Call, Callable[[], torch.Tensor]]:
        codes = torch.randint(0, 16, (rows, columns), device="cuda", dtype=torch.int32)
        packed = torch._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), 8)
        scales = torch.rand(columns // 128, rows, 2, device="cuda", dtype=torch.bfloat16)

        def dense() -> torch.Tensor:
            groups = (codes.view(rows, -1, 128) - 8).bfloat16()
            scale, zero = scales.unbind(-1)
            return (groups * scale.T[..., None] + zero.T[..., None]).view(rows, columns)

        return (lambda x: torch._weight_int4pack_mm(x, packed, 128, scales)), dense


def random_layer(rows: int, columns: int, bits: int = 5) -> PolarLinear:
    """A layer of random codes, on the GPU."""
    blocks = columns // 128
    packed = torch.randint(0, 256, (rows, packed_size(columns, bits)), device="cuda", dtype=torch.uint8)
    norms = torch.rand(rows, blocks, device="cuda").add(0.5).half()
    table = lloyd_max_levels(bits).cuda()
    return PolarLinear.from_weight(PolarWeight(packed, norms, None, table, columns))


def providers() -> list[Provider]:
    return [Cublas(), Polar("int8"), Polar("exact"), Polar("int8", bits=4), Tinygemm()]
