"""Hands versions to one engine of this process, a given number of updates late."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mentor_serve.engines import TorchEngine
from mentor_serve.errors import WeightsError
from mentor_serve.types import Guidance
from mentor_serve.weights import PublishReport, Snapshot, read_snapshot, snapshot_path


class LaggingBroadcaster:
    """`Broadcaster` to an engine that samples with the weights of `lag` updates ago.

    0 is a service that always waits for its learner. With a lag the oldest kept version stays in
    the engine, so the first updates are all sampled by version 0.
    """

    def __init__(self, engine: TorchEngine, *, lag: int, weights_dir: Path) -> None:
        self._engine = engine
        self._lag = lag
        self._weights_dir = weights_dir
        self._kept: deque[Snapshot] = deque(maxlen=lag + 1)

    @property
    def guidance(self) -> Guidance:
        """What the engine's weights are to be sampled under."""
        return self._kept[0].guidance

    def publish(self, snapshot: Snapshot) -> PublishReport:
        """Take the newest version; the engine gets the one that is due.

        Raises:
            WeightsError: after a restart, a version that the engine needs is not on disk any more.
        """
        if not self._kept:
            for version in range(max(0, snapshot.version - self._lag), snapshot.version):
                self._kept.append(read_snapshot(snapshot_path(self._weights_dir, version)))
        if not self._kept or self._kept[-1].version != snapshot.version:
            self._kept.append(snapshot)
        self._load(self._kept[0])
        return PublishReport(version=snapshot.version, num_replicas=1)

    @contextmanager
    def newest(self) -> Iterator[None]:
        """Meanwhile the engine has the newest version: what an evaluation is of."""
        self._load(self._kept[-1])
        try:
            yield
        finally:
            self._load(self._kept[0])

    def _load(self, snapshot: Snapshot) -> None:
        if snapshot.state_dict is None:
            raise WeightsError(f"expected version {snapshot.version} with its weights, got none")
        self._engine.load_weights(snapshot.state_dict, version=snapshot.version)
