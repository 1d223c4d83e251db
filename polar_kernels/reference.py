"""The definition of the scheme, in plain torch. Every kernel is tested against these functions.

    W_hat = norms * ((centroids[codes] / sqrt(128)) @ H) / awq_scales

H is symmetric and orthonormal, so `linear` never forms W_hat: it rotates the activation instead of the weight,

    x @ W_hat^T = sum_b norms[:, b] * (centroids[codes[:, b, :]] / sqrt(128)) . (x / awq_scales)[block b] @ H

Arithmetic is fp32, or fp64 where the input or the asked dtype is fp64; results are rounded once, at the end. Rows of
the weight are expanded a few at a time, so that no call holds an unpacked copy of a large one.
"""

import math
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from polar_kernels.codebook import bits_of
from polar_kernels.hadamard import BLOCK_SIZE, pad_blocks, transform_blocks
from polar_kernels.packing import unpack_codes

_CHUNK = 1 << 22  # weights expanded at a time


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rotate(x: torch.Tensor, awq_scales: torch.Tensor | None) -> torch.Tensor:
    """Activations x [..., K] divided by awq_scales [K], zero-padded to 128s and rotated: [..., Kp] in x's dtype."""
    work = x.to(arithmetic_dtype(x.dtype))
    if awq_scales is not None:
        work = work / awq_scales.to(work.dtype)
    return transform_blocks(pad_blocks(work)).to(x.dtype)


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    norms: torch.Tensor,
    awq_scales: torch.Tensor | None,
    centroids: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., K] times the transposed weight, plus bias [N]: [..., N] in x's dtype."""
    work = arithmetic_dtype(x.dtype)
    rotated = rotate(x.to(work), awq_scales).flatten(0, -2) if x.dim() > 1 else rotate(x.to(work), awq_scales)[None]
    out = torch.empty(rotated.shape[0], packed.shape[0], dtype=work, device=x.device)
    with torch.autocast(x.device.type, enabled=False):  # which would round the operands
        for rows in _row_chunks(packed, centroids):
            torch.mm(rotated, _scaled_levels(packed[rows], norms[rows], centroids, work).T, out=out[:, rows])
    if bias is not None:
        out += bias.to(work)
    return out.to(x.dtype).unflatten(0, x.shape[:-1]) if x.dim() > 1 else out.to(x.dtype)[0]


def dequantize(
    packed: torch.Tensor,
    norms: torch.Tensor,
    awq_scales: torch.Tensor | None,
    centroids: torch.Tensor,
    in_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight W_hat [N, K] itself, in `dtype`."""
    work = arithmetic_dtype(dtype)
    out = torch.empty(packed.shape[0], in_features, dtype=dtype, device=packed.device)
    for rows in _row_chunks(packed, centroids):
        weight = transform_blocks(_scaled_levels(packed[rows], norms[rows], centroids, work))[:, :in_features]
        out[rows] = (weight if awq_scales is None else weight / awq_scales.to(work)).to(dtype)
    return out


def embedding(
    ids: torch.Tensor,
    packed: torch.Tensor,
    norms: torch.Tensor,
    awq_scales: torch.Tensor | None,
    centroids: torch.Tensor,
    embedding_dim: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows `ids` [...] of W_hat: [..., embedding_dim] in `dtype`. Raises IndexError for an id outside the table."""
    flat = ids.flatten()
    if flat.numel() and int(flat.min()) < 0:
        raise IndexError(f"id {int(flat.min())} is outside the table of {packed.shape[0]} rows")
    rows = dequantize(packed[flat], norms[flat], awq_scales, centroids, embedding_dim, dtype)
    return rows.reshape(*ids.shape, embedding_dim)


def experts(
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
) -> torch.Tensor:
    """x [T, H] through the experts top_k_index [T, k] of each token, summed by top_k_weights [T, k]: [T, H].

    An expert e is down[e](silu(gate) * up), where gate_up[e](x) has the rows of gate first and then those of up. Packed
    and norms are those of a weight with a dimension [E] in front; all experts share awq_scales and centroids.
    Raises IndexError for an expert outside 0..E-1.
    """
    count, work = gate_up_packed.shape[0], arithmetic_dtype(x.dtype)
    out = torch.zeros(x.shape, dtype=work, device=x.device)
    for expert in top_k_index.unique().tolist():
        if not 0 <= expert < count:
            raise IndexError(f"expert {expert} is outside the {count} there are")
        token, place = (top_k_index == expert).nonzero(as_tuple=True)
        gate_up = (gate_up_packed[expert], gate_up_norms[expert], gate_up_awq_scales, gate_up_centroids)
        gate, up = linear(x[token].to(work), *gate_up).chunk(2, -1)
        down = (down_packed[expert], down_norms[expert], down_awq_scales, down_centroids)
        made = linear(F.silu(gate) * up, *down)
        out.index_add_(0, token, made * top_k_weights[token, place, None].to(work))
    return out.to(x.dtype)


def _scaled_levels(
    packed: torch.Tensor, norms: torch.Tensor, centroids: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """norms * centroids[codes] / sqrt(128), [N, Kp]: the weight in the rotated domain."""
    codes = unpack_codes(packed, bits_of(centroids)).int()
    levels = (centroids.to(dtype) / math.sqrt(BLOCK_SIZE))[codes]
    return (levels.unflatten(-1, (-1, BLOCK_SIZE)) * norms.to(dtype)[..., None]).flatten(-2)


def _row_chunks(packed: torch.Tensor, centroids: torch.Tensor) -> Iterator[slice]:
    columns = packed.shape[1] * 8 // bits_of(centroids)
    step = max(1, _CHUNK // max(1, columns))
    return (slice(start, start + step) for start in range(0, packed.shape[0], step))
