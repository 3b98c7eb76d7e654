"""The learner's durable side: which state is the truth, and how to get back to it.

The truth is the newest version in the store, which one transaction adds together with the update
that made it. Checkpoint and snapshot are written before that transaction, so both exist for every
version in the store, and whatever is newer on disk belongs to an update that never happened.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mentor_serve.errors import WeightsError
from mentor_serve.learner.backends.base import TrainingBackend
from mentor_serve.learner.checkpoint import (
    BACKEND,
    TrainingState,
    checkpoint_path,
    newest_intact,
    read_checkpoint,
    restore_rng,
    write_checkpoint,
)
from mentor_serve.learner.records import snapshot_label
from mentor_serve.store.records import VersionRecord
from mentor_serve.weights.directories import discard_newer, prune, remove_directory
from mentor_serve.weights.snapshots import (
    WEIGHTS,
    Snapshot,
    discard_after,
    list_snapshots,
    prune_snapshots,
    read_manifest,
    read_snapshot,
    snapshot_path,
    verify_file,
    write_snapshot,
)

_log = logging.getLogger(__name__)

PolicyLoader = Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase | None]]
Notify = Callable[[str, str], None]
"""Called with an event's kind and message."""


class LearnerArchive:
    """Checkpoints and snapshots of one run, and the backend that they are made of."""

    def __init__(
        self,
        *,
        run_id: str,
        backend: TrainingBackend,
        load_policy: PolicyLoader,
        weights_dir: Path,
        checkpoints_dir: Path,
        notify: Notify,
    ) -> None:
        self._run_id = run_id
        self._backend = backend
        self._load_policy = load_policy
        self._weights_dir = weights_dir
        self._checkpoints_dir = checkpoints_dir
        self._notify = notify
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def build(self) -> None:
        """Load the initial policy into the backend.

        Raises:
            WeightsError: the weights directory holds another run's snapshots.
        """
        for snapshot in list_snapshots(self._weights_dir):
            if snapshot.run_id not in (None, self._run_id):
                raise WeightsError(
                    f"expected {self._weights_dir} to hold snapshots of run {self._run_id}, but "
                    f"{snapshot.path.name} belongs to run {snapshot.run_id}; give each run a "
                    "directory of its own, or move the old one away"
                )
        model, self._tokenizer = self._load_policy()
        self._backend.build(model)

    def discard_newer(self, version: int) -> None:
        """Remove what a crashed or failed update left on disk above `version`."""
        checkpoints = discard_newer(self._checkpoints_dir, version)
        snapshots = discard_after(self._weights_dir, version)
        if checkpoints or snapshots:
            _log.info("removed checkpoints %s and snapshots %s", checkpoints, snapshots)

    def seed(self, seed: int) -> None:
        """Seed the generators of a run that starts; later starts restore them."""
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)

    def save(self, state: TrainingState, *, with_checkpoint: bool) -> Snapshot:
        """Write checkpoint, then snapshot; both are durable when this returns."""
        if with_checkpoint:
            write_checkpoint(self._checkpoints_dir, state=state, save_backend=self._backend.save)
        return self._write_snapshot(state)

    def restore(self, record: VersionRecord) -> tuple[TrainingState, Snapshot]:
        """Bring the backend to a committed version; the snapshot holds its weights.

        Without a checkpoint of the version that the backend can load (damaged, or written by
        another backend or number of ranks), the weights come from its snapshot and the optimiser's
        moments from the newest older checkpoint, if that can be loaded.

        Raises:
            WeightsError: neither checkpoint nor snapshot of the version can be read.
        """
        state = TrainingState(
            version=record.version,
            step=record.step,
            alpha=record.alpha,
            gamma=record.gamma,
            parent_version=record.parent_version,
        )
        path = checkpoint_path(self._checkpoints_dir, record.version)
        try:
            read_checkpoint(path)
            self._backend.load(path / BACKEND)
            restore_rng(path)
        except WeightsError as error:
            self._restore_from_snapshot(record, reason=str(error))
        return state, self._intact_snapshot(record, state)

    def load_version(self, version: int) -> Snapshot:
        """Put the weights of a kept snapshot into the backend, with fresh optimiser moments."""
        snapshot = read_snapshot(snapshot_path(self._weights_dir, version))
        self._backend.load_weights(snapshot.state_dict or {})
        return snapshot

    def prune(self, *, keep_checkpoints: int, keep_snapshots: int, version: int) -> None:
        """Keep the newest checkpoints, and `keep_snapshots` snapshots beside `version`."""
        prune(self._checkpoints_dir, keep=keep_checkpoints, protect={version})
        prune_snapshots(self._weights_dir, keep=keep_snapshots + 1, protect={version})

    def _restore_from_snapshot(self, record: VersionRecord, *, reason: str) -> None:
        self._check_hash(record)
        self.load_version(record.version)
        older = newest_intact(self._checkpoints_dir, up_to=record.version - 1)
        moments = "fresh moments"
        if older is not None:
            try:
                self._backend.load_optimizer(older / BACKEND)
            except WeightsError:  # the same reason as for the newest one
                self.load_version(record.version)
            else:
                restore_rng(older)
                moments = f"the optimiser of {older.name}"
        self._notify(
            "checkpoint_unusable",
            f"version {record.version} goes on from its snapshot with {moments}: {reason}",
        )

    def _intact_snapshot(self, record: VersionRecord, state: TrainingState) -> Snapshot:
        """The version's snapshot with the backend's weights, written again where it is damaged."""
        path = snapshot_path(self._weights_dir, record.version)
        try:
            self._check_hash(record)
        except WeightsError as error:
            self._notify("snapshot_rewritten", f"from the checkpoint of the same version: {error}")
            if path.exists():
                remove_directory(path)
            return self._write_snapshot(state)
        return read_manifest(path).with_weights(self._backend.full_state())

    def _check_hash(self, record: VersionRecord) -> None:
        path = snapshot_path(self._weights_dir, record.version)
        found = read_manifest(path)
        expected = record.sha256 or found.sha256
        try:
            verify_file(path / WEIGHTS, expected)
        except OSError as error:
            raise WeightsError(f"{path / WEIGHTS} cannot be read: {error}") from error

    def _write_snapshot(self, state: TrainingState) -> Snapshot:
        return write_snapshot(
            self._weights_dir,
            label=snapshot_label(state, run_id=self._run_id),
            model=self._backend.model,
            state_dict=self._backend.full_state(),
            tokenizer=self._tokenizer,
        )
