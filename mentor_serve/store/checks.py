"""What `db check` looks for: each check reads, and answers with sentences about what is wrong.

Functions over an open transaction that sees one state of the database, so that a service that goes
on writing is never taken for damage. Sentences say what to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, case, func, or_, select
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import aliased

from mentor_serve.errors import StoreError
from mentor_serve.store.encoding import decode
from mentor_serve.store.models import (
    Base,
    PolicyVersion,
    RolloutGroup,
    Run,
    Trajectory,
    TrajectoryTokens,
    Update,
    VersionStats,
)
from mentor_serve.types import GroupStatus, TrajectoryKind

SAMPLED_ARRAYS = 1000
"""Rows of `trajectory_tokens` whose arrays a whole check decodes, spread evenly."""
SAMPLED_ARRAYS_QUICK = 50
"""... and a quick one: the newest."""

_RESTORE = "restore a backup (docs/operations.md)"
_TRAINABLE = (GroupStatus.READY.value, GroupStatus.LEASED.value)
_SHOWN_ERRORS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing to look for; `find` answers with sentences, none where all is well."""

    label: str
    find: Callable[[Connection], list[str]]
    is_whole: bool = True
    """Part of a whole check, which reads whole tables."""
    is_quick: bool = False
    """Part of a quick check."""
    is_decisive: bool = False
    """What it finds leaves no sense in the checks behind it."""


def file_integrity(connection: Connection) -> list[str]:
    """SQLite's own verdict on its pages and indexes; nothing on PostgreSQL."""
    if connection.dialect.name != "sqlite":
        return []
    said: list[str] = []
    try:
        for row in connection.exec_driver_sql(f"PRAGMA integrity_check({_SHOWN_ERRORS})"):
            said.append(str(row[0]))  # what was said before an error counts
    except DatabaseError:
        if not said:
            raise
    return [f"the file is damaged: {line}; {_RESTORE}" for line in said if line != "ok"]


def missing_parents(connection: Connection) -> list[str]:
    """Rows that refer to rows that are not there."""
    missing: Counter[tuple[str, str]] = Counter()
    if connection.dialect.name == "sqlite":
        for child, _, parent, _ in connection.exec_driver_sql("PRAGMA foreign_key_check"):
            missing[child, parent] += 1
    else:
        for child, parent, query in _parent_queries():
            missing[child, parent] = connection.scalars(query).one()
    return [
        f"{number} rows of {child} refer to a row of {parent} that is not there; {_RESTORE}"
        for (child, parent), number in sorted(missing.items())
        if number
    ]


def _parent_queries() -> Iterator[tuple[str, str, Select[int]]]:
    """Child table, parent table and how many children lack their parent, for each foreign key."""
    for table in Base.metadata.sorted_tables:
        for constraint in sorted(table.foreign_key_constraints, key=lambda one: str(one.name)):
            parent = constraint.referred_table.alias("parent")
            pairs = [(key.parent, parent.c[key.column.name]) for key in constraint.elements]
            is_there = select(1).where(*(child == its for child, its in pairs)).exists()
            refers = and_(*(child.is_not(None) for child, _ in pairs))
            query = select(func.count()).select_from(table).where(refers, ~is_there)
            yield table.name, constraint.referred_table.name, query


def undecodable_arrays(limit: int, *, newest_only: bool) -> Callable[[Connection], list[str]]:
    """A check that decodes at most `limit` rows of `trajectory_tokens`."""

    def find(connection: Connection) -> list[str]:
        ids = _sample(connection, limit, newest_only=newest_only)
        query = (
            select(
                Trajectory.num_tokens.label("num_tokens"),
                Trajectory.num_prompt_tokens.label("num_prompt_tokens"),
                TrajectoryTokens.__table__,
            )
            .join(Trajectory, Trajectory.id == TrajectoryTokens.trajectory_id)
            .order_by(TrajectoryTokens.trajectory_id)
        )
        broken: list[str] = []
        while chunk := list(islice(ids, 100)):
            rows = connection.execute(query.where(TrajectoryTokens.trajectory_id.in_(chunk)))
            broken += [reason for row in rows.mappings() if (reason := _array_problem(dict(row)))]
        if not broken:
            return []
        return [
            f"the arrays of {len(broken)} rows of trajectory_tokens (of at most {limit} looked at) "
            f"are damaged, first {broken[0]}; {_RESTORE}: without them the response can be neither "
            "trained on nor replayed"
        ]

    return find


def _sample(connection: Connection, limit: int, *, newest_only: bool) -> Iterator[str]:
    key = TrajectoryTokens.trajectory_id
    if newest_only:
        return iter(list(connection.scalars(select(key).order_by(key.desc()).limit(limit))))
    number = connection.scalars(select(func.count()).select_from(TrajectoryTokens)).one()
    every = connection.scalars(select(key).order_by(key))
    return iter([one for index, one in enumerate(every) if index % -(-number // limit) == 0])


def _array_problem(row: dict[str, Any]) -> str | None:
    """What is wrong with one row, None where every array has the length it should."""
    name, num_tokens = row.pop("trajectory_id"), row.pop("num_tokens")
    num_prompt_tokens = row.pop("num_prompt_tokens")
    for column, data in row.items():
        expected = num_prompt_tokens if column == "prompt_token_ids" else num_tokens
        try:
            found = len(decode(data))
        except StoreError as error:
            return f"{column} of {name}: {error}"
        if found != expected:
            return f"{column} of {name}: expected {expected} values, got {found}"
    return None


def counting(text: str, query: Select[int]) -> Callable[[Connection], list[str]]:
    """A check that puts the number that `query` counts before `text`."""

    def find(connection: Connection) -> list[str]:
        number = connection.scalars(query).one()
        return [f"{number} {text}"] if number else []

    return find


def _number_of(table: type[Base]) -> Select[int]:
    return select(func.count()).select_from(table)


def _tokens_of(owner: ColumnElement[str] | Any) -> Select[Any]:
    return select(TrajectoryTokens.trajectory_id).where(TrajectoryTokens.trajectory_id == owner)


_CONSUMED_WITHOUT_UPDATE = _number_of(RolloutGroup).where(
    RolloutGroup.status == GroupStatus.CONSUMED.value,
    ~select(Update.step)
    .where(Update.run_id == RolloutGroup.run_id, Update.step == RolloutGroup.consumed_by_step)
    .exists(),
)
_LEASE_AND_STATUS_DISAGREE = _number_of(RolloutGroup).where(
    (RolloutGroup.status == GroupStatus.LEASED.value) != RolloutGroup.lease_owner.is_not(None)
)
_EMPTY_GROUPS = _number_of(RolloutGroup).where(
    RolloutGroup.status.in_(_TRAINABLE),
    ~select(Trajectory.id)
    .where(Trajectory.group_id == RolloutGroup.id, Trajectory.status == "ok")
    .exists(),
)
_WITHOUT_TOKENS = _number_of(Trajectory).where(
    Trajectory.status == "ok",
    select(RolloutGroup.id)
    .where(RolloutGroup.id == Trajectory.group_id, RolloutGroup.status.in_(_TRAINABLE))
    .exists(),
    ~_tokens_of(Trajectory.id).exists(),
)
_DEMONSTRATIONS_WITHOUT_TOKENS = _number_of(Trajectory).where(
    Trajectory.kind == TrajectoryKind.EXPERT.value,
    Trajectory.group_id.is_(None),
    Trajectory.status == "ok",
    ~_tokens_of(Trajectory.id).exists(),
)


def _partly_pruned() -> Select[int]:
    """Pruning takes the arrays of whole groups: one that lost some of them was damaged."""
    by_group = (
        select(Trajectory.group_id)
        .join(RolloutGroup, RolloutGroup.id == Trajectory.group_id)
        .outerjoin(TrajectoryTokens, TrajectoryTokens.trajectory_id == Trajectory.id)
        .where(Trajectory.status == "ok", RolloutGroup.status.not_in(_TRAINABLE))
        .group_by(Trajectory.group_id)
        .having(
            func.count(TrajectoryTokens.trajectory_id).between(1, func.count(Trajectory.id) - 1)
        )
        .subquery()
    )
    return select(func.count()).select_from(by_group)


def _miscounted_groups() -> Select[int]:
    def usable(kind: TrajectoryKind) -> ColumnElement[int]:
        is_usable = and_(Trajectory.kind == kind.value, Trajectory.status == "ok")
        return func.count(case((is_usable, 1)))

    wrong = (
        RolloutGroup.num_on_policy != usable(TrajectoryKind.ON_POLICY),
        RolloutGroup.num_mixed != usable(TrajectoryKind.MIXED),
        RolloutGroup.num_expert != usable(TrajectoryKind.EXPERT),
        RolloutGroup.num_tokens != func.coalesce(func.sum(Trajectory.num_tokens), 0),
    )
    by_group = (
        select(RolloutGroup.id)
        .outerjoin(Trajectory, Trajectory.group_id == RolloutGroup.id)
        .group_by(RolloutGroup.id)
        .having(or_(*wrong))
        .subquery()
    )
    return select(func.count()).select_from(by_group)


def _miscounted_updates() -> Select[int]:
    """More groups than the update had; or fewer, though none were pruned or given up."""
    group = aliased(RolloutGroup)
    found = (
        select(func.count())
        .select_from(group)
        .where(group.run_id == Update.run_id, group.consumed_by_step == Update.step)
        .scalar_subquery()
    )
    is_whole = and_(Run.num_pruned_groups == 0, func.coalesce(Update.num_skipped_steps, 0) == 0)
    return (
        _number_of(Update)
        .join(Run, Run.id == Update.run_id)
        .where(or_(found > Update.num_groups, and_(is_whole, found < Update.num_groups)))
    )


def several_live_versions(connection: Connection) -> list[str]:
    """Runs of which more than one version is live; only a damaged index lets that happen."""
    query = (
        select(PolicyVersion.run_id, func.count().label("num_live"))
        .where(PolicyVersion.is_live)
        .group_by(PolicyVersion.run_id)
        .having(func.count() > 1)
    )
    return [
        f"run {run_id} has {number} live versions; {_RESTORE}, or clear is_live of all but one and "
        "rebuild the index uq_policy_versions_live (REINDEX)"
        for run_id, number in connection.execute(query)
    ]


_COUNTED = (
    "num_trajectories",
    "num_scored",
    "num_passed",
    "num_scored_tokens",
    "num_tokens",
    "num_gated",
    "num_interventions",
)
"""Whole numbers of `version_stats`: exact, whatever the order in which they were added."""


def wrong_version_stats(connection: Connection) -> list[str]:
    """Running sums below what is there; or above it, though nothing was pruned."""
    sums = select(*_stats_key(VersionStats), *(getattr(VersionStats, name) for name in _COUNTED))
    kept = {tuple(row[:3]): _whole(row[3:]) for row in connection.execute(sums)}
    found = {tuple(row[:3]): _whole(row[3:]) for row in connection.execute(_stats_scan())}
    pruned = set(connection.scalars(select(Run.id).where(Run.num_pruned_groups > 0)))
    nothing = (0,) * len(_COUNTED)
    wrong = [
        key
        for key in sorted(kept.keys() | found.keys())
        if _disagree(kept.get(key, nothing), found.get(key, nothing), is_pruned=key[0] in pruned)
    ]
    if not wrong:
        return []
    run_id, kind, version = wrong[0]
    return [
        f"{len(wrong)} rows of version_stats disagree with trajectories, first kind {kind}, policy "
        f"version {version} of run {run_id}: curves by version are wrong there; {_RESTORE}"
    ]


def _disagree(kept: tuple[int, ...], found: tuple[int, ...], *, is_pruned: bool) -> bool:
    if is_pruned:
        return any(sum_ < number for sum_, number in zip(kept, found, strict=True))
    return kept != found


def _whole(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in values)  # PostgreSQL sums integers into decimals


def _stats_key(table: Any) -> tuple[Any, Any, Any]:
    version = getattr(table, "policy_version", None) or Trajectory.min_policy_version
    return table.run_id, table.kind, version


def _stats_scan() -> Select[Any]:
    t = Trajectory
    is_scored = t.accuracy.is_not(None)
    return (
        select(
            *_stats_key(t),
            func.count(),
            func.count(t.accuracy),
            func.coalesce(func.sum(case((t.accuracy >= 1, 1), else_=0)), 0),
            func.coalesce(func.sum(case((is_scored, t.num_tokens), else_=0)), 0),
            func.sum(t.num_tokens),
            func.sum(t.num_gated),
            func.sum(t.num_interventions),
        )
        .where(t.status == "ok", t.group_id.is_not(None))
        .group_by(*_stats_key(t))
    )


CHECKS = (
    Check(label="integrity of the file", find=file_integrity, is_decisive=True),
    Check(label="references between tables", find=missing_parents),
    Check(
        label="newest token arrays",
        find=undecodable_arrays(SAMPLED_ARRAYS_QUICK, newest_only=True),
        is_whole=False,
        is_quick=True,
    ),
    Check(label="token arrays", find=undecodable_arrays(SAMPLED_ARRAYS, newest_only=False)),
    Check(label="live versions", find=several_live_versions, is_quick=True),
    Check(
        label="consumed groups",
        find=counting(
            "consumed groups without the update that consumed them; nothing trains on them again: "
            f"{_RESTORE} if the curves matter",
            _CONSUMED_WITHOUT_UPDATE,
        ),
    ),
    Check(
        label="leases",
        find=counting(
            "groups that are neither leased nor free of a lease; stop the learner and start it "
            "again, it releases them",
            _LEASE_AND_STATUS_DISAGREE,
        ),
    ),
    Check(
        label="empty groups",
        find=counting(
            "trainable groups without a usable trajectory; set their status to 'failed', or the "
            "learner will give them up",
            _EMPTY_GROUPS,
        ),
    ),
    Check(
        label="tokens of trainable groups",
        find=counting(
            "usable trajectories of unconsumed groups without tokens; the learner cannot train on "
            f"them: {_RESTORE}, or set the status of their groups to 'failed'",
            _WITHOUT_TOKENS,
        ),
    ),
    Check(
        label="tokens of finished groups",
        find=counting(
            "finished groups that lost the tokens of some trajectories only, which pruning never "
            f"does; {_RESTORE}",
            _partly_pruned(),
        ),
    ),
    Check(
        label="tokens of demonstrations",
        find=counting(
            "demonstrations without tokens; delete these rows of trajectories, the expert solves "
            "their tasks anew",
            _DEMONSTRATIONS_WITHOUT_TOKENS,
        ),
    ),
    Check(
        label="trajectories of groups",
        find=counting(
            "groups whose num_on_policy, num_mixed, num_expert or num_tokens disagrees with their "
            f"trajectories; {_RESTORE}",
            _miscounted_groups(),
        ),
    ),
    Check(
        label="groups of updates",
        find=counting(
            f"updates whose num_groups disagrees with the groups they consumed; {_RESTORE}",
            _miscounted_updates(),
        ),
    ),
    Check(label="running sums", find=wrong_version_stats),
)
"""In the order in which they run: what makes others meaningless first."""
