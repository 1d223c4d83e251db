"""The 128-point Walsh-Hadamard transform that spreads a block's outliers over all its coordinates."""

import math
from functools import cache

import torch

BLOCK_SIZE = 128


@cache
@torch.inference_mode(False)
def hadamard_matrix(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """H [128, 128]: natural (Sylvester) order divided by sqrt(128), so H = H^T = H^-1. Shared: do not write to it."""
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")  # not torch's default device
    while matrix.shape[0] < BLOCK_SIZE:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / math.sqrt(BLOCK_SIZE)).to(device=device, dtype=dtype)


def transform_blocks(x: torch.Tensor) -> torch.Tensor:
    """Transform each run of 128 along the last dimension of x [..., n * 128]; its own inverse."""
    blocks = x.unflatten(-1, (-1, BLOCK_SIZE))
    with torch.autocast(x.device.type, enabled=False):  # which would round the operands
        return (blocks @ hadamard_matrix(x.dtype, x.device)).flatten(-2)


def padded_size(features: int) -> int:
    """`features` rounded up to whole blocks."""
    return -(-features // BLOCK_SIZE) * BLOCK_SIZE


def pad_blocks(x: torch.Tensor) -> torch.Tensor:
    """Zero-pad the last dimension of x to whole blocks."""
    return torch.nn.functional.pad(x, (0, padded_size(x.shape[-1]) - x.shape[-1]))
