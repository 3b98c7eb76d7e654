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

from sqlalchemy import Connection, Select, and_, func, select
from sqlalchemy.exc import DatabaseError

from mentor_serve.errors import StoreError
from mentor_serve.store.consistency import (
    CONSUMED_WITHOUT_UPDATE,
    DEMONSTRATIONS_WITHOUT_TOKENS,
    EMPTY_GROUPS,
    LEASE_AND_STATUS_DISAGREE,
    RESTORE,
    WITHOUT_TOKENS,
    miscounted_groups,
    miscounted_updates,
    partly_pruned,
    several_live_versions,
    wrong_version_stats,
)
from mentor_serve.store.encoding import decode
from mentor_serve.store.models import (
    Base,
    Trajectory,
    TrajectoryTokens,
)

SAMPLED_ARRAYS = 1000
"""Rows of `trajectory_tokens` whose arrays a whole check decodes, spread evenly."""
SAMPLED_ARRAYS_QUICK = 50
"""... and a quick one: the newest."""

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
    return [f"the file is damaged: {line}; {RESTORE}" for line in said if line != "ok"]


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
        f"{number} rows of {child} refer to a row of {parent} that is not there; {RESTORE}"
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
            f"are damaged, first {broken[0]}; {RESTORE}: without them the response can be neither "
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
            f"{RESTORE} if the curves matter",
            CONSUMED_WITHOUT_UPDATE,
        ),
    ),
    Check(
        label="leases",
        find=counting(
            "groups that are neither leased nor free of a lease; stop the learner and start it "
            "again, it releases them",
            LEASE_AND_STATUS_DISAGREE,
        ),
    ),
    Check(
        label="empty groups",
        find=counting(
            "trainable groups without a usable trajectory; set their status to 'failed', or the "
            "learner will give them up",
            EMPTY_GROUPS,
        ),
    ),
    Check(
        label="tokens of trainable groups",
        find=counting(
            "usable trajectories of unconsumed groups without tokens; the learner cannot train on "
            f"them: {RESTORE}, or set the status of their groups to 'failed'",
            WITHOUT_TOKENS,
        ),
    ),
    Check(
        label="tokens of finished groups",
        find=counting(
            "finished groups that lost the tokens of some trajectories only, which pruning never "
            f"does; {RESTORE}",
            partly_pruned(),
        ),
    ),
    Check(
        label="tokens of demonstrations",
        find=counting(
            "demonstrations without tokens; delete these rows of trajectories, the expert solves "
            "their tasks anew",
            DEMONSTRATIONS_WITHOUT_TOKENS,
        ),
    ),
    Check(
        label="trajectories of groups",
        find=counting(
            "groups whose num_on_policy, num_mixed, num_expert or num_tokens disagrees with their "
            f"trajectories; {RESTORE}",
            miscounted_groups(),
        ),
    ),
    Check(
        label="groups of updates",
        find=counting(
            f"updates whose num_groups disagrees with the groups they consumed; {RESTORE}",
            miscounted_updates(),
        ),
    ),
    Check(label="running sums", find=wrong_version_stats),
)
"""In the order in which they run: what makes others meaningless first."""
