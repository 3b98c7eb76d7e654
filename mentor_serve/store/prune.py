"""`mentor-serve db prune`: deletes what is old, in short transactions, while the service runs.

Old goes by age, by policy version, or by both. What a learner may still take (ready and leased
groups) is never touched, nor are the expert's demonstrations, which tasks come back to. Curves
stay: `version_stats`, `updates`, `evaluations`, `events` and `tasks` are not pruned.

Ids are collected in read transactions, `batch_size` at a time, and deleted in a write transaction
that looks at their status again. Each batch is complete or did not happen: an interrupted prune is
continued by the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from sqlalchemy import Connection, Engine, Select, delete, func, select, update

from mentor_serve.errors import ConfigError
from mentor_serve.store import schema
from mentor_serve.store.connection import open_engine, reading, writing
from mentor_serve.store.models import (
    InterventionRow,
    RolloutGroup,
    Run,
    Trajectory,
    TrajectoryTokens,
)
from mentor_serve.store.old_rows import Selection, old_groups, old_served, version_floor

_ARRAYS = [
    column for column in TrajectoryTokens.__table__.columns if column.name != "trajectory_id"
]

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunePlan:
    """What to delete."""

    what: Literal["tokens", "groups"] = "tokens"
    """`tokens`: the per-token arrays alone; `groups`: whole groups and served responses."""
    keep_days: float | None = None
    """Nothing younger is old."""
    keep_versions: int | None = None
    """Nothing that the newest so many policy versions of its run sampled is old."""
    run: str | None = None
    """Name of the only run to prune; None prunes all."""
    is_dry: bool = False
    """Count only."""
    batch_size: int = 200
    """Groups, or served responses, a transaction."""
    pause_s: float = 0.15
    """At least so long between two transactions: SQLite's waiting writers look every 0.1 s."""

    def __post_init__(self) -> None:
        """Refuse plans that would prune everything, or never end."""
        if self.keep_days is None and self.keep_versions is None:
            raise ConfigError(
                "expected --keep-days, --keep-versions or both, got neither: nothing says what is "
                "old"
            )
        if (self.keep_days or 0) < 0 or (self.keep_versions or 0) < 0 or self.batch_size < 1:
            raise ConfigError(
                "expected --keep-days and --keep-versions of at least 0 and --batch-size of at "
                f"least 1, got {self.keep_days}, {self.keep_versions} and {self.batch_size}"
            )


@dataclass(slots=True, kw_only=True)
class Pruned:
    """What was deleted so far (in a dry run: what would be)."""

    num_groups: int = 0
    """Deleted, or without their arrays now."""
    num_served: int = 0
    """Served responses, likewise."""
    num_trajectories: int = 0
    """Rows of `trajectories`, served ones included."""
    num_token_rows: int = 0
    num_interventions: int = 0
    num_array_bytes: int = 0
    """In the arrays of `trajectory_tokens`."""
    num_batches: int = 0
    runs: list[str] = field(default_factory=list)
    """Names of the runs that were looked at."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def prune(
    url: str,
    plan: PrunePlan,
    *,
    into: Pruned | None = None,
    progress: Progress | None = None,
    now: datetime | None = None,
) -> Pruned:
    """Delete what `plan` calls old.

    Args:
        url: Of the database.
        plan: What to delete.
        into: Counts batches as they are committed: what an interrupted prune did is there.
        progress: Called with the number of groups and served responses done, and of all.
        now: The time that ages are counted from.

    Raises:
        ConfigError: there is no run of that name.
        StoreError: the database failed; what was committed before stays deleted.
    """
    schema.require_current(url)
    done = Pruned() if into is None else into
    engine = open_engine(url, pool_size=1)
    try:
        _Pruning(engine, url, plan, done, progress, now or datetime.now(UTC)).run()
    finally:
        engine.dispose()
    return done


class _Pruning:
    def __init__(
        self,
        engine: Engine,
        url: str,
        plan: PrunePlan,
        done: Pruned,
        progress: Progress | None,
        now: datetime,
    ) -> None:
        self._engine, self._url, self._plan, self._done = engine, url, plan, done
        self._progress = progress
        self._before = None if plan.keep_days is None else now - timedelta(days=plan.keep_days)

    def run(self) -> None:
        with reading(self._engine, self._url, doing="finding runs") as connection:
            runs = _runs(connection, self._plan.run)
            old = [(run_id, self._selections(connection, run_id)) for run_id in runs]
            total = sum(_count(connection, one) for _, found in old for one in found)
            self._done.runs.extend(runs.values())
        self._tell(total)
        for run_id, selections in old:
            for selection in selections:
                for ids in self._batches(selection):
                    self._take(run_id, selection, ids)
                    self._tell(total)

    def _selections(self, connection: Connection, run_id: str) -> list[Selection]:
        floor = version_floor(connection, run_id, self._plan.keep_versions)
        has_tokens = self._plan.what == "tokens"
        return [
            *old_groups(run_id, before=self._before, floor=floor, has_tokens=has_tokens),
            old_served(run_id, before=self._before, floor=floor, has_tokens=has_tokens),
        ]

    def _batches(self, selection: Selection) -> Iterator[list[str]]:
        last = ""
        while True:
            query = selection.after(last).limit(self._plan.batch_size)
            with reading(self._engine, self._url, doing="finding what is old") as connection:
                ids = list(connection.scalars(query))
            if not ids:
                return
            yield ids
            last = ids[-1]

    def _take(self, run_id: str, selection: Selection, ids: Sequence[str]) -> None:
        """One batch, in one transaction; a pause as long as it took lets others write."""
        started = time.monotonic()
        # A dry run reads what the real one would delete.
        transaction = reading if self._plan.is_dry else writing
        with transaction(self._engine, self._url, doing="pruning") as connection:
            batch = _measure(connection, selection, ids, lock=not self._plan.is_dry)
            if not self._plan.is_dry:
                _delete(connection, selection, run_id, batch, what=self._plan.what)
        self._add(selection, batch)
        if not self._plan.is_dry:
            time.sleep(max(self._plan.pause_s, time.monotonic() - started))

    def _add(self, selection: Selection, batch: _Batch) -> None:
        done = self._done
        if selection.is_groups:
            done.num_groups += len(batch.ids)
        else:
            done.num_served += len(batch.ids)
        if self._plan.what == "groups":
            done.num_trajectories += batch.num_trajectories
            done.num_interventions += batch.num_interventions
        done.num_token_rows += batch.num_token_rows
        done.num_array_bytes += batch.num_array_bytes
        done.num_batches += 1

    def _tell(self, total: int) -> None:
        if self._progress is not None:
            self._progress(self._done.num_groups + self._done.num_served, total)


def _runs(connection: Connection, name: str | None) -> dict[str, str]:
    query = select(Run.id, Run.name).order_by(Run.id)
    if name is not None:
        query = query.where(Run.name == name)
    found = {row[0]: row[1] for row in connection.execute(query)}
    if name is not None and not found:
        names = list(connection.scalars(select(Run.name).order_by(Run.id.desc()).limit(10)))
        raise ConfigError(f"expected a run named {name!r}, found {names or 'none'}")
    return found


def _count(connection: Connection, selection: Selection) -> int:
    return connection.scalars(select(func.count(selection.ids)).where(selection.condition)).one()


# One batch


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    ids: list[str]
    num_trajectories: int
    num_token_rows: int
    num_interventions: int
    num_array_bytes: int


def _trajectories(selection: Selection, ids: Sequence[str]) -> Select[str]:
    owner = Trajectory.group_id if selection.is_groups else Trajectory.id
    return select(Trajectory.id).where(owner.in_(ids))


def _measure(
    connection: Connection, selection: Selection, ids: Sequence[str], *, lock: bool
) -> _Batch:
    """Count what belongs to those of `ids` that are still there and still finished."""
    still = select(selection.ids).where(selection.ids.in_(ids), selection.condition)
    still = still.order_by(selection.ids)
    kept = list(connection.scalars(still.with_for_update() if lock else still))
    chosen = _trajectories(selection, kept)
    size = sum((func.length(column) for column in _ARRAYS[1:]), func.length(_ARRAYS[0]))
    tokens = select(func.count(), func.coalesce(func.sum(size), 0)).where(
        TrajectoryTokens.trajectory_id.in_(chosen)
    )
    num_token_rows, num_array_bytes = connection.execute(tokens).one()
    replaced = select(func.count()).where(InterventionRow.trajectory_id.in_(chosen))
    return _Batch(
        ids=kept,
        num_trajectories=connection.scalars(
            select(func.count()).select_from(chosen.subquery())
        ).one(),
        num_token_rows=num_token_rows,
        num_interventions=connection.scalars(replaced).one(),
        num_array_bytes=int(num_array_bytes),
    )


def _delete(
    connection: Connection, selection: Selection, run_id: str, batch: _Batch, *, what: str
) -> None:
    chosen = _trajectories(selection, batch.ids)
    connection.execute(delete(TrajectoryTokens).where(TrajectoryTokens.trajectory_id.in_(chosen)))
    if what == "tokens":
        return
    connection.execute(delete(InterventionRow).where(InterventionRow.trajectory_id.in_(chosen)))
    owner = Trajectory.group_id if selection.is_groups else Trajectory.id
    connection.execute(delete(Trajectory).where(owner.in_(batch.ids)))
    if not selection.is_groups:
        return
    connection.execute(delete(RolloutGroup).where(RolloutGroup.id.in_(batch.ids)))
    # In the same transaction: a collector that starts counts tasks on from here.
    connection.execute(
        update(Run)
        .where(Run.id == run_id)
        .values(num_pruned_groups=Run.num_pruned_groups + len(batch.ids))
    )
