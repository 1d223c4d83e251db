"""What the layers share: the stored weight as buffers, whose dtypes survive `.to()`, and no bf16 weight."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from polar_kernels import ops
from polar_kernels.codebook import bits_of, lloyd_max_levels
from polar_kernels.errors import ArgumentError, PolarError
from polar_kernels.hadamard import BLOCK_SIZE, padded_size
from polar_kernels.packing import packed_size
from polar_kernels.tiles import is_tileable, level_table, tile_weight, untile_weight
from polar_kernels.weight import PolarWeight

Activation = Literal["int8", "exact"]

# Bit patterns and scales, whose dtypes a model's `.to(bfloat16)` must not touch.
_STORED = ("packed", "norms", "awq_scales", "centroids")
_TILED = ("tiles", "tile_norms", "level_table")


class NoDenseWeightError(PolarError, AttributeError):
    """Something asked a quantised layer for the bf16 weight it does not have."""


class TiledWeight(NamedTuple):
    """A weight as kernels of the tile layout read it."""

    tiles: torch.Tensor
    tile_norms: torch.Tensor
    awq_scales: torch.Tensor | None
    level_table: torch.Tensor


class PolarModule(nn.Module):
    """A module that holds one weight [rows, columns].

    In the state dict it is in its stored form: packed uint8 [rows, Kp * bits / 8], norms fp16 [rows, Kp / 128],
    centroids fp32 [2^bits], and awq_scales fp16 [columns] where there are some. These are the buffers too, except on a
    GPU that multiplies from tile layout (`tiles.py`): there packed and norms are None, and tiles and tile_norms hold
    the same bits, rearranged once by `settle` and put back whenever the weight leaves the GPU or is saved.
    """

    packed: torch.Tensor | None
    norms: torch.Tensor | None
    awq_scales: torch.Tensor | None
    centroids: torch.Tensor
    tiles: torch.Tensor | None
    tile_norms: torch.Tensor | None
    level_table: torch.Tensor | None

    def __init__(self, rows: int, columns: int, bits: int, awq: bool, device: torch.device | str | None) -> None:
        super().__init__()
        self._activation: Activation = "int8"
        self._rows, self._columns = rows, columns
        blocks = padded_size(columns) // BLOCK_SIZE
        size = packed_size(blocks * BLOCK_SIZE, bits)
        self.register_buffer("packed", torch.zeros(rows, size, dtype=torch.uint8, device=device))
        self.register_buffer("norms", torch.zeros(rows, blocks, dtype=torch.float16, device=device))
        scales = torch.ones(columns, dtype=torch.float16, device=device) if awq else None
        self.register_buffer("awq_scales", scales)
        self.register_buffer("centroids", lloyd_max_levels(bits).to(device, copy=True))
        for name in _TILED:
            self.register_buffer(name, None, persistent=False)

    def _set_weight(self, weight: PolarWeight) -> None:
        self.packed, self.norms, self.awq_scales = weight.packed, weight.norms, weight.awq_scales
        self.centroids = weight.centroids
        self.settle()

    @property
    def bits(self) -> int:
        return bits_of(self.centroids)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weight in its stored form, the shared table left out."""
        padded = padded_size(self._columns)
        row = packed_size(padded, self.bits) + 2 * (padded // BLOCK_SIZE)
        return self._rows * row + (0 if self.awq_scales is None else 2 * self._columns)

    @property
    def polar_weight(self) -> PolarWeight:
        """The weight in its stored form: this module's buffers, or from tile layout a copy."""
        packed, norms = self._stored()
        return PolarWeight(packed, norms, self.awq_scales, self.centroids, self._columns)

    def _stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.tiles is not None and self.tile_norms is not None:
            return untile_weight(self.tiles, self.tile_norms, self._rows, self.bits)
        assert self.packed is not None  # one of the two forms is always there
        assert self.norms is not None
        return self.packed, self.norms

    @property
    def activation(self) -> Activation:
        """`int8`: on GPUs that have the kernel for it, fp16 and bf16 inputs are rounded to int8 after the rotation, one
        scale a 128-block. `exact`: no more than 16 bits cost, which is their dtype or finer."""
        return self._activation

    @activation.setter
    def activation(self, activation: Activation) -> None:
        if activation not in ("int8", "exact"):
            raise ArgumentError(f"activation must be 'int8' or 'exact', found {activation!r}")
        self._activation = activation

    @property
    def tiled(self) -> TiledWeight | None:
        """The weight as int8 products read it; None where they are not the ones that are used."""
        if self.tiles is None or self.tile_norms is None or self.level_table is None or self._activation == "exact":
            return None
        return TiledWeight(self.tiles, self.tile_norms, self.awq_scales, self.level_table)

    def _multiplies(self) -> bool:
        """Whether activations are multiplied by this weight, so that tile layout is of use."""
        return True

    def _wants_tiles(self) -> bool:
        """Whether the device this weight is on would rather have it in tile layout."""
        if self.centroids.device.type != "cuda" or not self._multiplies():
            return False
        from polar_kernels.kernels.gpu import supports

        return supports(self.centroids.device) and (self.tiles is not None or is_tileable(self.centroids))

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., columns] times the transposed weight, plus bias: [..., rows] in x's dtype, under autocast in its."""
        x = cast_for_autocast(x)
        if self.tiles is not None:
            parts = (self.tiles, self.tile_norms, self.awq_scales, self.level_table, self.centroids)
            return ops.tiled_linear(x, *parts, bias, self._rows, self._activation == "exact")
        return ops.linear(x, self.packed, self.norms, self.awq_scales, self.centroids, bias)

    def _dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight W_hat [rows, columns], a new tensor."""
        if self.tiles is not None:
            parts = (self.tiles, self.tile_norms, self.awq_scales, self.level_table, self.centroids)
            return ops.tiled_dequantize(*parts, self._rows, self._columns, dtype)
        weight = self.polar_weight
        return ops.dequantize(weight.packed, weight.norms, weight.awq_scales, weight.centroids, self._columns, dtype)

    def dequantize_into(self, out: torch.Tensor) -> torch.Tensor:
        """Write the weight W_hat into `out` [rows, columns], fp16, bf16 or fp32, contiguous, and return it.

        Raises: ArgumentError for another shape, dtype or device.
        """
        if self.tiles is not None:
            parts = (self.tiles, self.tile_norms, self.awq_scales, self.level_table, self.centroids)
            ops.tiled_dequantize_into(*parts, out)
        else:
            weight = self.polar_weight
            ops.dequantize_into(weight.packed, weight.norms, weight.awq_scales, weight.centroids, out)
        return out

    def settle(self) -> None:
        """Bring the weight into the layout that the device it is on multiplies from. Call after writing the buffers."""
        if self._wants_tiles():
            if self.tiles is None:
                packed, norms = (part.flatten(0, -2) for part in self._stored())
                self.tiles, self.tile_norms = tile_weight(packed, norms, self.bits)
                del packed, norms
                # Reads the table on the CPU and so waits for the tiles: kernels that overlap with the one before them
                # load both before they wait for it.
                self.level_table = level_table(self.centroids)
                self.packed = self.norms = None
        else:
            self._to_stored()

    def _to_stored(self) -> None:
        self.packed, self.norms = self._stored()
        self.tiles = self.tile_norms = self.level_table = None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "PolarModule":
        def move(tensor: torch.Tensor) -> torch.Tensor:
            """`fn`'s device with the stored dtype: a cast would round what must stay exact."""
            target = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            return fn(tensor) if target.dtype == tensor.dtype else tensor.to(target.device)

        own = {name: self._buffers.pop(name) for name in (*_STORED, *_TILED)}
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update({n: t if t is None else move(t) for n, t in own.items()})
        self.settle()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        kept = self._buffers["packed"], self._buffers["norms"]
        self._buffers["packed"], self._buffers["norms"] = self._stored()
        try:
            super()._save_to_state_dict(destination, prefix, keep_vars)
        finally:
            self._buffers["packed"], self._buffers["norms"] = kept

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._to_stored()
        super()._load_from_state_dict(*args, **kwargs)
        self.settle()

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
