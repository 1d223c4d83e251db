"""Error feedback: codes and block norms chosen for the error of a layer's outputs, by the second moments of its inputs.

In the rotated domain a row z of the weight and its quantised q cost (z - q)^T M (z - q), where M are the moments of the
rotated inputs. First column by column, those with the largest moments first: each column's error is pushed onto the
columns that are still open (GPTQ). Then sweeps: each code in turn to the level nearest to its optimum given all
others, and each block's norm to its own, neither of which can raise the cost.

Source: E. Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, 2023.
"""

from dataclasses import dataclass

import torch

from polar_kernels.errors import ArgumentError, QuantizationError
from polar_kernels.hadamard import BLOCK_SIZE, pad_blocks, transform_blocks

DAMPING = 0.01  # of the mean moment, added to all: columns that calibration hardly saw are not left to drift
SWEEPS = 2
_MORE_DAMPING = 10.0  # times, where the moments are too close to singular to be factorised
_TRIES = 6
_MIN_NORM_CHANGE = -0.5  # of a norm, in one step: it must stay positive


@dataclass(frozen=True)
class Feedback:
    """What the moments of a layer's inputs give: all [Kp, Kp] fp32 but the order.

    moments: of the rotated inputs, damped. order: int64 [Kp], the columns with the largest moments first. factor: upper
    Cholesky factor of the inverse of the moments in that order.
    """

    moments: torch.Tensor
    order: torch.Tensor
    factor: torch.Tensor


def prepare_feedback(
    moments: torch.Tensor, columns: int, awq_scales: torch.Tensor | None, device: torch.device
) -> Feedback:
    """moments: [K, K] float, E[x x^T] of the layer's inputs as the model has them, up to a factor.

    Raises ArgumentError for another shape, QuantizationError for moments with NaN or infinity or of no inputs at all.
    """
    if tuple(moments.shape) != (columns, columns) or not moments.is_floating_point():
        raise ArgumentError(
            f"moments must be float [{columns}, {columns}], found {moments.dtype} {list(moments.shape)}"
        )
    rotated = _rotate(moments.to(device, torch.float64), awq_scales)
    mean = rotated.diagonal().mean()
    if not rotated.isfinite().all() or mean <= 0:
        raise QuantizationError("the moments of the layer's inputs have NaN or infinite elements, or are all zero")
    order = rotated.diagonal().argsort(descending=True, stable=True)
    damping = DAMPING
    for _ in range(_TRIES):
        damped = rotated + damping * mean * torch.eye(len(rotated), dtype=rotated.dtype, device=device)
        inverse, singular = torch.linalg.inv_ex(damped[order][:, order])
        factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not singular and not failed and factor.isfinite().all():
            return Feedback(damped.float(), order, factor.float())
        damping *= _MORE_DAMPING
    raise QuantizationError("the moments of the layer's inputs are not positive semi-definite")


def _rotate(moments: torch.Tensor, awq_scales: torch.Tensor | None) -> torch.Tensor:
    """Moments of (x / awq_scales) H, padded."""
    if awq_scales is not None:
        scales = awq_scales.to(moments)
        moments = moments / scales[:, None] / scales
    once = transform_blocks(pad_blocks(moments))
    return transform_blocks(pad_blocks(once.T))


def refine(
    z: torch.Tensor, codes: torch.Tensor, norms: torch.Tensor, table: torch.Tensor, feedback: Feedback
) -> tuple[torch.Tensor, torch.Tensor]:
    """Better codes int64 [N, Kp] and norms fp32 [N, Kp / 128], of fp16 values, for rotated rows z fp32 [N, Kp].

    z is in units in which a code stands for norm * level. codes, norms: those to start from; a row keeps them where
    they cost less. Blocks whose norm is zero stay as they are.
    """
    start = codes.long(), norms.half().float()
    found = _push_errors(z, start[1], table, feedback)
    better = found, start[1].clone()
    for _ in range(SWEEPS):
        better = _sweep(z, *better, table, feedback.moments)
    gained = _cost(z, *better, table, feedback.moments) < _cost(z, *start, table, feedback.moments)
    return torch.where(gained[:, None], better[0], start[0]), torch.where(gained[:, None], better[1], start[1])


def _nearest(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return torch.bucketize(values, (table[1:] + table[:-1]) / 2)


def _per_column(norms: torch.Tensor) -> torch.Tensor:
    return norms.repeat_interleave(BLOCK_SIZE, 1)


def _divisors(norms: torch.Tensor) -> torch.Tensor:
    """Norms to divide by: of a block of zeros any, since its levels count for nothing."""
    return torch.where(norms > 0, norms, 1.0)


def _push_errors(z: torch.Tensor, norms: torch.Tensor, table: torch.Tensor, feedback: Feedback) -> torch.Tensor:
    order, factor = feedback.order, feedback.factor
    open_columns, scales = z[:, order], _per_column(norms)[:, order]
    divisors = _divisors(scales)
    codes = torch.empty_like(open_columns, dtype=torch.long)
    for start in range(0, len(order), BLOCK_SIZE):
        span = slice(start, start + BLOCK_SIZE)
        block, errors = open_columns[:, span].clone(), torch.empty_like(open_columns[:, span])
        own = factor[span, span]
        for j in range(block.shape[1]):
            chosen = _nearest(block[:, j] / divisors[:, start + j], table)
            codes[:, start + j] = chosen
            errors[:, j] = (block[:, j] - table[chosen] * scales[:, start + j]) / own[j, j]
            block[:, j + 1 :] -= errors[:, j, None] * own[j, j + 1 :]
        open_columns[:, span.stop :] -= errors @ factor[span, span.stop :]
    unordered = torch.empty_like(codes)
    unordered[:, order] = codes
    return unordered


def _sweep(
    z: torch.Tensor, codes: torch.Tensor, norms: torch.Tensor, table: torch.Tensor, moments: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each code, and after those of a block its norm, to the optimum given all others."""
    codes, norms = codes.clone(), norms.clone()
    pull = (z - table[codes] * _per_column(norms)) @ moments
    for index in range(norms.shape[1]):
        span = slice(index * BLOCK_SIZE, (index + 1) * BLOCK_SIZE)
        own, norm = moments[span, span], norms[:, index].clone()
        levels, near = table[codes[:, span]], pull[:, span].clone()
        before = levels * norm[:, None]
        divisor = _divisors(norm)
        for j in range(BLOCK_SIZE):
            value = levels[:, j] * norm
            chosen = _nearest((value + near[:, j] / own[j, j]) / divisor, table)
            chosen = torch.where(norm > 0, chosen, codes[:, span.start + j])
            near -= (table[chosen] * norm - value)[:, None] * own[j]
            codes[:, span.start + j], levels[:, j] = chosen, table[chosen]
        change = (levels * near).sum(1) / ((levels @ own) * levels).sum(1)
        moved = (norm + change.maximum(_MIN_NORM_CHANGE * norm)).half().float()
        norms[:, index] = torch.where(norm > 0, moved, norm)
        pull -= (levels * norms[:, index, None] - before) @ moments[span]
    return codes, norms


def _cost(
    z: torch.Tensor, codes: torch.Tensor, norms: torch.Tensor, table: torch.Tensor, moments: torch.Tensor
) -> torch.Tensor:
    """[N], of each row."""
    error = z - table[codes] * _per_column(norms)
    return ((error @ moments) * error).sum(1)
