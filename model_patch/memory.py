"""The most memory that this process has held."""

import resource
import sys

import torch

_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """Bytes so far: `host`, resident, pages of mapped files among them; `gpu`, allocated by torch on `device`, None for
    a CPU."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
    return {"host": host, "gpu": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None}
