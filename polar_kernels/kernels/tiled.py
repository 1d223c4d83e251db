"""A weight in tile layout multiplied or dequantised: which kernel for which input.

| rows of x | int8 |
|---|---|
| 1 to 32, to 64 of a small weight, K at most 4096 | int8_matmul |
| to 1536, to 1024 of a tiny weight, to 2048 where K is no multiple of 512, on Hopper | int8_wgmma |
| more, of a weight that is not tiny, K a multiple of 512, on Hopper | int8_dense |
| else, to 128 | int8_matmul, 64 at a time |
| else | dense |

| rows of x | exact |
|---|---|
| 1 to 16 | exact_matmul |
| to 512, to 256 of a small weight, on Hopper | exact_wgmma |
| else, to 48 | exact_matmul, 16 at a time |
| else | dense |

dense: the weight dequantised, a part at a time, into one buffer that cuBLAS multiplies by. fp32 takes the plain kernel.
"""

from collections.abc import Callable
from typing import Any

import torch

from polar_kernels.codebook import bits_of
from polar_kernels.hadamard import BLOCK_SIZE, padded_size
from polar_kernels.kernels import dequantize, exact_matmul, int8_dense, int8_matmul, matmul
from polar_kernels.kernels.exact_matmul import exact_linear
from polar_kernels.kernels.exact_wgmma import exact_wgmma_linear
from polar_kernels.kernels.gpu import has_wgmma
from polar_kernels.kernels.int8_dense import int8_dense_linear
from polar_kernels.kernels.int8_matmul import int8_linear
from polar_kernels.kernels.int8_wgmma import int8_wgmma_linear
from polar_kernels.kernels.tile_dequantize import dequantize_tiles
from polar_kernels.tiles import TILE_ROWS, untile_weight

# Rows of x up to which a kernel is the fastest, from times on an H200, and on an H100 where wgmma is concerned.
_EXACT_WGMMA_ROWS, _SMALL_EXACT_WGMMA_ROWS, _SMALL_TILES = 512, 256, 4096  # a small weight has at most so many tiles
_EXACT_ROWS = 3 * exact_matmul.MAX_ROWS  # without wgmma
NARROW_ROWS = 32  # int8_matmul
_SMALL_NARROW_COLUMNS = 4096  # of a small weight, up to which it is the fastest for as many rows as it takes
_WGMMA_ROWS, _ODD_WGMMA_ROWS = 1536, 2048  # the latter where int8_dense does not take K
_TINY_WGMMA_ROWS, _TINY_TILES = 1024, 1024  # where the weight is tiny: has at most so many tiles
_NARROW_ONLY_ROWS = 2 * int8_matmul.MAX_ROWS  # int8_matmul on GPUs without wgmma
_SCRATCH_BYTES = 64 << 20  # of dense weight that a dense product holds at a time, at most
_SCRATCH_PRODUCT = 1 << 23  # outputs of a part: about two waves of cuBLAS's tiles on a Hopper GPU
_STORE_BYTES, _STORE_COLUMNS = 16, 8  # the one-shot kernel writes so many at a time


def tiled_linear(
    x: torch.Tensor,
    tiles: torch.Tensor,
    tile_norms: torch.Tensor,
    awq_scales: torch.Tensor | None,
    level_table: torch.Tensor,
    centroids: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    exact: bool,
) -> torch.Tensor:
    """x [M, K] contiguous times the transposed weight, plus bias: [M, N] in x's dtype. exact: no int8 activations."""
    rows = x.shape[0]
    if not rows or not out_features:
        return x.new_empty(rows, out_features)
    if x.dtype == torch.float32:
        packed, norms = untile_weight(tiles, tile_norms, out_features, bits_of(centroids))
        return matmul.linear(x, packed, norms, awq_scales, centroids, bias)
    multiply = _exact_linear if exact else _int8_linear
    return multiply(x, (tiles, tile_norms, awq_scales, level_table, bias, out_features))


def _exact_linear(x: torch.Tensor, weight: tuple[Any, ...]) -> torch.Tensor:
    rows, wgmma, small = x.shape[0], has_wgmma(x.device), len(weight[0]) <= _SMALL_TILES
    most = (_SMALL_EXACT_WGMMA_ROWS if small else _EXACT_WGMMA_ROWS) if wgmma else _EXACT_ROWS
    if _can_be_dense(x) and rows > most:
        return _dense_linear(x, *weight)
    if wgmma and rows > exact_matmul.MAX_ROWS:
        return exact_wgmma_linear(x, *weight)
    return _in_parts(exact_linear, exact_matmul.MAX_ROWS, x, weight)


def _int8_linear(x: torch.Tensor, weight: tuple[Any, ...]) -> torch.Tensor:
    rows, in_features = x.shape
    small = len(weight[0]) <= _SMALL_TILES and in_features <= _SMALL_NARROW_COLUMNS
    if rows <= (int8_matmul.MAX_ROWS if small else NARROW_ROWS):
        return int8_linear(x, *weight)
    wgmma, tiny = has_wgmma(x.device), len(weight[0]) <= _TINY_TILES
    if wgmma and not tiny and rows > _WGMMA_ROWS and in_features % int8_dense.IN_FEATURES == 0:
        return int8_dense_linear(x, *weight)
    most = (_TINY_WGMMA_ROWS if tiny else _ODD_WGMMA_ROWS) if wgmma else _NARROW_ONLY_ROWS
    if _can_be_dense(x) and rows > most:
        return _dense_linear(x, *weight)
    return int8_wgmma_linear(x, *weight) if wgmma else _in_parts(int8_linear, int8_matmul.MAX_ROWS, x, weight)


def _can_be_dense(x: torch.Tensor) -> bool:
    return x.shape[1] % _STORE_COLUMNS == 0


def _in_parts(linear: Callable[..., torch.Tensor], rows: int, x: torch.Tensor, weight: tuple[Any, ...]) -> torch.Tensor:
    """A product that takes at most `rows` rows of x at a time."""
    outs = [linear(part, *weight) for part in x.split(rows)]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _dense_linear(
    x: torch.Tensor,
    tiles: torch.Tensor,
    tile_norms: torch.Tensor,
    awq_scales: torch.Tensor | None,
    level_table: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    """The product with the weight dequantised part by part into one buffer: no large one is ever there whole."""
    rows, in_features = x.shape
    blocks = padded_size(in_features) // BLOCK_SIZE
    part_rows = min(_SCRATCH_BYTES // (in_features * x.dtype.itemsize), max(_SCRATCH_PRODUCT // rows, 1024))
    bands = max(1, part_rows // TILE_ROWS)
    scratch = x.new_empty(min(bands * TILE_ROWS, out_features), in_features)
    out = x.new_empty(rows, out_features)
    for first in range(0, out_features, bands * TILE_ROWS):
        span = slice(first, min(first + bands * TILE_ROWS, out_features))
        part = slice(first // TILE_ROWS * blocks, -(-span.stop // TILE_ROWS) * blocks)
        dense = scratch[: span.stop - first]
        dequantize_tiles(tiles[part], tile_norms[part], awq_scales, level_table, dense)
        if bias is None:
            torch.mm(x, dense.T, out=out[:, span])
        else:
            torch.addmm(bias[span].to(x.dtype), x, dense.T, out=out[:, span])
    return out


def tiled_dequantize(
    tiles: torch.Tensor,
    tile_norms: torch.Tensor,
    awq_scales: torch.Tensor | None,
    level_table: torch.Tensor,
    centroids: torch.Tensor,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight W_hat [N, K] in `dtype`."""
    out = torch.empty(out_features, in_features, dtype=dtype, device=tiles.device)
    tiled_dequantize_into(tiles, tile_norms, awq_scales, level_table, centroids, out)
    return out


def tiled_dequantize_into(
    tiles: torch.Tensor,
    tile_norms: torch.Tensor,
    awq_scales: torch.Tensor | None,
    level_table: torch.Tensor,
    centroids: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """The same into `out` [N, K], contiguous."""
    out_features, in_features = out.shape
    if out.dtype == torch.float32 or in_features % _STORE_COLUMNS or out.data_ptr() % _STORE_BYTES:
        packed, norms = untile_weight(tiles, tile_norms, out_features, bits_of(centroids))
        dequantize.write_rows(None, packed, norms, awq_scales, centroids, out)
    elif out_features:
        dequantize_tiles(tiles, tile_norms, awq_scales, level_table, out)
