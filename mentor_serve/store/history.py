"""What a run stored about its groups and updates, for computing them again. Read-only.

Unlike a lease, reading takes a group of any status, and changes nothing.
"""

from __future__ import annotations

from dataclasses import fields
from types import TracebackType
from typing import Any, Self

from sqlalchemy import select

from mentor_serve.store import leases, reads
from mentor_serve.store.connection import open_engine, reading
from mentor_serve.store.models import RolloutGroup, Run, Trajectory, Update
from mentor_serve.store.records import LeasedGroup, TrajectoryRecord, UpdateRecord

_UPDATE_FIELDS = tuple(field.name for field in fields(UpdateRecord))


class RunHistory:
    """Reads of one run of one database; close it, or use it as a context manager.

    Every method raises `StoreError` when the database cannot be read.
    """

    def __init__(self, url: str, run_id: str, *, timeout_s: float = 30.0) -> None:
        """Connect lazily. `timeout_s` is how long a query waits for a lock."""
        self._url = url
        self._run_id = run_id
        self._engine = open_engine(url, timeout_s=timeout_s, read_only=True)

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        """The history itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def config(self) -> dict[str, Any]:
        """The settings of the run's last start; secrets are masked in them."""
        query = select(Run.config_json).where(Run.id == self._run_id)
        with reading(self._engine, self._url, doing="reading the run's settings") as connection:
            config: dict[str, Any] = connection.scalars(query).one()
            return config

    def update(self, step: int) -> UpdateRecord | None:
        """The update of a step, if there is one."""
        query = select(Update).where(Update.run_id == self._run_id, Update.step == step)
        with reading(self._engine, self._url, doing=f"reading step {step}") as connection:
            row = connection.execute(query).mappings().one_or_none()
        return None if row is None else UpdateRecord(**{name: row[name] for name in _UPDATE_FIELDS})

    def groups_of_step(self, step: int) -> list[LeasedGroup]:
        """The groups that a step consumed, oldest first; trajectories without tokens left out."""
        ids = select(RolloutGroup.id).where(
            RolloutGroup.run_id == self._run_id, RolloutGroup.consumed_by_step == step
        )
        with reading(self._engine, self._url, doing=f"reading step {step}") as connection:
            return leases.read_leased(connection, list(connection.scalars(ids)))

    def group(self, group_id: str) -> LeasedGroup | None:
        """One group with the tokens of its usable trajectories."""
        with reading(self._engine, self._url, doing="reading a group") as connection:
            found = leases.read_leased(connection, [group_id])
        return found[0] if found else None

    def trajectories(self, identifier: str) -> list[TrajectoryRecord]:
        """The trajectory of an id, or all trajectories of the group of that id; empty if unknown.

        On-policy ones first, by sample index.
        """
        query = (
            reads.trajectories_query()
            .where(
                Trajectory.run_id == self._run_id,
                (Trajectory.id == identifier) | (Trajectory.group_id == identifier),
            )
            .order_by(Trajectory.kind.desc(), Trajectory.sample_index)
        )
        with reading(self._engine, self._url, doing="reading trajectories") as connection:
            return reads.read_trajectories(connection, query)

    def consumed_by(self, group_id: str) -> int | None:
        """The step that consumed a group; None where none did."""
        query = select(RolloutGroup.consumed_by_step).where(
            RolloutGroup.run_id == self._run_id, RolloutGroup.id == group_id
        )
        with reading(self._engine, self._url, doing="reading a group") as connection:
            return connection.scalars(query).one_or_none()
