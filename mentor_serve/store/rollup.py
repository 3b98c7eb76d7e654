"""Running sums over trajectories by run, kind and policy version: the table `version_stats`.

Curves over versions are the questions asked most, and their cost must not grow with the number of
trajectories. So every transaction that stores a group adds to the sums, and nothing ever subtracts:
what `db prune` deletes stays in the curves. Functions over an open transaction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from sqlalchemy import Connection, Insert
from sqlalchemy.dialects import postgresql, sqlite

from mentor_serve.store.models import VersionStats

_KEY = ("run_id", "kind", "policy_version")
_Sums = dict[str, Any]
StatsKey = tuple[str, str, int]
VersionSums = dict[StatsKey, _Sums]
"""Run, kind and policy version to what is added to their sums."""


def add_to_version_stats(connection: Connection, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows of `trajectories` that were inserted in this transaction; failed ones count nothing.

    Keys are written in their order: two transactions that meet never wait for each other in turn.
    """
    add_version_sums(connection, [version_sums(rows)])


def add_version_sums(connection: Connection, parts: Iterable[VersionSums]) -> None:
    """Add what `version_sums` made of the rows that were inserted in this transaction."""
    total: VersionSums = {}
    for part in parts:
        for key, sums in part.items():
            _add(total, key, sums)
    if total:
        connection.execute(
            _upsert(connection.dialect.name),
            [dict(zip(_KEY, key, strict=True)) | total[key] for key in sorted(total)],
        )


@cache
def _upsert(dialect_name: str) -> Insert:
    """One object for all calls: SQLAlchemy then recognises it without looking at every part."""
    dialect = postgresql if dialect_name == "postgresql" else sqlite
    statement = dialect.insert(VersionStats)
    table = VersionStats.__table__.columns
    added = {name: table[name] + statement.excluded[name] for name in _SUMMED}
    upsert: Insert = statement.on_conflict_do_update(index_elements=_KEY, set_=added)
    return upsert


def _add(into: VersionSums, key: StatsKey, terms: Mapping[str, Any]) -> None:
    sums = into.setdefault(key, dict.fromkeys(_SUMMED, 0))
    for name, value in terms.items():
        sums[name] += value


_SUMMED = tuple(column.name for column in VersionStats.__table__.columns if column.name not in _KEY)


def version_sums(rows: Iterable[Mapping[str, Any]]) -> VersionSums:
    """What rows of `trajectories` add to the sums; needs no database."""
    total: VersionSums = {}
    for row in rows:
        if row["status"] == "ok":
            _add(total, (row["run_id"], row["kind"], row["min_policy_version"]), _terms(row))
    return total


def _terms(row: Mapping[str, Any]) -> _Sums:
    """What one trajectory adds to each sum."""
    tokens, accuracy = row["num_tokens"], row["accuracy"]
    is_scored = accuracy is not None
    return {
        "num_trajectories": 1,
        "num_scored": int(is_scored),
        "num_passed": int(is_scored and accuracy >= 1),
        "accuracy_sum": accuracy or 0.0,
        "reward_sum": (row["reward"] or 0.0) if is_scored else 0.0,
        "num_scored_tokens": tokens if is_scored else 0,
        "num_tokens": tokens,
        "num_gated": row["num_gated"],
        "num_interventions": row["num_interventions"],
        "weight_sum": (row["mean_weight"] or 0.0) * tokens,
        "entropy_sum": (row["mean_entropy"] or 0.0) * tokens,
        "num_entropy_tokens": 0 if row["mean_entropy"] is None else tokens,
    }
