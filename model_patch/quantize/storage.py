"""Where the large tensors of a calibration are kept: on the device, in the host's memory, or in files."""

import os
import tempfile

import torch

from model_patch.errors import OutputError

_LEFT_FREE = 0.5  # of all memory: what is kept must leave room for the work


def free_memory(device: torch.device) -> int:
    """Bytes; what torch holds on a GPU and does not use is free, and what the host holds of files that it may drop."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def total_memory(device: torch.device) -> int:
    """Bytes, free or not."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def roomy_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor: on `device` where half of its memory stays free, else on the host likewise, else in a
    file in the folder for temporary ones (TMPDIR), which goes with the tensor.

    Raises OutputError when the file has no room either.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    for place in (device, torch.device("cpu")):
        if free_memory(place) - size >= _LEFT_FREE * total_memory(place):
            return torch.empty(shape, dtype=dtype, device=place)
    return _mapped(shape, dtype, size)


def _mapped(shape: tuple[int, ...], dtype: torch.dtype, size: int) -> torch.Tensor:
    with tempfile.NamedTemporaryFile(prefix="polar-") as file:  # its name goes at once, its room with the tensor
        try:
            os.posix_fallocate(
                file.fileno(), 0, size
            )  # a full disk would otherwise kill the process when it is written
        except OSError as error:
            problem = f"{size} bytes that do not fit the memory could not be had: {error.strerror}"
            raise OutputError(f"{tempfile.gettempdir()}: {problem}; set TMPDIR to a folder with room") from error
        elements = torch.Size(shape).numel()
        return torch.from_file(file.name, shared=True, size=elements, dtype=dtype).view(shape)
