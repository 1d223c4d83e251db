"""Work that survives an interruption: what calibration found and the shards that are done, beside the output.

The folder .<output>.resume holds resume.json, a record of all that the result hangs on; calibrated.safetensors; and
checkpoint/, which becomes the output. All is written under another name and renamed, so that what is there is whole. A
run with another record is refused: its shards would not belong to those that are there. So is one while another is at
work, which holds the lock .<output>.resume.lock.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model_patch.checkpoint.fingerprint import checkpoint_fingerprint, differences, file_digest
from model_patch.checkpoint.writer import check_output, write_json
from model_patch.config import PolarQuantConfig
from model_patch.errors import CheckpointError, ConfigError, OutputError
from model_patch.progress import Progress, no_progress
from model_patch.quantize.calibrated import Calibrated
from model_patch.quantize.checkpoint import QuantizePlan, plan_checkpoint
from polar_kernels.version import __version__

_RECORD, _CALIBRATED = "resume.json", "calibrated.safetensors"


def make_record(
    source: Path,
    calibration: Path | None,
    device: torch.device,
    options: Mapping[str, object],
    progress: Progress = no_progress,
) -> dict[str, object]:
    """What the result hangs on: the source's content, the options, the text, versions and the kind of device."""
    return {
        "source": checkpoint_fingerprint(source, progress),
        "calibration text": None if calibration is None else file_digest(calibration),
        "version": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device.type,
        **options,
    }


@dataclass(frozen=True)
class KeptWork:
    """folder: of the work for one output, which is there once something was saved; record: of this run."""

    folder: Path
    record: Mapping[str, object]

    @property
    def checkpoint(self) -> Path:
        """The folder that becomes the output."""
        return self.folder / "checkpoint"

    def save(self, plan: QuantizePlan, calibrated: Calibrated) -> None:
        """Keep a plan's config and what calibration found, once for each site."""
        tensors = {
            f"{kind}.{site}": found[names[0]].cpu().contiguous()
            for kind, found in _kinds(calibrated).items()
            for site, names in plan.layers.sites().items()
            if names[0] in found
        }
        fresh = self.folder.with_name(f"{self.folder.name}-{os.getpid()}")
        try:
            fresh.mkdir(parents=True)
            save_file(tensors, fresh / _CALIBRATED, {"config": json.dumps(plan.config.to_dict())})
            write_json(fresh / _RECORD, self.record)
            os.replace(fresh, self.folder)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{self.folder}: could not be written: {error}") from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def load(self, source: Path) -> tuple[QuantizePlan, Calibrated] | None:
        """What an earlier run has saved of a checkpoint, or None when there was none that came so far."""
        if not self.folder.exists():
            return None
        path = self.folder / _CALIBRATED
        try:
            with safe_open(path, "pt") as file:
                config = PolarQuantConfig(**json.loads(file.metadata()["config"]))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dictionary)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(path, f"cannot be read: {error}; delete {self.folder} to begin again") from error
        plan, calibrated = plan_checkpoint(source, config, config.awq), Calibrated()
        for site, names in plan.layers.sites().items():
            for kind, found in _kinds(calibrated).items():
                if (tensor := tensors.get(f"{kind}.{site}")) is not None:
                    found.update(dict.fromkeys(names, tensor))
        return plan, calibrated

    def delete(self) -> None:
        """To be called when the output is written."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _kinds(calibrated: Calibrated) -> dict[str, dict[str, torch.Tensor]]:
    return {"awq_scales": calibrated.awq_scales, "moments": calibrated.moments}


@contextmanager
def open_work(out: Path, overwrite: bool, record: Mapping[str, object]) -> Iterator[KeptWork]:
    """The work for the output `out`: that of an interrupted run with the same record, or none yet.

    Raises ConfigError naming what differs from the interrupted run, OutputError for an output that may not be written,
    or that another process is at work on.
    """
    check_output(out, overwrite)
    folder = out.parent / f".{out.name}.resume"
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise OutputError(f"{out}: another process is at work on it, and holds {lock.lock_file}") from error
    except OSError as error:
        raise OutputError(f"{lock.lock_file}: could not be written: {error}") from error
    try:
        yield _open(folder, out, record)
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _open(folder: Path, out: Path, record: Mapping[str, object]) -> KeptWork:
    if folder.exists() and (different := differences(dict(record), _read_record(folder / _RECORD))):
        raise ConfigError(
            f"{out}: the interrupted work in {folder} is of another {', '.join(different)}: give the same as then, or "
            "delete that folder to begin again"
        )
    return KeptWork(folder, record)


def _read_record(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(path, f"cannot be read: {error}; delete {path.parent} to begin again") from error
