"""Checkpoint files of backends whose ranks all hold the whole model.

One format, so a run can go on under another such backend or number of ranks: the weights under raw
names as safetensors, AdamW's state as a torch file that holds tensors and plain values only.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mentor_serve.errors import WeightsError
from mentor_serve.learner.trainable import Trainable

_WEIGHTS = "weights.safetensors"
_OPTIMIZER = "optimizer.pt"


def save_training_state(
    directory: Path, trainable: Trainable, optimizer: torch.optim.Optimizer
) -> None:
    """Write weights and moments into an existing directory."""
    raw = {name: item.contiguous() for name, item in trainable.raw_tensors().items()}
    save_file(raw, directory / _WEIGHTS, metadata={"format": "pt"})
    torch.save(optimizer.state_dict(), directory / _OPTIMIZER)


def load_training_state(
    directory: Path, trainable: Trainable, optimizer: torch.optim.Optimizer
) -> None:
    """Restore what `save_training_state` wrote.

    Raises:
        WeightsError: not such a checkpoint, or another model's.
    """
    require_training_state(directory)
    trainable.load_raw(load_file(directory / _WEIGHTS))
    load_moments(directory, optimizer)


def load_moments(directory: Path, optimizer: torch.optim.Optimizer) -> None:
    """Restore the moments; learning rate and weight decay stay the optimiser's own.

    Raises:
        WeightsError: not such a checkpoint.
    """
    require(directory, _OPTIMIZER)
    # On the CPU first: the optimiser moves each tensor to its parameter's device.
    state = torch.load(directory / _OPTIMIZER, map_location="cpu", weights_only=True)
    # A changed setting must count after a restart, so only the moments are taken over.
    state["param_groups"] = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(state)


def require_training_state(directory: Path) -> None:
    """Check that `save_training_state` wrote this directory.

    Raises:
        WeightsError: it did not.
    """
    require(directory, _WEIGHTS, _OPTIMIZER)


def require(directory: Path, *names: str) -> None:
    """Check that a checkpoint holds these files.

    Raises:
        WeightsError: one is missing: another backend wrote the checkpoint.
    """
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        found = sorted(item.name for item in directory.iterdir()) if directory.is_dir() else []
        raise WeightsError(
            f"expected {missing} in {directory}, found {found[:5]}: another backend wrote this "
            "checkpoint; set learner.backend back, or remove the run's checkpoints to go on from "
            "the snapshot of its newest version"
        )
