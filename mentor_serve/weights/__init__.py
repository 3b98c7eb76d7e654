"""Weight snapshots on disk and the contract of handing them to the replicas that serve."""

from __future__ import annotations

from mentor_serve.weights.publisher import Broadcaster, PublishReport
from mentor_serve.weights.snapshots import (
    Snapshot,
    SnapshotLabel,
    discard_after,
    list_snapshots,
    prune_snapshots,
    read_manifest,
    read_snapshot,
    snapshot_path,
    write_snapshot,
)

__all__ = [
    "Broadcaster",
    "PublishReport",
    "Snapshot",
    "SnapshotLabel",
    "discard_after",
    "list_snapshots",
    "prune_snapshots",
    "read_manifest",
    "read_snapshot",
    "snapshot_path",
    "write_snapshot",
]
