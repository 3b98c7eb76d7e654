"""Read side of the store for people: curves, rates, recent rows, one trajectory in full.

Every query is bounded, by LIMIT or by bucketing in SQL, so that a dashboard stays quick on a store
of many millions of tokens. Rows are plain dicts whose keys are the columns of docs/sql.md; times
are aware UTC datetimes. This module never writes, takes no locks, and on SQLite opens the file
read-only and anew for each query, so that it follows a database that is created, replaced or
removed while it is being watched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Select, and_, column, func, select, table
from sqlalchemy.orm import InstrumentedAttribute
from sqlalchemy.sql.elements import ColumnElement

from mentor_serve.errors import SchemaOutOfDate, StoreError
from mentor_serve.store.aggregates import (
    AVERAGED,
    HIGHEST,
    LISTED,
    VERSION_SUMS,
    Row,
    plain,
    version_row,
)
from mentor_serve.store.connection import open_engine, reading, shown, sqlite_path
from mentor_serve.store.encoding import decode
from mentor_serve.store.models import (
    Evaluation,
    Event,
    InterventionRow,
    PolicyVersion,
    RolloutGroup,
    Run,
    TaskRow,
    Trajectory,
    TrajectoryTokens,
    Update,
    VersionStats,
)
from mentor_serve.types import ByteArray, FloatArray, GroupStatus, IntArray, TrajectoryKind

MAX_POINTS = 500
"""Points of a curve: more than a chart has pixels for."""
PREVIEW_CHARACTERS = 200
"""Of prompts and responses in lists."""
EVALUATION_METRICS = ("avg_at_k", "greedy_pass_at_k", "pass_at_k")
"""What a chart of evaluations shows."""
RECENT_TRAJECTORIES = 5_000
"""Newest trajectories with interventions that the most frequent replacements are counted over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryDetail:
    """One trajectory with what it answered and its per-token arrays ([T] each, see `Rollout`)."""

    row: Row
    """Columns of `trajectories`, and `gamma`, `alpha`, `group_status`, `consumed_by_step` of its
    group (None for served ones)."""
    prompt: str | None
    answer: str | None
    source: str | None
    prompt_token_ids: IntArray
    token_ids: IntArray
    policy_logprobs: FloatArray
    expert_logprobs: FloatArray
    mixed_logprobs: FloatArray
    entropies: FloatArray
    weights: FloatArray
    sources: ByteArray
    versions: IntArray
    interventions: list[Row]
    """Columns of `interventions`, by position."""


class StatsReader:
    """Read-only queries of one database.

    All methods raise `StoreError` when the database cannot be read, and its subclass
    `SchemaOutOfDate` when a table, view or column is missing.
    """

    def __init__(self, url: str, *, timeout_s: float = 5.0) -> None:
        """Nothing is opened yet. `timeout_s` is how long a query waits for a lock."""
        self._url = url
        self._engine = open_engine(url, timeout_s=timeout_s, read_only=True)
        self.location = shown(url)
        """The URL without its password, for messages."""

    def close(self) -> None:
        """Give back the connections; a later query opens new ones."""
        self._engine.dispose()

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """A read-only connection that sees one state of the database, for other queries."""
        path = sqlite_path(self._url)
        if path is not None and not path.exists():
            raise StoreError(
                f"expected a database at {path}, found none; the service creates it when it starts"
            )
        try:
            with reading(self._engine, self._url, doing="reading statistics") as connection:
                yield connection
        except StoreError as error:
            if _is_schema_error(error):
                raise SchemaOutOfDate(
                    f"{self.location} lacks a table or column that this version reads; "
                    "run `mentor-serve db upgrade`"
                ) from error
            raise
        finally:
            if path is not None:
                # A pooled connection would go on reading a file that was replaced meanwhile.
                self._engine.dispose()

    def runs(self) -> list[Row]:
        """Runs, most recently active first: id, name, started_at, updated_at."""
        query = (
            select(Run.id, Run.name, Run.started_at, Run.updated_at)
            .order_by(Run.updated_at.desc(), Run.id.desc())
            .limit(200)
        )
        return self._rows(query)

    def training_curve(self, run_id: str, *, max_points: int = MAX_POINTS) -> list[Row]:
        """The run's updates by step. Above `max_points`, a row is the mean of a bucket of updates.

        Columns of `v_training_curve`; `step`, `policy_version`, `created_at` and `staleness_max`
        are the highest of the bucket, `num_stale` is its sum.
        """
        bucket = self._bucket(Update.step, Update.run_id == run_id, max_points=max_points)
        columns: list[ColumnElement[Any]] = [
            *(func.max(getattr(Update, name)).label(name) for name in HIGHEST),
            *(func.avg(getattr(Update, name)).label(name) for name in AVERAGED),
            func.sum(Update.num_stale).label("num_stale"),
        ]
        query = select(*columns).where(Update.run_id == run_id).group_by(bucket).order_by(bucket)
        return self._rows(query)

    def latest_update(self, run_id: str) -> Row | None:
        """All columns of the newest row of `updates`, or None before the first."""
        query = (
            select(Update.__table__)
            .where(Update.run_id == run_id)
            .order_by(Update.step.desc())
            .limit(1)
        )
        return next(iter(self._rows(query)), None)

    def live_version(self, run_id: str) -> Row | None:
        """version, step, created_at, alpha and gamma of the version being served, if any."""
        version = PolicyVersion
        query = select(
            version.version, version.step, version.created_at, version.alpha, version.gamma
        ).where(version.run_id == run_id, version.is_live)
        return next(iter(self._rows(query)), None)

    def by_version(
        self, run_id: str, *, kind: TrajectoryKind, max_points: int = MAX_POINTS
    ) -> list[Row]:
        """What the groups' trajectories of one kind were like under each policy version.

        A row covers one version (the oldest that produced a token), or a bucket of neighbouring
        versions above `max_points`: policy_version (highest of the bucket), num_trajectories,
        num_scored, num_passed, pass_rate with its 95 % Wilson interval pass_rate_low and
        pass_rate_high, mean_reward, mean_response_tokens, gated_share, intervention_rate,
        mean_weight and mean_entropy (the last four per token). None where nothing is known.
        """
        sums = VersionStats
        chosen = and_(sums.run_id == run_id, sums.kind == kind.value)
        bucket = self._bucket(sums.policy_version, chosen, max_points=max_points)
        query = (
            select(
                func.max(sums.policy_version).label("policy_version"),
                *(func.sum(getattr(sums, name)).label(name) for name in VERSION_SUMS),
            )
            .where(chosen)
            .group_by(bucket)
            .order_by(bucket)
        )
        return [version_row(row) for row in self._rows(query)]

    def staleness(self, run_id: str, *, num_updates: int = 100) -> list[Row]:
        """How far behind the groups of the newest updates were: staleness, num_groups."""
        view = table(
            "v_staleness", *(column(name) for name in ("run_id", "step", "staleness", "num_groups"))
        )
        newest = self._scalar(select(func.max(Update.step)).where(Update.run_id == run_id))
        if newest is None:
            return []
        query = (
            select(view.c.staleness, func.sum(view.c.num_groups).label("num_groups"))
            .where(view.c.run_id == run_id, view.c.step > newest - num_updates)
            .group_by(view.c.staleness)
            .order_by(view.c.staleness)
            .limit(MAX_POINTS)
        )
        return self._rows(query)

    def group_counts(self, run_id: str) -> dict[str, int]:
        """Number of groups by status, every status in the order of a group's life."""
        query = (
            select(RolloutGroup.status, func.count().label("num_groups"))
            .where(RolloutGroup.run_id == run_id)
            .group_by(RolloutGroup.status)
        )
        found = {row["status"]: row["num_groups"] for row in self._rows(query)}
        return {status.value: found.get(status.value, 0) for status in GroupStatus}

    def throughput(self, run_id: str, *, now: datetime, minutes: int = 60) -> list[Row]:
        """Groups stored in each of the last full minutes before `now`: minute, num_groups.

        Minutes without a group are there with 0; the minute that `now` lies in is left out.
        """
        end = now.astimezone(UTC).replace(second=0, microsecond=0)
        start = end - timedelta(minutes=minutes)
        minute = self._minute(RolloutGroup.created_at)
        query = (
            select(minute.label("minute"), func.count().label("num_groups"))
            .where(
                RolloutGroup.run_id == run_id,
                RolloutGroup.created_at >= start,
                RolloutGroup.created_at < end,
            )
            .group_by(minute)
        )
        found = {row["minute"]: row["num_groups"] for row in self._rows(query)}
        starts = (start + timedelta(minutes=offset) for offset in range(minutes))
        return [
            {"minute": at, "num_groups": found.get(at.strftime("%Y-%m-%dT%H:%M"), 0)}
            for at in starts
        ]

    def trajectories(
        self,
        run_id: str,
        *,
        kind: TrajectoryKind | None = None,
        is_passed: bool | None = None,
        min_interventions: int = 0,
        limit: int = 200,
    ) -> list[Row]:
        """The newest trajectories that fit, newest first, texts cut to PREVIEW_CHARACTERS.

        `is_passed` asks for accuracy 1 (True) or below (False); None takes unscored ones too.
        """
        t = Trajectory
        query = (
            select(
                *(getattr(t, name) for name in LISTED),
                func.substr(TaskRow.prompt, 1, PREVIEW_CHARACTERS).label("prompt"),
                func.substr(t.text, 1, PREVIEW_CHARACTERS).label("text"),
            )
            .join(TaskRow, TaskRow.id == t.task_id, isouter=True)
            .where(t.run_id == run_id)
            .order_by(t.id.desc())
            .limit(limit)
        )
        if kind is not None:
            query = query.where(t.kind == kind.value)
        if is_passed is not None:
            query = query.where(t.accuracy >= 1 if is_passed else t.accuracy < 1)
        if min_interventions:
            query = query.where(t.num_interventions >= min_interventions)
        return self._rows(query)

    def trajectory(self, trajectory_id: str) -> TrajectoryDetail | None:
        """One trajectory in full; None where there is none of that id, or it has no tokens."""
        group = RolloutGroup
        query = (
            select(
                Trajectory.__table__,
                TaskRow.prompt.label("task_prompt"),
                TaskRow.answer.label("task_answer"),
                TaskRow.source.label("task_source"),
                group.gamma,
                group.alpha,
                group.status.label("group_status"),
                group.consumed_by_step,
            )
            .join(TaskRow, TaskRow.id == Trajectory.task_id, isouter=True)
            .join(group, group.id == Trajectory.group_id, isouter=True)
            .where(Trajectory.id == trajectory_id)
        )
        arrays = select(TrajectoryTokens.__table__).where(
            TrajectoryTokens.trajectory_id == trajectory_id
        )
        replaced = (
            select(InterventionRow.__table__)
            .where(InterventionRow.trajectory_id == trajectory_id)
            .order_by(InterventionRow.position)
        )
        row = next(iter(self._rows(query)), None)
        tokens = next(iter(self._rows(arrays)), None)
        if row is None or tokens is None:
            return None
        del tokens["trajectory_id"]
        return TrajectoryDetail(
            prompt=row.pop("task_prompt"),
            answer=row.pop("task_answer"),
            source=row.pop("task_source"),
            row=row,
            interventions=self._rows(replaced),
            **{name: decode(data) for name, data in tokens.items()},
        )

    def replacements(self, run_id: str, *, limit: int = 20) -> list[Row]:
        """The most frequent replacements: proposed_text, chosen_text, num_interventions, ...

        Counted over the RECENT_TRAJECTORIES newest trajectories that have any; also
        num_trajectories in which the replacement occurs, mean_entropy and mean_weight.
        """
        recent = (
            select(Trajectory.id)
            .where(
                Trajectory.run_id == run_id,
                Trajectory.kind == TrajectoryKind.MIXED.value,
                Trajectory.num_interventions > 0,
            )
            .order_by(Trajectory.id.desc())
            .limit(RECENT_TRAJECTORIES)
            .subquery()
        )
        # Known beforehand, so that PostgreSQL reads a range of interventions and not all of them.
        oldest = self._scalar(select(func.min(recent.c.id)))
        if oldest is None:
            return []
        i = InterventionRow
        pair = (i.proposed_token_id, i.proposed_text, i.chosen_token_id, i.chosen_text)
        query = (
            select(
                *pair,
                func.count().label("num_interventions"),
                func.count(i.trajectory_id.distinct()).label("num_trajectories"),
                func.avg(i.entropy).label("mean_entropy"),
                func.avg(i.weight).label("mean_weight"),
            )
            .join(recent, recent.c.id == i.trajectory_id)
            .where(i.trajectory_id >= oldest)
            .group_by(*pair)
            .order_by(func.count().desc(), *pair)
            .limit(limit)
        )
        return self._rows(query)

    def events(self, run_id: str, *, limit: int = 50) -> list[Row]:
        """The newest events: kind, severity, message, details_json, created_at."""
        query = (
            select(Event.kind, Event.severity, Event.message, Event.details_json, Event.created_at)
            .where(Event.run_id == run_id)
            .order_by(Event.id.desc())
            .limit(limit)
        )
        return self._rows(query)

    def evaluations(self, run_id: str, *, limit: int = MAX_POINTS) -> list[Row]:
        """The newest evaluation results, oldest first: suite, metric, k, policy_version, value.

        How often problems are solved, of versions of the policy; lengths, entropies and words are
        for queries of their own.
        """
        e = Evaluation
        query = (
            select(e.policy_version, e.suite, e.metric, e.k, e.value, e.num_problems, e.created_at)
            .where(
                e.run_id == run_id,
                e.policy_version.is_not(None),
                e.metric.in_(EVALUATION_METRICS),
            )
            .order_by(e.id.desc())
            .limit(limit)
        )
        return self._rows(query)[::-1]

    def _bucket(
        self,
        number: InstrumentedAttribute[int],
        condition: ColumnElement[bool],
        *,
        max_points: int,
    ) -> ColumnElement[int]:
        """An expression that maps `number` to at most `max_points` buckets of equal width."""
        first = self._scalar(select(func.min(number)).where(condition)) or 0
        last = self._scalar(select(func.max(number)).where(condition)) or 0
        width = (last - first) // max_points + 1
        return (number - first) // width

    def _minute(self, at: InstrumentedAttribute[datetime]) -> ColumnElement[str]:
        """The UTC minute of a time as `2026-01-31T12:00`."""
        if self._engine.dialect.name == "sqlite":
            return func.substr(at, 1, 16)
        return func.to_char(func.timezone("UTC", at), 'YYYY-MM-DD"T"HH24:MI')

    def _scalar(self, query: Select[*tuple[Any, ...]]) -> Any:
        rows = self._rows(query)
        return next(iter(rows[0].values())) if rows else None

    def _rows(self, query: Select[*tuple[Any, ...]]) -> list[Row]:
        with self.connection() as connection:
            rows = connection.execute(query).mappings()
            return [{name: plain(value) for name, value in row.items()} for row in rows]


def _is_schema_error(error: StoreError) -> bool:
    reason = str(error).lower()
    return "no such table" in reason or "no such column" in reason or "does not exist" in reason
