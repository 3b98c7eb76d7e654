"""Rollout groups on their way into SQL.

Functions over an open transaction; `TrajectoryStore` opens and commits it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np
from sqlalchemy import Connection, delete, insert, select, update

from mentor_serve.errors import StoreError
from mentor_serve.store.encoding import encode
from mentor_serve.store.journal import ensure_task, insert_new
from mentor_serve.store.models import (
    InterventionRow,
    RolloutGroup,
    Trajectory,
    TrajectoryTokens,
)
from mentor_serve.store.records import (
    NewGroup,
    NewTrajectory,
    trajectory_id,
)
from mentor_serve.store.rollup import add_to_version_stats
from mentor_serve.types import GroupStatus, Rollout, Score, TrajectoryKind

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


def add_group(connection: Connection, run_id: str, group: NewGroup, *, now: datetime) -> bool:
    """Insert a group with everything that belongs to it; False where it is already there.

    Raises:
        StoreError: a status that a new group cannot have, or arrays of unequal length.
    """
    if group.status not in (GroupStatus.READY, GroupStatus.FAILED):
        raise StoreError(f"expected a new group to be ready or failed, got {group.status!r}")
    task_id = ensure_task(connection, run_id, group.task, now=now)
    guidance = group.guidance
    rows = [
        trajectory_row(item, run_id=run_id, now=now, version=guidance.policy_version)
        | {
            "id": trajectory_id(group.group_id, kind=item.kind, sample_index=item.sample_index),
            "group_id": group.group_id,
            "task_id": task_id,
        }
        for item in group.trajectories
    ]
    usable = [row for row in rows if row["status"] == "ok"]
    kinds = [row["kind"] for row in usable]
    group_row = {
        "id": group.group_id,
        "run_id": run_id,
        "task_id": task_id,
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
        "num_hint_tokens": group.num_hint_tokens,
        "hint_fraction": group.hint_fraction,
        "error": group.error,
        "created_at": now,
    }
    if insert_new(connection, RolloutGroup, [group_row]) == 0:
        return False
    insert_trajectories(connection, rows, group.trajectories)
    add_to_version_stats(connection, rows)
    return True


def add_served(
    connection: Connection,
    run_id: str,
    item: NewTrajectory,
    *,
    trajectory_id: str,
    now: datetime,
) -> bool:
    """Insert a response that belongs to no group; False where it is already there."""
    known = select(Trajectory.id).where(Trajectory.id == trajectory_id)
    if connection.scalars(known).one_or_none() is not None:
        return False
    row = trajectory_row(item, run_id=run_id, now=now, version=0)
    insert_trajectories(connection, [row | {"id": trajectory_id}], [item])
    return True


def score_served(connection: Connection, trajectory_id: str, score: Score) -> bool:
    """Set the reward of a served response; False where there is none of that id."""
    result = connection.execute(
        update(Trajectory)
        .where(Trajectory.id == trajectory_id, Trajectory.kind == TrajectoryKind.SERVED.value)
        .values(
            reward=finite(score.reward),
            accuracy=finite(score.accuracy),
            format_score=finite(score.format_score),
        )
    )
    return result.rowcount == 1


def prune_tokens(connection: Connection, run_id: str, *, before: datetime) -> int:
    """Delete the arrays of groups that nobody will train on any more."""
    finished = [GroupStatus.CONSUMED.value, GroupStatus.STALE.value, GroupStatus.FAILED.value]
    old = (
        select(Trajectory.id)
        .join(RolloutGroup, RolloutGroup.id == Trajectory.group_id)
        .where(
            RolloutGroup.run_id == run_id,
            RolloutGroup.status.in_(finished),
            RolloutGroup.created_at < before,
        )
    )
    result = connection.execute(
        delete(TrajectoryTokens).where(TrajectoryTokens.trajectory_id.in_(old))
    )
    return result.rowcount


def insert_trajectories(
    connection: Connection, rows: list[dict[str, Any]], items: Sequence[NewTrajectory]
) -> None:
    """Insert trajectory rows (in the order of `items`) with their tokens and interventions."""
    if not rows:
        return
    connection.execute(insert(Trajectory), rows)
    tokens = []
    interventions: list[dict[str, Any]] = []
    for row, item in zip(rows, items, strict=True):
        if item.rollout is None:
            continue
        tokens.append(_token_row(row["id"], item, item.rollout))
        interventions.extend(_intervention_rows(row["id"], item, item.rollout))
    if tokens:
        connection.execute(insert(TrajectoryTokens), tokens)
    if interventions:
        connection.execute(insert(InterventionRow), interventions)


def trajectory_row(
    item: NewTrajectory, *, run_id: str, now: datetime, version: int
) -> dict[str, Any]:
    """The columns of `trajectories` but the ids. Means are over the response's tokens."""
    rollout, score = item.rollout, item.score
    error = item.error
    if error is None and rollout is None:
        error = "no rollout"
    if error is None and score is None and item.kind is not TrajectoryKind.SERVED:
        error = "not scored"
    row: dict[str, Any] = {
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


def _measurements(item: NewTrajectory, *, version: int) -> dict[str, Any]:
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
    return finite(float(np.mean(values, dtype=np.float64))) if len(values) else None


def finite(value: float | None) -> float | None:
    """NULL for NaN: SQLite would store NULL by itself, PostgreSQL a NaN that sorts highest."""
    return None if value is None or math.isnan(value) else float(value)


def _token_row(row_id: str, item: NewTrajectory, rollout: Rollout) -> dict[str, Any]:
    row: dict[str, Any] = {
        "trajectory_id": row_id,
        "prompt_token_ids": encode(np.asarray(item.prompt_token_ids, dtype=np.int32)),
    }
    for attribute, column in ARRAY_COLUMNS.items():
        values = getattr(rollout, attribute)
        if len(values) != rollout.num_tokens:
            raise StoreError(
                f"expected {rollout.num_tokens} {attribute}, one for each token, got "
                f"{len(values)} in trajectory {row_id}"
            )
        row[column] = encode(values)
    return row


def _intervention_rows(row_id: str, item: NewTrajectory, rollout: Rollout) -> list[dict[str, Any]]:
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
