"""What a row of an exported table holds: the one list of its columns.

Names are those of the database (docs/sql.md) but for `completion`, which is the response's `text`
under the name that trainers expect, `run_name` and `group_status`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, Select, select
from sqlalchemy.orm import InstrumentedAttribute

from mentor_serve.store.models import InterventionRow, RolloutGroup, Run, TaskRow, Trajectory

ColumnType = Literal["string", "int64", "float64", "bool", "timestamp"]
ValueType = Literal["int32", "float32", "uint8"]


@dataclass(frozen=True, slots=True)
class Column:
    """One value a trajectory."""

    name: str
    source: InstrumentedAttribute[Any]
    type: ColumnType


COLUMNS = (
    Column("id", Trajectory.id, "string"),
    Column("run_id", Trajectory.run_id, "string"),
    Column("run_name", Run.name, "string"),
    Column("group_id", Trajectory.group_id, "string"),
    Column("task_id", Trajectory.task_id, "string"),
    Column("kind", Trajectory.kind, "string"),
    Column("sample_index", Trajectory.sample_index, "int64"),
    Column("status", Trajectory.status, "string"),
    Column("error", Trajectory.error, "string"),
    Column("source", TaskRow.source, "string"),
    Column("split", TaskRow.split, "string"),
    Column("prompt", TaskRow.prompt, "string"),
    Column("answer", TaskRow.answer, "string"),
    Column("completion", Trajectory.text, "string"),
    Column("reward", Trajectory.reward, "float64"),
    Column("accuracy", Trajectory.accuracy, "float64"),
    Column("format_score", Trajectory.format_score, "float64"),
    Column("num_prompt_tokens", Trajectory.num_prompt_tokens, "int64"),
    Column("num_tokens", Trajectory.num_tokens, "int64"),
    Column("num_gated", Trajectory.num_gated, "int64"),
    Column("num_interventions", Trajectory.num_interventions, "int64"),
    Column("mean_entropy", Trajectory.mean_entropy, "float64"),
    Column("mean_weight", Trajectory.mean_weight, "float64"),
    Column("min_policy_version", Trajectory.min_policy_version, "int64"),
    Column("max_policy_version", Trajectory.max_policy_version, "int64"),
    Column("stop_reason", Trajectory.stop_reason, "string"),
    Column("latency_s", Trajectory.latency_s, "float64"),
    Column("seed", Trajectory.seed, "int64"),
    Column("expert_lost", Trajectory.expert_lost, "bool"),
    Column("demonstration_id", Trajectory.demonstration_id, "string"),
    Column("expert_model", Trajectory.expert_model, "string"),
    Column("created_at", Trajectory.created_at, "timestamp"),
    Column("policy_version", RolloutGroup.policy_version, "int64"),
    Column("alpha", RolloutGroup.alpha, "float64"),
    Column("gamma", RolloutGroup.gamma, "float64"),
    Column("method", RolloutGroup.method, "string"),
    Column("num_hint_tokens", RolloutGroup.num_hint_tokens, "int64"),
    Column("hint_fraction", RolloutGroup.hint_fraction, "float64"),
    Column("group_status", RolloutGroup.status, "string"),
    Column("consumed_by_step", RolloutGroup.consumed_by_step, "int64"),
)
"""In the order of the table; those of group and task are NULL where there is none."""

ARRAYS: dict[str, ValueType] = {
    "prompt_token_ids": "int32",
    "token_ids": "int32",
    "policy_logprobs": "float32",
    "expert_logprobs": "float32",
    "mixed_logprobs": "float32",
    "entropies": "float32",
    "weights": "float32",
    "sources": "uint8",
    "versions": "int32",
}
"""Columns of `trajectory_tokens` to the type of their values."""

INTERVENTION: dict[str, ColumnType] = {
    "position": "int64",
    "proposed_token_id": "int64",
    "proposed_text": "string",
    "chosen_token_id": "int64",
    "chosen_text": "string",
    "entropy": "float64",
    "weight": "float64",
    "policy_logprob": "float64",
    "expert_logprob": "float64",
}
"""Columns of `interventions`: the fields of each entry of the list column of that name."""


def rows_query() -> Select[Any]:
    """Every trajectory with `COLUMNS`; arrays and interventions are read apart."""
    columns: list[ColumnElement[Any]] = [column.source.label(column.name) for column in COLUMNS]
    return (
        select(*columns)
        .select_from(Trajectory)
        .join(Run, Run.id == Trajectory.run_id)
        .outerjoin(TaskRow, TaskRow.id == Trajectory.task_id)
        .outerjoin(RolloutGroup, RolloutGroup.id == Trajectory.group_id)
    )


def interventions_query(ids: list[str]) -> Select[Any]:
    """`INTERVENTION` of these trajectories, by trajectory and position."""
    table = InterventionRow.__table__
    return (
        select(table.c.trajectory_id, *(table.c[name] for name in INTERVENTION))
        .where(table.c.trajectory_id.in_(ids))
        .order_by(table.c.trajectory_id, table.c.position)
    )
