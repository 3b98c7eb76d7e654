"""Checkpoints of the learner: everything a restart needs to go on as if nothing had happened.

`<checkpoints_dir>/v000012/` holds `backend/` (model and optimiser, as the backend saves them),
`rng.pt` and `checkpoint.json` with a SHA-256 of every file. A checkpoint appears whole or not at
all. Which checkpoint counts is decided by the store's last committed version, never by what lies
in the directory.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mentor_serve.errors import WeightsError
from mentor_serve.weights.directories import (
    atomic_directory,
    directory_name,
    file_sha256,
    versions_in,
)
from mentor_serve.weights.snapshots import verify_file

BACKEND = "backend"
_MANIFEST = "checkpoint.json"
_RNG = "rng.pt"
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """Where training stands after an update."""

    version: int
    step: int
    """Updates made so far."""
    alpha: float
    """Weight of the mixed advantages in the next update (Eq. 11)."""
    gamma: float
    """gamma_p for rollouts of this version."""
    parent_version: int | None = None


def checkpoint_path(checkpoints_dir: Path, version: int) -> Path:
    """Directory of a version's checkpoint."""
    return checkpoints_dir / directory_name(version)


def write_checkpoint(
    checkpoints_dir: Path, *, state: TrainingState, save_backend: Callable[[Path], None]
) -> Path:
    """Write a checkpoint with the process's random number generators; returns its directory.

    Raises:
        WeightsError: the version has a checkpoint already.
    """
    path = checkpoint_path(checkpoints_dir, state.version)
    with atomic_directory(path) as staging:
        (staging / BACKEND).mkdir()
        save_backend(staging / BACKEND)
        torch.save(_capture_rng(), staging / _RNG)
        files = [file for file in sorted(staging.rglob("*")) if file.is_file()]
        manifest = {
            "format": _FORMAT,
            "state": asdict(state),
            "created_at": datetime.now(UTC).isoformat(),
            "files": {file.relative_to(staging).as_posix(): file_sha256(file) for file in files},
        }
        (staging / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return path


def read_checkpoint(path: Path) -> TrainingState:
    """Check every file of a checkpoint and return its state; `path / BACKEND` is then loadable.

    Raises:
        WeightsError: missing or damaged; the message names the file.
    """
    file = path / _MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            raise WeightsError(f"{file}: expected format {_FORMAT}, got {manifest['format']}")
        for name, sha256 in manifest["files"].items():
            verify_file(path / name, sha256)
        return TrainingState(**manifest["state"])
    except OSError as error:
        raise WeightsError(f"checkpoint {path} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{file} is damaged: {error!r}") from error


def newest_intact(checkpoints_dir: Path, *, up_to: int) -> Path | None:
    """The newest readable checkpoint of a version not above `up_to`, if there is one."""
    for version, path in reversed(versions_in(checkpoints_dir).items()):
        if version <= up_to and is_intact(path):
            return path
    return None


def is_intact(path: Path) -> bool:
    """Whether every file of the checkpoint is as it was written."""
    try:
        read_checkpoint(path)
    except WeightsError:
        return False
    return True


def restore_rng(path: Path) -> None:
    """Set torch's, numpy's and Python's generators to what the checkpoint at `path` recorded."""
    state: dict[str, Any] = torch.load(path / _RNG, weights_only=True)
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, position, has_gauss, cached_gauss = state["numpy"]
    np.random.set_state((name, state["numpy_keys"].numpy(), position, has_gauss, cached_gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


def _capture_rng() -> dict[str, Any]:
    # Tensors and plain values only, so that loading never unpickles code.
    name, keys, position, has_gauss, cached_gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (name, int(position), int(has_gauss), float(cached_gauss)),
        "numpy_keys": torch.from_numpy(np.asarray(keys)),
        "python": random.getstate(),
    }
