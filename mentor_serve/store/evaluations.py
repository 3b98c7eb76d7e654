"""Evaluations in SQL: one row a number, all rows of one evaluation in one transaction.

Functions over an open transaction; `TrajectoryStore` opens and commits it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, func, insert, select

from mentor_serve.errors import StoreError
from mentor_serve.store.groups import finite
from mentor_serve.store.models import Evaluation
from mentor_serve.store.records import new_id

POLICY = "policy"
"""`evaluations.model` of a version of the run's policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureRecord:
    """One number; NaN is stored as NULL."""

    metric: str
    k: int | None = None
    value: float | None
    value_low: float | None = None
    """Lower end of the 95 % interval."""
    value_high: float | None = None
    num_samples: int | None = None
    """Responses to each problem."""
    temperature: float | None = None
    """0 is greedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRecord:
    """Everything that one evaluation of one set of weights measured."""

    policy_version: int | None
    """None where the weights are no version of the run: the expert, a model directory."""
    suite: str
    num_problems: int
    measures: Sequence[MeasureRecord]
    model: str = POLICY
    seed: int | None = None
    evaluation_id: str | None = None
    """Set by the store."""
    created_at: datetime | None = None
    """Set by the store."""


_MEASURE_FIELDS = tuple(field.name for field in fields(MeasureRecord))
_NUMBERS = ("value", "value_low", "value_high")


def add(connection: Connection, run_id: str, record: EvaluationRecord, *, now: datetime) -> str:
    """Insert every number of an evaluation; returns the id they share.

    Raises:
        StoreError: nothing was measured, or a number occurs twice.
    """
    names = [(measure.metric, measure.k) for measure in record.measures]
    if not names or len(set(names)) != len(names):
        raise StoreError(
            f"expected one row a metric and k of the evaluation of {record.suite!r}, "
            f"got {len(names)} rows with {len(set(names))} names"
        )
    evaluation_id = new_id()
    common = {
        "evaluation_id": evaluation_id,
        "run_id": run_id,
        "policy_version": record.policy_version,
        "model": record.model,
        "suite": record.suite,
        "num_problems": record.num_problems,
        "seed": record.seed,
        "created_at": now,
    }
    rows: list[dict[str, Any]] = []
    for measure in record.measures:
        values = {name: getattr(measure, name) for name in _MEASURE_FIELDS}
        values |= {name: finite(values[name]) for name in _NUMBERS}
        rows.append({"id": new_id(), **common, **values})
    connection.execute(insert(Evaluation), rows)
    return evaluation_id


def latest(
    connection: Connection, run_id: str, *, suite: str | None = None
) -> EvaluationRecord | None:
    """The newest evaluation of a version of the run's policy, of one suite or of any."""
    query = (
        select(Evaluation)
        .where(Evaluation.run_id == run_id, Evaluation.policy_version.is_not(None))
        .order_by(Evaluation.id.desc())
        .limit(1)
    )
    if suite is not None:
        query = query.where(Evaluation.suite == suite)
    newest = connection.execute(query).mappings().one_or_none()
    if newest is None:
        return None
    whole = (
        select(Evaluation)
        .where(Evaluation.evaluation_id == newest["evaluation_id"])
        .order_by(Evaluation.id)
    )
    rows = connection.execute(whole).mappings().all()
    # Rows from before evaluations had ids stand alone.
    return _record(rows or [newest])


def newest_version(connection: Connection, run_id: str, *, suite: str) -> int | None:
    """The highest policy version that has an evaluation of the suite."""
    query = select(func.max(Evaluation.policy_version)).where(
        Evaluation.run_id == run_id, Evaluation.suite == suite
    )
    return connection.scalars(query).one()


def _record(rows: Sequence[Any]) -> EvaluationRecord:
    first = rows[0]
    return EvaluationRecord(
        policy_version=first["policy_version"],
        suite=first["suite"],
        num_problems=first["num_problems"],
        model=first["model"],
        seed=first["seed"],
        evaluation_id=first["evaluation_id"],
        created_at=first["created_at"],
        measures=[MeasureRecord(**{name: row[name] for name in _MEASURE_FIELDS}) for row in rows],
    )
