"""Groups as rows: everything about storing a group that needs no database.

Pure functions; they run in the thread of whoever made the group, so that the writer's transaction
has nothing left to compute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from sqlalchemy import Dialect

from mentor_serve.errors import StoreError
from mentor_serve.store.bulk import BulkInsert, Row
from mentor_serve.store.encoding import encode
from mentor_serve.store.journal import content_key
from mentor_serve.store.models import Base, InterventionRow, Trajectory, TrajectoryTokens
from mentor_serve.store.records import NewGroup, NewTrajectory, trajectory_id
from mentor_serve.store.rollup import VersionSums, version_sums
from mentor_serve.types import GroupStatus, Rollout, Task, TrajectoryKind

ARRAY_COLUMNS = {
    "token_ids": "token_ids",
    "policy_logprobs": "policy_logprobs",
    "expert_logprobs": "expert_logprobs",
    "mixed_logprobs": "mixed_logprobs",
    "entropies": "entropies",
    "weights": "weights",
    "sources": "sources",
    "policy_versions": "versions",
}
"""Rollout attribute to column of `trajectory_tokens`."""

RowValues = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class DetailRows:
    """Rows of trajectories, of their tokens and of their interventions."""

    trajectories: list[Row]
    """Without the id of the task, which comes last."""
    tokens: list[Row]
    interventions: list[Row]


class DetailInserts:
    """The inserts that make up nearly all of what a group costs, for one kind of database."""

    def __init__(self, dialect: Dialect) -> None:
        """Take the dialect whose driver gets the rows."""
        columns = [one.name for one in Trajectory.__table__.columns if one.name != "task_id"]
        self.trajectories = BulkInsert(Trajectory, [*columns, "task_id"], dialect)
        self.tokens = _into_all_columns(TrajectoryTokens, dialect)
        self.interventions = _into_all_columns(InterventionRow, dialect)
        self._without_task = BulkInsert(Trajectory, columns, dialect)

    def rows(self, values: Sequence[RowValues], items: Sequence[NewTrajectory]) -> DetailRows:
        """Rows of trajectories: their columns (`trajectory_row` and the ids), in order of `items`.

        Raises:
            StoreError: arrays of unequal length.
        """
        rows = DetailRows(
            trajectories=[self._without_task.row(row) for row in values],
            tokens=[],
            interventions=[],
        )
        prompts: dict[int, bytes] = {}
        for row, item in zip(values, items, strict=True):
            if item.rollout is None:
                continue
            # The members of a group share one prompt, and mostly one object.
            prompt = prompts.get(id(item.prompt_token_ids))
            if prompt is None:
                prompt = encode(np.asarray(item.prompt_token_ids, dtype=np.int32))
                prompts[id(item.prompt_token_ids)] = prompt
            tokens = _token_row(row["id"], item.rollout) | {"prompt_token_ids": prompt}
            rows.tokens.append(self.tokens.row(tokens))
            rows.interventions.extend(
                self.interventions.row(one)
                for one in _intervention_rows(row["id"], item, item.rollout)
            )
        return rows


def _into_all_columns(model: type[Base], dialect: Dialect) -> BulkInsert:
    return BulkInsert(model, [column.name for column in model.__table__.columns], dialect)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRows:
    """The rows of one group; only the id of its task is not known yet."""

    run_id: str
    group_id: str
    task: Task
    content_key: str
    created_at: datetime
    group: RowValues
    details: DetailRows
    sums: VersionSums


def group_rows(run_id: str, group: NewGroup, *, now: datetime, inserts: DetailInserts) -> GroupRows:
    """The rows of a group that came at `now`, as the driver behind `inserts` takes them.

    Raises:
        StoreError: a status that a new group cannot have, or arrays of unequal length.
    """
    if group.status not in (GroupStatus.READY, GroupStatus.FAILED):
        raise StoreError(f"expected a new group to be ready or failed, got {group.status!r}")
    version = group.guidance.policy_version
    rows = [
        trajectory_row(item, run_id=run_id, now=now, version=version)
        | {
            "id": trajectory_id(group.group_id, kind=item.kind, sample_index=item.sample_index),
            "group_id": group.group_id,
        }
        for item in group.trajectories
    ]
    return GroupRows(
        run_id=run_id,
        group_id=group.group_id,
        task=group.task,
        content_key=content_key(group.task),
        created_at=now,
        group=_group_row(run_id, group, rows, now=now),
        details=inserts.rows(rows, group.trajectories),
        sums=version_sums(rows),
    )


def _group_row(run_id: str, group: NewGroup, rows: list[RowValues], *, now: datetime) -> RowValues:
    guidance = group.guidance
    usable = [row for row in rows if row["status"] == "ok"]
    kinds = [row["kind"] for row in usable]
    return {
        "id": group.group_id,
        "run_id": run_id,
        "policy_version": guidance.policy_version,
        # No version of the policy wrote an expert's trajectory: it makes no group older.
        "min_policy_version": min(
            [
                row["min_policy_version"]
                for row in usable
                if row["kind"] != TrajectoryKind.EXPERT.value
            ],
            default=guidance.policy_version,
        ),
        "step": guidance.step,
        "gamma": guidance.gamma,
        "alpha": guidance.alpha,
        "method": group.method.value,
        "status": str(group.status),
        "num_on_policy": kinds.count(TrajectoryKind.ON_POLICY.value),
        "num_mixed": kinds.count(TrajectoryKind.MIXED.value),
        "num_expert": kinds.count(TrajectoryKind.EXPERT.value),
        "num_tokens": sum(row["num_tokens"] for row in rows),
        "num_hint_tokens": group.num_hint_tokens,
        "hint_fraction": group.hint_fraction,
        "error": group.error,
        "created_at": now,
    }


def trajectory_row(item: NewTrajectory, *, run_id: str, now: datetime, version: int) -> RowValues:
    """The columns of `trajectories` but the ids. Means are over the response's tokens."""
    rollout, score = item.rollout, item.score
    error = item.error
    if error is None and rollout is None:
        error = "no rollout"
    if error is None and score is None and item.kind is not TrajectoryKind.SERVED:
        error = "not scored"
    row: RowValues = {
        "run_id": run_id,
        "kind": item.kind.value,
        "sample_index": item.sample_index,
        "status": "ok" if error is None else "failed",
        "error": error,
        "reward": None if score is None else finite(score.reward),
        "accuracy": None if score is None else finite(score.accuracy),
        "format_score": None if score is None else finite(score.format_score),
        "num_prompt_tokens": len(item.prompt_token_ids),
        "seed": item.seed,
        "demonstration_id": item.demonstration_id,
        "expert_model": item.expert_model,
        "created_at": now,
    }
    return row | _measurements(item, version=version)


def _measurements(item: NewTrajectory, *, version: int) -> RowValues:
    rollout = item.rollout
    if rollout is None:
        return {
            "text": item.text,
            "num_tokens": 0,
            "num_gated": 0,
            "num_interventions": 0,
            "mean_entropy": None,
            "mean_weight": None,
            "min_policy_version": version,
            "max_policy_version": version,
            "stop_reason": None,
            "latency_s": None,
            "expert_lost": False,
        }
    versions = rollout.policy_versions
    # Whole expert trajectories have no gate, and the policy proposed nothing that was replaced.
    is_expert = item.kind is TrajectoryKind.EXPERT
    return {
        "text": rollout.text if item.text is None else item.text,
        "num_tokens": rollout.num_tokens,
        "num_gated": 0 if is_expert else rollout.num_gated,
        "num_interventions": 0 if is_expert else rollout.num_interventions,
        "mean_entropy": _mean(rollout.entropies),
        "mean_weight": _mean(rollout.weights),
        "min_policy_version": int(versions.min()) if len(versions) else version,
        "max_policy_version": int(versions.max()) if len(versions) else version,
        "stop_reason": rollout.stop_reason.value,
        "latency_s": finite(rollout.latency_s),
        "expert_lost": rollout.expert_lost,
    }


def _mean(values: Any) -> float | None:
    if len(values) == 0:
        return None
    return finite(float(np.add.reduce(values, dtype=np.float64)) / len(values))


def finite(value: float | None) -> float | None:
    """NULL for NaN: SQLite would store NULL by itself, PostgreSQL a NaN that sorts highest."""
    return None if value is None or math.isnan(value) else float(value)


def _token_row(row_id: str, rollout: Rollout) -> RowValues:
    row: RowValues = {"trajectory_id": row_id}
    for attribute, column in ARRAY_COLUMNS.items():
        values = getattr(rollout, attribute)
        if len(values) != rollout.num_tokens:
            raise StoreError(
                f"expected {rollout.num_tokens} {attribute}, one for each token, got "
                f"{len(values)} in trajectory {row_id}"
            )
        row[column] = encode(values)
    return row


def _intervention_rows(row_id: str, item: NewTrajectory, rollout: Rollout) -> list[RowValues]:
    return [
        {
            "trajectory_id": row_id,
            "position": one.position,
            "proposed_token_id": one.proposed_token_id,
            "proposed_text": item.token_texts.get(one.proposed_token_id),
            "chosen_token_id": one.chosen_token_id,
            "chosen_text": item.token_texts.get(one.chosen_token_id),
            "entropy": finite(one.entropy),
            "weight": finite(one.weight),
            "policy_logprob": finite(one.policy_logprob),
            "expert_logprob": finite(one.expert_logprob),
        }
        for one in rollout.interventions
    ]
