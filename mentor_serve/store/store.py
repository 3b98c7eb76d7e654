"""The trajectory store: the queue between collectors and learner, and the record of a run.

Synchronous and thread-safe; one store a process. Every method is one transaction that has happened
completely when it returns, and not at all when it raises. Failures are `StoreError`; the password
of the URL never appears in them.

The store neither creates nor migrates the schema: call `schema.upgrade` or
`schema.require_current` first. It refuses to change a group's trajectories after they were stored;
only rewards of served responses may come later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Connection

from mentor_serve.errors import StoreError
from mentor_serve.store import (
    demonstrations,
    evaluations,
    groups,
    journal,
    leases,
    reads,
    training,
)
from mentor_serve.store.claims import RunClaim, make_claim
from mentor_serve.store.connection import open_engine, reading, shown, writing
from mentor_serve.store.evaluations import EvaluationRecord
from mentor_serve.store.group_rows import DetailInserts, GroupRows, group_rows
from mentor_serve.store.models import PolicyVersion, Trajectory
from mentor_serve.store.records import (
    DemonstrationAttempt,
    EventRecord,
    LeasedGroup,
    NewDemonstration,
    NewGroup,
    NewTrajectory,
    StoredDemonstration,
    StoredTask,
    TrainingStatus,
    TrajectoryRecord,
    UpdateRecord,
    VersionRecord,
)
from mentor_serve.types import Score, Task, TrajectoryKind


def _utc_now() -> datetime:
    return datetime.now(UTC)


class TrajectoryStore:
    """Reads and writes of one database; close it, or use it as a context manager."""

    def __init__(
        self,
        url: str,
        *,
        pool_size: int = 5,
        timeout_s: float = 30.0,
        read_only: bool = False,
        clock: Callable[[], datetime] = _utc_now,
    ) -> None:
        """Connect lazily. `timeout_s` bounds the wait for a lock; `clock` is for tests.

        Raises:
            StoreError: the URL cannot be used.
        """
        self._url = url
        self._read_only = read_only
        self._clock = clock
        self._engine = open_engine(
            url, pool_size=pool_size, timeout_s=timeout_s, read_only=read_only
        )
        self._inserts = DetailInserts(self._engine.dialect)

    def close(self) -> None:
        """Close every connection; the store can be used again afterwards."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        """The store itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def _read(self, doing: str) -> AbstractContextManager[Connection]:
        return reading(self._engine, self._url, doing=doing)

    def _write(self, doing: str) -> AbstractContextManager[Connection]:
        if self._read_only:
            raise StoreError(
                f"{doing} refused: {shown(self._url)} was opened read-only; open it for writing"
            )
        return writing(self._engine, self._url, doing=doing)

    # Runs, tasks, events, evaluations

    def open_run(self, name: str, config: Mapping[str, Any], *, announce: bool = True) -> str:
        """The id of the run called `name`: created, or continued with the new configuration.

        A continuation leaves an event `run_continued` unless `announce` is False, which is for the
        second and further processes of one start.
        """
        with self._write("opening the run") as connection:
            return journal.open_run(connection, name, config, announce=announce, now=self._clock())

    def find_run(self, name: str) -> str | None:
        """The id of the run called `name`, if there is one; writes nothing."""
        with self._read("finding the run") as connection:
            return journal.find_run(connection, name)

    def ensure_task(self, run_id: str, task: Task) -> str:
        """The id of the task; the same problem is stored once a run."""
        return self.add_tasks(run_id, [task])[0]

    def add_tasks(self, run_id: str, tasks: Iterable[Task]) -> list[str]:
        """The ids of the tasks, in their order; all or none are stored."""
        now = self._clock()
        keyed = [(journal.content_key(task), task, now) for task in tasks]
        with self._write("adding tasks") as connection:
            ids = journal.ensure_tasks(connection, run_id, keyed)
        return [ids[key] for key, _, _ in keyed]

    def list_tasks(
        self,
        run_id: str,
        *,
        source: str | None = None,
        only_untried: bool = False,
        limit: int = 1000,
    ) -> list[StoredTask]:
        """Tasks in the order they came; `only_untried` leaves out those that have a group."""
        with self._read("listing tasks") as connection:
            return journal.list_tasks(
                connection, run_id, source=source, only_untried=only_untried, limit=limit
            )

    def add_event(
        self,
        run_id: str,
        *,
        kind: str,
        severity: str,
        message: str,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Record something that an operator should know; severity info, warning or error."""
        with self._write("adding an event") as connection:
            journal.add_event(
                connection,
                run_id,
                kind=kind,
                severity=severity,
                message=message,
                details=details,
                now=self._clock(),
            )

    def recent_events(
        self, run_id: str, *, severity: str | None = None, limit: int = 50
    ) -> list[EventRecord]:
        """The newest events, newest first."""
        with self._read("reading events") as connection:
            return journal.recent_events(connection, run_id, severity=severity, limit=limit)

    def add_evaluation(self, run_id: str, record: EvaluationRecord) -> str:
        """Record every number of an evaluation, all or none; returns its id.

        Raises:
            StoreError: nothing was measured, or a number occurs twice.
        """
        with self._write("adding an evaluation") as connection:
            return evaluations.add(connection, run_id, record, now=self._clock())

    def latest_evaluation(
        self, run_id: str, *, suite: str | None = None
    ) -> EvaluationRecord | None:
        """The newest evaluation of a version of the run's policy, of one suite or of any."""
        with self._read("reading the newest evaluation") as connection:
            return evaluations.latest(connection, run_id, suite=suite)

    def newest_evaluated_version(self, run_id: str, *, suite: str) -> int | None:
        """The highest policy version that has an evaluation of the suite."""
        with self._read("reading evaluated versions") as connection:
            return evaluations.newest_version(connection, run_id, suite=suite)

    # Groups

    def add_group(self, run_id: str, group: NewGroup) -> bool:
        """Store a group with its task, trajectories, tokens and interventions.

        Storing a group of the same id again changes nothing and returns False.

        Raises:
            StoreError: a status other than ready or failed, or arrays that do not fit together.
        """
        return self.add_groups([self.group_rows(run_id, group)])[0]

    def group_rows(
        self, run_id: str, group: NewGroup, *, created_at: datetime | None = None
    ) -> GroupRows:
        """What `add_groups` takes: all that can be computed without the database.

        Args:
            run_id: run that the group belongs to.
            group: the group.
            created_at: when it was made; None is now.

        Raises:
            StoreError: a status other than ready or failed, or arrays that do not fit together.
        """
        now = created_at or self._clock()
        return group_rows(run_id, group, now=now, inserts=self._inserts)

    def add_groups(self, rows: Sequence[GroupRows]) -> list[bool]:
        """Store groups of one run in one transaction; False for each that was there already.

        Raises:
            StoreUnavailable: the database is away, busy or full; whether they are stored is not
                known, storing them again is safe.
            StoreError: the database refuses one of them; none is stored.
        """
        with self._write("storing a group" if len(rows) == 1 else "storing groups") as connection:
            return groups.add_groups(connection, rows, self._inserts)

    def lease_groups(
        self, run_id: str, *, num_groups: int, owner: str, lease_s: float
    ) -> list[LeasedGroup]:
        """Lease the `num_groups` oldest available groups to `owner`, or none (an empty list).

        A group goes to one owner at a time, whatever the number of callers. A group whose lease has
        expired is available again.
        """
        with self._write("leasing groups") as connection:
            ids = leases.lease(
                connection,
                run_id,
                num_groups=num_groups,
                owner=owner,
                lease_s=lease_s,
                now=self._clock(),
            )
        if not ids:
            return []
        # The arrays are read after the commit: the lease protects them, writers need not wait.
        with self._read("reading leased groups") as connection:
            return leases.read_leased(connection, ids)

    def renew_leases(self, owner: str, lease_s: float) -> int:
        """Let the leases of `owner` last `lease_s` from now; returns how many there are."""
        with self._write("renewing leases") as connection:
            return leases.renew(connection, owner=owner, lease_s=lease_s, now=self._clock())

    def release_leases(self, run_id: str, *, owner: str | None = None) -> int:
        """Make leased groups ready again: those of `owner`, or all (when nobody else trains)."""
        with self._write("releasing leases") as connection:
            return leases.release(connection, run_id, owner=owner)

    def fail_groups(self, run_id: str, *, owner: str, group_ids: Sequence[str], error: str) -> int:
        """Give up groups that `owner` holds because they cannot be trained on; how many."""
        with self._write("giving up groups") as connection:
            return leases.fail(connection, run_id, owner=owner, group_ids=group_ids, error=error)

    def mark_stale(self, run_id: str, *, min_policy_version: int) -> int:
        """Give up available groups with a token from before `min_policy_version`; how many."""
        with self._write("marking stale groups") as connection:
            return leases.mark_stale(
                connection, run_id, min_policy_version=min_policy_version, now=self._clock()
            )

    def count_groups(self, run_id: str) -> dict[str, int]:
        """Number of groups by status, every status present."""
        with self._read("counting groups") as connection:
            return leases.count(connection, run_id)

    def count_groups_ever(self, run_id: str) -> int:
        """Number of groups that the run ever had, those included that were pruned."""
        with self._read("counting groups") as connection:
            return leases.count_ever(connection, run_id)

    # Demonstrations

    def add_demonstrations(self, run_id: str, task: Task, items: Sequence[NewDemonstration]) -> int:
        """Store attempts of the expert at a task; returns how many were new.

        Raises:
            StoreError: one that is not the expert's, or arrays that do not fit together.
        """
        with self._write("storing demonstrations") as connection:
            return demonstrations.add(connection, run_id, task, items, now=self._clock())

    def demonstration_attempts(
        self,
        run_id: str,
        task: Task,
        *,
        expert_model: str,
        prompt_token_ids: Sequence[int],
        own_run_only: bool = False,
    ) -> list[DemonstrationAttempt]:
        """Attempts of this expert at this very prompt, in any run or in this one, oldest first.

        `num_uses` counts groups of `run_id` alone.
        """
        with self._read("reading demonstrations") as connection:
            return demonstrations.attempts(
                connection,
                run_id,
                task,
                expert_model=expert_model,
                prompt_token_ids=prompt_token_ids,
                own_run_only=own_run_only,
            )

    def demonstrations(self, ids: Sequence[str]) -> list[StoredDemonstration]:
        """Scored demonstrations with their tokens, in the order of `ids`.

        Raises:
            StoreError: one of them is not in the store.
        """
        with self._read("reading demonstrations") as connection:
            return demonstrations.read(connection, ids)

    # Updates and versions

    def claim_run(self, run_id: str) -> RunClaim:
        """The right to train the run, not held yet: one learner of it at a time, on any machine."""
        return make_claim(self._engine, self._url, run_id)

    def commit_update(
        self,
        run_id: str,
        *,
        owner: str,
        group_ids: Sequence[str],
        update: UpdateRecord,
        version: VersionRecord,
    ) -> None:
        """Consume the groups, add the update and the version it produced (not yet live).

        Raises:
            LeaseLost: `owner` does not hold every group any more; nothing changed.
            StoreError: the step or the version is there already; nothing changed.
        """
        now = self._clock()
        with self._write(f"committing step {update.step}") as connection:
            training.consume(connection, run_id, owner=owner, group_ids=group_ids, step=update.step)
            training.add_version(connection, run_id, version, now=now)
            training.add_update(connection, run_id, update, now=now)

    def add_version(self, run_id: str, version: VersionRecord) -> None:
        """Add a version that no update produced: version 0, or one that was imported.

        Raises:
            StoreError: the version is there already.
        """
        with self._write(f"adding version {version.version}") as connection:
            training.add_version(connection, run_id, version, now=self._clock())

    def set_live(self, run_id: str, version: int) -> None:
        """Make `version` the only live version of the run.

        Raises:
            StoreError: there is no such version; nothing changed.
        """
        with self._write(f"making version {version} live") as connection:
            training.set_live(connection, run_id, version)

    def latest_update(self, run_id: str) -> UpdateRecord | None:
        """The last committed update."""
        with self._read("reading the last update") as connection:
            return training.latest_update(connection, run_id)

    def list_versions(self, run_id: str) -> list[VersionRecord]:
        """Every version, oldest first."""
        return self._versions(run_id)

    def version(self, run_id: str, version: int) -> VersionRecord | None:
        """One version, if there is one of that number."""
        return _first(self._versions(run_id, PolicyVersion.version == version))

    def live_version(self, run_id: str) -> VersionRecord | None:
        """The version that replicas serve."""
        return _first(self._versions(run_id, PolicyVersion.is_live))

    def latest_version(self, run_id: str) -> VersionRecord | None:
        """The version of the highest number."""
        query = training.versions_query(run_id).order_by(PolicyVersion.version.desc()).limit(1)
        with self._read("reading the newest version") as connection:
            return _first(training.read_versions(connection, query))

    def _versions(self, run_id: str, *conditions: Any) -> list[VersionRecord]:
        query = training.versions_query(run_id).where(*conditions).order_by(PolicyVersion.version)
        with self._read("reading versions") as connection:
            return training.read_versions(connection, query)

    # Trajectories

    def add_served(self, run_id: str, trajectory: NewTrajectory, *, trajectory_id: str) -> bool:
        """Store a response that was given to a client (kind `served`); False if it is there.

        Raises:
            StoreError: another kind.
        """
        if trajectory.kind is not TrajectoryKind.SERVED:
            raise StoreError(f"expected a served trajectory, got {trajectory.kind.value!r}")
        with self._write("storing a served response") as connection:
            return groups.add_served(
                connection, run_id, trajectory, trajectory_id=trajectory_id, now=self._clock()
            )

    def score_served(self, trajectory_id: str, score: Score) -> bool:
        """Give a served response its reward (a later one replaces it); False if it is unknown."""
        with self._write("scoring a served response") as connection:
            return groups.score_served(connection, trajectory_id, score)

    def trajectories(
        self,
        run_id: str,
        *,
        limit: int = 50,
        kind: TrajectoryKind | None = None,
        before: str | None = None,
    ) -> list[TrajectoryRecord]:
        """The newest trajectories, newest first; `before` an id continues a listing."""
        query = reads.trajectories_query().where(Trajectory.run_id == run_id)
        if kind is not None:
            query = query.where(Trajectory.kind == kind.value)
        if before is not None:
            query = query.where(Trajectory.id < before)
        with self._read("reading trajectories") as connection:
            return reads.read_trajectories(
                connection, query.order_by(Trajectory.id.desc()).limit(limit)
            )

    def trajectory_document(self, trajectory_id: str) -> dict[str, Any] | None:
        """One trajectory with its tokens and interventions, ready for JSON; None if unknown."""
        with self._read("reading a trajectory") as connection:
            return reads.trajectory_document(connection, trajectory_id)

    def training_status(self, run_id: str) -> TrainingStatus:
        """Where the run stands.

        Raises:
            StoreError: there is no such run.
        """
        with self._read("reading the training status") as connection:
            status = reads.training_status(connection, run_id, now=self._clock())
        if status is None:
            raise StoreError(f"expected a run of id {run_id!r} in {shown(self._url)}, found none")
        return status


def _first(versions: list[VersionRecord]) -> VersionRecord | None:
    return versions[0] if versions else None
