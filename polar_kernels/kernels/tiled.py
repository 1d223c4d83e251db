"""A weight in tile layout multiplied or dequantised: which kernel for which input."""

import torch

from polar_kernels.hadamard import BLOCK_SIZE, padded_size
from polar_kernels.kernels import dequantize, matmul
from polar_kernels.kernels.int8_matmul import MAX_ROWS, int8_linear
from polar_kernels.kernels.tile_dequantize import dequantize_tiles
from polar_kernels.tiles import TILE_ROWS, untile_weight

# Rows of x from which one dequantisation and a dense product are faster than passes of the int8 kernel.
_DENSE_ROWS = 2 * MAX_ROWS + 1
_SCRATCH_BYTES = 32 << 20  # of dense weight that such a product holds at a time
_STORE_COLUMNS = 8  # the one-shot kernel writes 16 bytes at a time


def tiled_linear(
    x: torch.Tensor,
    tiles: torch.Tensor,
    tile_norms: torch.Tensor,
    awq_scales: torch.Tensor | None,
    level_table: torch.Tensor,
    centroids: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    """x [M, K] contiguous times the transposed weight, plus bias: [M, N] in x's dtype.

    fp32 is multiplied exactly, by the kernel of the stored layout. fp16 and bf16 go through int8 activations; many
    rows of them meet the weight in 16 bits, a part of it at a time.
    """
    if not x.shape[0] or not out_features:
        return x.new_empty(x.shape[0], out_features)
    if x.dtype == torch.float32:
        packed, norms = untile_weight(tiles, tile_norms, out_features)
        return matmul.linear(x, packed, norms, awq_scales, centroids, bias)
    if x.shape[0] >= _DENSE_ROWS and x.shape[1] % _STORE_COLUMNS == 0:
        return _dense_linear(x, tiles, tile_norms, awq_scales, level_table, bias, out_features)
    parts = (tiles, tile_norms, awq_scales, level_table, bias, out_features)
    outs = [int8_linear(rows, *parts) for rows in x.split(MAX_ROWS)]
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
    bands = max(1, _SCRATCH_BYTES // (TILE_ROWS * in_features * x.dtype.itemsize))
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
    if dtype == torch.float32 or in_features % _STORE_COLUMNS or not out_features:
        packed, norms = untile_weight(tiles, tile_norms, out_features)
        return dequantize.dequantize_rows(None, packed, norms, awq_scales, centroids, in_features, dtype)
    out = torch.empty(out_features, in_features, dtype=dtype, device=tiles.device)
    dequantize_tiles(tiles, tile_norms, awq_scales, level_table, out)
    return out


def supports(device: torch.device) -> bool:
    """Whether the kernels of the tile layout run on this device: NVIDIA, Hopper or newer."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
