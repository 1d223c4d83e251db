"""What the operators ask of their arguments: shapes, dtypes and devices, never values, so that nothing synchronises.

Each `check_X` takes the arguments of the operator X and raises ArgumentError for those that disagree.
"""

import torch

from polar_kernels.codebook import bits_of
from polar_kernels.errors import ArgumentError
from polar_kernels.hadamard import BLOCK_SIZE, padded_size
from polar_kernels.packing import packed_size
from polar_kernels.tiles import LEVEL_WORDS, PLANE_WORDS, TILE_ROWS, tile_width
from polar_kernels.weight import check_weight, expect

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def _check_float(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise ArgumentError(f"{name} must be float16, bfloat16 or float32, found {dtype}")


def _check_device(name: str, tensor: torch.Tensor | None, device: torch.device) -> None:
    if tensor is not None and tensor.device != device:
        raise ArgumentError(f"{name} is on {tensor.device} but should be on {device}: move the layer or its input")


def check_rotate(x: torch.Tensor, awq_scales: torch.Tensor | None) -> None:
    _check_float("x", x.dtype)
    if x.dim() == 0:
        raise ArgumentError("x must have at least one dimension, found a scalar")
    _check_device("awq_scales", awq_scales, x.device)
    if awq_scales is not None and tuple(awq_scales.shape) != (x.shape[-1],):
        raise ArgumentError(f"x has {x.shape[-1]} features but awq_scales has shape {list(awq_scales.shape)}")


def check_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    norms: torch.Tensor,
    awq_scales: torch.Tensor | None,
    centroids: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    check_rotate(x, awq_scales)
    check_weight(packed, norms, awq_scales, centroids, x.shape[-1])
    _check_device("the weight", packed, x.device)
    _check_bias(bias, packed.shape[0], x.device)


def _check_bias(bias: torch.Tensor | None, out_features: int, device: torch.device) -> None:
    _check_device("bias", bias, device)
    if bias is not None and (tuple(bias.shape) != (out_features,) or not bias.is_floating_point()):
        raise ArgumentError(f"bias must be float [{out_features}], found {bias.dtype} {list(bias.shape)}")


def check_dequantize(
    packed: torch.Tensor,
    norms: torch.Tensor,
    awq_scales: torch.Tensor | None,
    centroids: torch.Tensor,
    in_features: int,
    dtype: torch.dtype,
) -> None:
    _check_float("dtype", dtype)
    check_weight(packed, norms, awq_scales, centroids, in_features)


def _check_out(out: torch.Tensor, rows: int | None, device: torch.device) -> None:
    """rows: as many as the weight has, or None where its other parts are held against `out`."""
    _check_float("out", out.dtype)
    _check_device("out", out, device)
    if out.dim() != 2 or (rows is not None and out.shape[0] != rows):
        raise ArgumentError(f"out must be [{rows or 'N'}, K], found {list(out.shape)}")
    if not out.is_contiguous():
        raise ArgumentError(f"out must be contiguous, found strides {out.stride()}")


def check_dequantize_into(packed, norms, awq_scales, centroids, out):
    _check_out(out, packed.shape[0], packed.device)
    check_weight(packed, norms, awq_scales, centroids, out.shape[1])


def check_embedding(
    ids: torch.Tensor,
    packed: torch.Tensor,
    norms: torch.Tensor,
    awq_scales: torch.Tensor | None,
    centroids: torch.Tensor,
    embedding_dim: int,
    dtype: torch.dtype,
) -> None:
    check_dequantize(packed, norms, awq_scales, centroids, embedding_dim, dtype)
    _check_ids(ids, packed.device)


def _check_ids(ids: torch.Tensor, device: torch.device) -> None:
    if ids.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(f"ids must be int32 or int64, found {ids.dtype}")
    _check_device("ids", ids, device)


def check_experts(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_packed: torch.Tensor,
    gate_up_norms: torch.Tensor,
    gate_up_awq_scales: torch.Tensor | None,
    gate_up_centroids: torch.Tensor,
    down_packed: torch.Tensor,
    down_norms: torch.Tensor,
    down_awq_scales: torch.Tensor | None,
    down_centroids: torch.Tensor,
) -> None:
    _check_routed(x, top_k_index, top_k_weights)
    if gate_up_packed.dim() != 3 or gate_up_packed.shape[1] % 2:
        raise ArgumentError(f"gate_up_packed must be [E, 2 * I, bytes], found {list(gate_up_packed.shape)}")
    count, middle = gate_up_packed.shape[0], gate_up_packed.shape[1] // 2
    gate_up = (gate_up_packed, gate_up_norms, gate_up_awq_scales, gate_up_centroids)
    _check_stack("gate_up", *gate_up, (count, 2 * middle), x.shape[1])
    _check_stack("down", down_packed, down_norms, down_awq_scales, down_centroids, (count, x.shape[1]), middle)
    for tensor in (*gate_up, down_packed, down_norms, down_awq_scales, down_centroids):
        _check_device("a part of the experts", tensor, x.device)


def _check_routed(x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> None:
    _check_float("x", x.dtype)
    if x.dim() != 2:
        raise ArgumentError(f"x must be [T, H], found {list(x.shape)}")
    if top_k_index.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(f"top_k_index must be int32 or int64, found {top_k_index.dtype}")
    if not top_k_weights.is_floating_point():
        raise ArgumentError(f"top_k_weights must be float, found {top_k_weights.dtype}")
    tokens = x.shape[0]  # not len(x), which would fix a size that is traced as dynamic
    if top_k_index.dim() != 2 or top_k_index.shape[0] != tokens or top_k_weights.shape != top_k_index.shape:
        found = f"{list(top_k_index.shape)} and {list(top_k_weights.shape)}"
        raise ArgumentError(f"top_k_index and top_k_weights must both be [{tokens}, k], found {found}")
    for name, part in (("top_k_index", top_k_index), ("top_k_weights", top_k_weights)):
        _check_device(name, part, x.device)


def _check_stack(
    name: str,
    packed: torch.Tensor,
    norms: torch.Tensor,
    awq_scales: torch.Tensor | None,
    centroids: torch.Tensor,
    rows: tuple[int, int],
    in_features: int,
) -> None:
    """The parts of the same projection of all experts; rows: [E, N]."""
    bits, blocks = bits_of(centroids), padded_size(in_features) // BLOCK_SIZE
    expect(f"{name}_centroids", centroids, torch.float32, (1 << bits,))
    expect(f"{name}_packed", packed, torch.uint8, (*rows, packed_size(blocks * BLOCK_SIZE, bits)))
    expect(f"{name}_norms", norms, torch.float16, (*rows, blocks))
    if awq_scales is not None:
        expect(f"{name}_awq_scales", awq_scales, torch.float16, (in_features,))


def _check_tiles(
    tiles: torch.Tensor,
    tile_norms: torch.Tensor,
    awq_scales: torch.Tensor | None,
    level_table: torch.Tensor,
    centroids: torch.Tensor,
    out_features: int,
    in_features: int,
) -> None:
    bits = bits_of(centroids)
    if not 2 <= bits <= 5:
        raise ArgumentError(f"tiles hold codes of 2 to 5 bits, found a table of {centroids.numel()} levels")
    count = -(-out_features // TILE_ROWS) * (padded_size(in_features) // BLOCK_SIZE)
    expected = {
        "tiles": (tiles, torch.int32, (count, PLANE_WORDS * tile_width(bits))),
        "tile_norms": (tile_norms, torch.float16, (count, 8, 4)),
        "centroids": (centroids, torch.float32, (1 << bits,)),
        "level_table": (level_table, torch.int32, (LEVEL_WORDS,)),
    }
    if awq_scales is not None:
        expected["awq_scales"] = (awq_scales, torch.float16, (in_features,))
    for name, (tensor, dtype, shape) in expected.items():
        expect(name, tensor, dtype, shape)
        _check_device(name, tensor, tiles.device)


def check_tiled_linear(x, tiles, tile_norms, awq_scales, level_table, centroids, bias, out_features, exact=False):
    check_rotate(x, awq_scales)
    _check_tiles(tiles, tile_norms, awq_scales, level_table, centroids, out_features, x.shape[-1])
    _check_device("the weight", tiles, x.device)
    _check_bias(bias, out_features, x.device)


def check_tiled_dequantize(tiles, tile_norms, awq_scales, level_table, centroids, out_features, in_features, dtype):
    _check_float("dtype", dtype)
    _check_tiles(tiles, tile_norms, awq_scales, level_table, centroids, out_features, in_features)


def check_tiled_dequantize_into(tiles, tile_norms, awq_scales, level_table, centroids, out):
    _check_out(out, None, tiles.device)
    _check_tiles(tiles, tile_norms, awq_scales, level_table, centroids, *out.shape)


def check_tiled_embedding(
    ids, tiles, tile_norms, awq_scales, level_table, centroids, out_features, embedding_dim, dtype
):
    check_tiled_dequantize(tiles, tile_norms, awq_scales, level_table, centroids, out_features, embedding_dim, dtype)
    _check_ids(ids, tiles.device)


def check_tiled_experts(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_tiles: torch.Tensor,
    gate_up_tile_norms: torch.Tensor,
    gate_up_awq_scales: torch.Tensor | None,
    gate_up_level_table: torch.Tensor,
    gate_up_centroids: torch.Tensor,
    down_tiles: torch.Tensor,
    down_tile_norms: torch.Tensor,
    down_awq_scales: torch.Tensor | None,
    down_level_table: torch.Tensor,
    down_centroids: torch.Tensor,
    num_experts: int,
    intermediate_size: int,
    exact: bool = False,
) -> None:
    _check_routed(x, top_k_index, top_k_weights)
    hidden = x.shape[1]
    if 2 * intermediate_size % TILE_ROWS or hidden % TILE_ROWS:
        found = f"[{num_experts}, {2 * intermediate_size}, {hidden}] and [{num_experts}, {hidden}, {intermediate_size}]"
        raise ArgumentError(f"experts in tiles must have multiples of {TILE_ROWS} rows, found {found}")
    gate_up = (gate_up_tiles, gate_up_tile_norms, gate_up_awq_scales, gate_up_level_table, gate_up_centroids)
    down = (down_tiles, down_tile_norms, down_awq_scales, down_level_table, down_centroids)
    _check_tiles(*gate_up, num_experts * 2 * intermediate_size, hidden)
    _check_tiles(*down, num_experts * hidden, intermediate_size)
    for tiles in (gate_up_tiles, down_tiles):
        _check_device("a part of the experts", tiles, x.device)
