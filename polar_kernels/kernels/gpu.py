"""What a GPU can do, as far as the kernels of the tile layout ask."""

from functools import cache

import torch


def supports(device: torch.device) -> bool:
    """Whether the kernels of the tile layout run on this device: NVIDIA, Hopper or newer."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def has_wgmma(device: torch.device) -> bool:
    """Hopper's instruction, which later GPUs do not have."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
