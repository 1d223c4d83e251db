"""One weight into the format: AWQ scaling, block norms, rotation, nearest level, least-squares block scale."""

import math

import torch

from polar_kernels.codebook import bits_of, check_bits, check_levels, lloyd_max_levels
from polar_kernels.errors import ArgumentError, QuantizationError
from polar_kernels.feedback import prepare_feedback, refine
from polar_kernels.hadamard import BLOCK_SIZE, pad_blocks, padded_size, transform_blocks
from polar_kernels.packing import pack_codes, packed_size
from polar_kernels.weight import PolarWeight

_CHUNK = 1 << 23  # weights in work at a time; bounds the temporaries to some hundred MB
_GPU_CHUNKS = 8  # at a time on a GPU, which fewer do not keep busy
# Squared share of a weight that storing its norms in fp16 may cost. fp16 in its normal range costs 1e-7 at most; a
# weight whose norms are subnormal as a whole costs more than this, single dead rows among normal ones do not.
_MAX_NORM_LOSS = 1e-5


def quantize_weight(
    weight: torch.Tensor,
    bits: int = 5,
    *,
    awq_scales: torch.Tensor | None = None,
    centroids: torch.Tensor | None = None,
    least_squares: bool = True,
    moments: torch.Tensor | None = None,
) -> PolarWeight:
    """Quantise weight [N, K] of any float dtype, on its device.

    awq_scales: [K], finite and positive; rounded to fp16 first, so that what is stored is what was used.
    centroids: another table of levels, fp32 [2^bits] sorted; the converged Lloyd-Max table when None.
    least_squares: store the block scale n * <z, v> / <v, v> (v the chosen levels) in place of the norm n.
    moments: float [K, K], E[x x^T] of the layer's inputs: choose codes and norms for the error of its outputs.

    Raises: QuantizationError for NaN or infinity in the weight (with the index), and for a range that fp16 norms
    cannot hold, and for moments that are none; ArgumentError for wrong arguments. An all-zero block gives exact zeros.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ArgumentError(f"weight must be a 2-D float tensor, found {weight.dtype} {list(weight.shape)}")
    table = lloyd_max_levels(bits) if centroids is None else _check_table(centroids, bits)
    table = table.to(weight.device, copy=True)  # a layer's own, not the cached or the caller's
    scales = None if awq_scales is None else _check_scales(awq_scales, weight.shape[1]).to(weight.device)
    rows, blocks = weight.shape[0], padded_size(weight.shape[1]) // BLOCK_SIZE
    feedback = None if moments is None else prepare_feedback(moments, weight.shape[1], scales, weight.device)
    packed = weight.new_empty(rows, packed_size(blocks * BLOCK_SIZE, bits), dtype=torch.uint8)
    norms = weight.new_empty(rows, blocks, dtype=torch.float32)
    refined = None if feedback is None else torch.empty_like(norms)
    step = max(1, _CHUNK * (_GPU_CHUNKS if weight.is_cuda else 1) // max(1, weight.shape[1]))
    for start in range(0, rows, step):
        chunk = weight[start : start + step].float()
        _check_finite(chunk, start)
        scaled = pad_blocks(chunk if scales is None else _scale_columns(chunk, scales, start))
        codes, scale = _quantize_blocks(scaled, table, least_squares)
        norms[start : start + step] = scale
        if feedback is not None and refined is not None:
            # In units of norm * level, whose sqrt(128) the transform's own takes up.
            codes, scale = refine(transform_blocks(scaled) * math.sqrt(BLOCK_SIZE), codes, scale, table, feedback)
            refined[start : start + step] = scale
        packed[start : start + step] = pack_codes(codes, bits)
    stored = _to_fp16(norms)  # also where they are not what is stored: refined ones are of fp16 values already
    return PolarWeight(packed, stored if refined is None else _to_fp16(refined), scales, table, weight.shape[1])


def _quantize_blocks(
    scaled: torch.Tensor, table: torch.Tensor, least_squares: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, Kp] and block scales fp32 [N, Kp / 128] of a scaled, padded fp32 weight [N, Kp]."""
    blocks = scaled.unflatten(-1, (-1, BLOCK_SIZE))
    # Dividing by the largest magnitude first keeps the sum of squares clear of fp32's limits.
    peak = blocks.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    direction = blocks / peak
    length = direction.norm(dim=-1, keepdim=True)
    unit = direction / length.clamp_min(torch.finfo(torch.float32).tiny)
    z = transform_blocks(unit.flatten(-2)).unflatten(-1, (-1, BLOCK_SIZE)) * math.sqrt(BLOCK_SIZE)
    codes = torch.bucketize(z, (table[1:] + table[:-1]) / 2, out_int32=True)
    norm = (peak * length).squeeze(-1)
    if least_squares:
        levels = table[codes]
        # Levels farther from z than any sane table gives could turn the scale negative; the norm is the bound then.
        gain = (z * levels).sum(-1) / levels.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        norm = norm * gain.clamp_min(0)
    return codes.flatten(-2), norm


def _to_fp16(norms: torch.Tensor) -> torch.Tensor:
    stored = norms.half()
    if torch.isinf(stored).any():
        row, block = (stored.isinf().nonzero()[0]).tolist()
        raise QuantizationError(
            f"the norm {norms[row, block].item():.4g} of row {row}, block {block} is beyond fp16 (65504): "
            "rescale the weight, or leave this layer in bf16"
        )
    total = norms.double().square().sum()
    loss = (norms.double() - stored.double()).square().sum()
    if loss > _MAX_NORM_LOSS * total:
        raise QuantizationError(
            f"the weight's block norms (largest {norms.max().item():.3g}) are too small for fp16, which would lose "
            f"{(loss / total).item():.1%} of them: rescale the weight, or leave this layer in bf16"
        )
    return stored


def _scale_columns(chunk: torch.Tensor, scales: torch.Tensor, first_row: int) -> torch.Tensor:
    scaled = chunk * scales.float()
    bad = ~scaled.isfinite()
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise QuantizationError(
            f"the weight times its AWQ scale overflows at [{first_row + row}, {column}]: "
            f"{chunk[row, column].item():.4g} times {scales[column].item():.4g}"
        )
    return scaled


def _check_finite(chunk: torch.Tensor, first_row: int) -> None:
    bad = ~chunk.isfinite()
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise QuantizationError(
            f"the weight has {int(bad.sum())} NaN or infinite elements, the first at "
            f"[{first_row + row}, {column}] = {chunk[row, column].item()}"
        )


def _check_scales(awq_scales: torch.Tensor, in_features: int) -> torch.Tensor:
    if tuple(awq_scales.shape) != (in_features,):
        raise ArgumentError(f"awq_scales must have shape [{in_features}], found {list(awq_scales.shape)}")
    stored = awq_scales.to(torch.float16, copy=True)  # layers of a site are given the same tensor; each saves its own
    bad = ~(stored.isfinite() & (stored > 0))
    if bad.any():
        index = int(bad.nonzero()[0])
        raise ArgumentError(
            f"awq_scales must be finite and positive in fp16; found {awq_scales[index].item()} at [{index}]"
        )
    return stored


def _check_table(centroids: torch.Tensor, bits: int) -> torch.Tensor:
    if bits_of(centroids) != check_bits(bits):
        raise ArgumentError(f"centroids must have {1 << bits} levels at {bits} bits, found {centroids.numel()}")
    check_levels(centroids)
    return centroids.float()
