"""Where large tensors go: to the device, the host, or a file, by what is free."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from model_patch import OutputError
from model_patch.quantize import storage
from model_patch.quantize.storage import roomy_empty

SHAPE = (3, 5, 7)
NBYTES = 2 * 3 * 5 * 7


@pytest.mark.parametrize("free", [500 + NBYTES, 500 + NBYTES - 1])
def test_half_of_the_memory_stays_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int) -> None:
    files = []
    monkeypatch.setattr(storage, "free_memory", lambda device: free)
    monkeypatch.setattr(storage, "total_memory", lambda device: 1000)
    mapped = storage._mapped
    monkeypatch.setattr(storage, "_mapped", lambda *args: files.append(args) or mapped(*args))
    monkeypatch.setattr(storage.tempfile, "tempdir", str(tmp_path))
    tensor = roomy_empty(SHAPE, torch.bfloat16, torch.device("cpu"))
    assert len(files) == (0 if free == 500 + NBYTES else 1)
    assert (tensor.shape, tensor.dtype, tensor.device.type) == (SHAPE, torch.bfloat16, "cpu")
    expected = torch.randn(SHAPE).bfloat16()
    tensor.copy_(expected)
    assert torch.equal(tensor, expected)
    assert list(tmp_path.iterdir()) == []  # the name of a file is gone at once


def test_the_host_comes_before_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def free(device: torch.device) -> int:
        asked.append(device.type)
        return 0 if device.type == "cuda" else 10**9

    monkeypatch.setattr(storage, "free_memory", free)
    monkeypatch.setattr(storage, "total_memory", lambda device: 10**9)
    assert roomy_empty(SHAPE, torch.float32, torch.device("cuda")).device.type == "cpu"
    assert asked == ["cuda", "cpu"]


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage, "free_memory", lambda device: 0)
    monkeypatch.setattr(storage.os, "posix_fallocate", refuse)
    monkeypatch.setattr(storage.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(OutputError, match=r"210 bytes that do not fit .* No space left on device; set TMPDIR"):
        roomy_empty(SHAPE, torch.bfloat16, torch.device("cpu"))
    assert list(tmp_path.iterdir()) == []


def test_what_is_free(device: torch.device) -> None:
    assert 0 < storage.free_memory(device) <= storage.total_memory(device) < 1 << 50


def test_calibration_from_files(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept in files comes out as what is kept in memory."""
    from model_patch.quantize.moments import collect_moments

    model, windows = zoo.model("qwen3"), torch.randint(0, 500, (2, 16))
    sites = {"down": ["model.layers.0.mlp.down_proj"]}
    expected = collect_moments(model, windows, sites).of_site["down"]
    monkeypatch.setattr(storage, "free_memory", lambda device: 0)
    assert torch.equal(collect_moments(model, windows, sites).of_site["down"], expected.cpu())
