"""What a checkpoint is known by: a digest of all that its weights and its structure are made of."""

import hashlib
from pathlib import Path

import torch

from model_patch.errors import CheckpointError
from model_patch.progress import Progress, no_progress


def checkpoint_fingerprint(folder: Path, progress: Progress = no_progress) -> str:
    """SHA-256 of the names and contents of config.json and of all safetensors files of a folder, which it reads."""
    digest = hashlib.sha256()
    files = sorted([folder / "config.json", *folder.glob("*.safetensors")])
    for index, path in enumerate(files):
        digest.update(f"{path.name}:{file_digest(path)}\n".encode())
        progress(index + 1, len(files), path.name)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error


def tokens_digest(tokens: torch.Tensor) -> str:
    """SHA-256 of token ids."""
    return hashlib.sha256(tokens.to("cpu", torch.int64).contiguous().numpy().tobytes()).hexdigest()


def differences(expected: dict[str, object], found: object) -> list[str]:
    """Keys of two records of fingerprints and options in which they differ; all of them for what is no record."""
    known = found if isinstance(found, dict) else {}
    return sorted(key for key in expected.keys() | known.keys() if expected.get(key) != known.get(key))
