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
        damped = rotated.clone()
        damped.diagonal().add_(damping * mean)
        factor = _inverse_factor(damped[order][:, order])
        if factor is not None:
            return Feedback(damped.float(), order, factor.float())
        damping *= _MORE_DAMPING
    raise QuantizationError("the moments of the layer's inputs are not positive semi-definite")


def _inverse_factor(moments: torch.Tensor) -> torch.Tensor | None:
    """Upper U with U^T U = moments^-1, or None where they are not positive definite.

    With moments = V V^T, V upper, U is V^-1; V is the lower Cholesky factor of the moments back to front.
    """
    lower, failed = torch.linalg.cholesky_ex(moments.flip(0, 1))
    if failed:
        return None
    eye = torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    factor = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
    return factor if factor.isfinite().all() else None


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


def settle(
    targets: torch.Tensor,
    before: torch.Tensor | None,
    scales: torch.Tensor,
    coupling: torch.Tensor,
    table: torch.Tensor,
) -> torch.Tensor:
    """Codes int64 [N, 128] of columns that are settled one after the other, each to the level nearest to its target.

    targets: fp32 [N, 128], corrected in place: column j changes by d = level * scale - before, and the targets by
    -d * coupling[j]. before: [N, 128], or None for the targets as they are then, with coupling to later columns alone.
    scales: [N, 128].
    """
    if targets.is_cuda:
        from polar_kernels.kernels.settle import settle as settle_on_gpu

        return settle_on_gpu(targets, before, scales, coupling, table)
    divisors = _divisors(scales)
    codes = torch.empty_like(targets, dtype=torch.long)
    for j in range(targets.shape[1]):
        target = targets[:, j].clone()
        codes[:, j] = _nearest(target / divisors[:, j], table)
        change = table[codes[:, j]] * scales[:, j] - (target if before is None else before[:, j])
        ahead = 0 if before is not None else j + 1  # pushed errors go to later columns alone
        targets[:, ahead:] -= change[:, None] * coupling[j, ahead:]
    return codes


def _push_errors(z: torch.Tensor, norms: torch.Tensor, table: torch.Tensor, feedback: Feedback) -> torch.Tensor:
    order, factor = feedback.order, feedback.factor
    open_columns, scales = z[:, order], _per_column(norms)[:, order]
    codes = torch.empty_like(open_columns, dtype=torch.long)
    for start in range(0, len(order), BLOCK_SIZE):
        span = slice(start, start + BLOCK_SIZE)
        own, block = factor[span, span], open_columns[:, span].contiguous()
        codes[:, span] = settle(block, None, scales[:, span], -(own / own.diagonal()[:, None]).triu(1), table)
        errors = (block - table[codes[:, span]] * scales[:, span]) / own.diagonal()
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
        own, norm = moments[span, span], norms[:, index, None]
        before = table[codes[:, span]] * norm
        coupling = own / own.diagonal()
        found = settle(
            before + pull[:, span] / own.diagonal(),
            before,
            norm.expand(-1, BLOCK_SIZE),
            coupling - coupling.diagonal().diag(),
            table,
        )
        codes[:, span] = torch.where(norm > 0, found, codes[:, span])
        levels = table[codes[:, span]]
        near = pull[:, span] - (levels * norm - before) @ own
        change = (levels * near).sum(1, keepdim=True) / ((levels @ own) * levels).sum(1, keepdim=True)
        moved = (norm + change.maximum(_MIN_NORM_CHANGE * norm)).half().float()
        norms[:, index, None] = torch.where(norm > 0, moved, norm)
        pull -= (levels * norms[:, index, None] - before) @ moments[span]
    return codes, norms


def _cost(
    z: torch.Tensor, codes: torch.Tensor, norms: torch.Tensor, table: torch.Tensor, moments: torch.Tensor
) -> torch.Tensor:
    """[N], of each row."""
    error = z - table[codes] * _per_column(norms)
    return ((error @ moments) * error).sum(1)
