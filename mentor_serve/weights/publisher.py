"""The contract between the learner, which makes versions, and whoever hands them to replicas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from mentor_serve.weights.snapshots import Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishReport:
    """What became of one version."""

    version: int
    num_replicas: int
    """Replicas that now generate with this version."""
    num_dropped: int = 0
    """Replicas that did not take it and were taken out of service."""
    duration_s: float = 0.0


class Broadcaster(Protocol):
    """Hands a snapshot to every policy replica."""

    def publish(self, snapshot: Snapshot) -> PublishReport:
        """Return once every replica generates with `snapshot` or was dropped.

        `snapshot.state_dict` is present. Publishing the same version again is harmless: the
        learner does so after a restart and after a failed attempt.

        Raises:
            WeightsError: time-out or refusal, with the other side's error; the version then does
                not count as published.
        """
