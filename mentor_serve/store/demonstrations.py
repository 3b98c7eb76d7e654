"""The expert's own solutions of tasks in SQL: functions over an open transaction.

A demonstration is a row of `trajectories` of kind `expert` without a group. Every attempt is kept,
wrong ones too, so that what the expert cannot solve is known as well. An attempt is found again by
the problem (`tasks.content_key`), the expert's name and the exact prompt, in whatever run.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import numpy as np
from sqlalchemy import Connection, func, select
from sqlalchemy.orm import aliased

from mentor_serve.errors import StoreError
from mentor_serve.store.encoding import decode, encode
from mentor_serve.store.groups import insert_trajectories, trajectory_row
from mentor_serve.store.journal import content_key, ensure_task
from mentor_serve.store.models import TaskRow, Trajectory, TrajectoryTokens
from mentor_serve.store.records import (
    DemonstrationAttempt,
    NewDemonstration,
    StoredDemonstration,
)
from mentor_serve.types import Score, StopReason, Task, TrajectoryKind


def add(
    connection: Connection,
    run_id: str,
    task: Task,
    items: Sequence[NewDemonstration],
    *,
    now: datetime,
) -> int:
    """Insert attempts at a task; returns how many were new.

    Raises:
        StoreError: one that is not of kind expert, names no expert or has no tokens.
    """
    for item in items:
        one = item.trajectory
        if one.kind is not TrajectoryKind.EXPERT or not one.expert_model or one.rollout is None:
            raise StoreError(
                "expected a demonstration of kind expert with a rollout and the expert's name, got "
                f"kind {one.kind.value}, expert_model {one.expert_model!r}"
            )
    ids = [item.demonstration_id for item in items]
    known = set(connection.scalars(select(Trajectory.id).where(Trajectory.id.in_(ids))))
    new = [item for item in items if item.demonstration_id not in known]
    task_id = ensure_task(connection, run_id, task, now=now)
    rows = [
        trajectory_row(item.trajectory, run_id=run_id, now=now, version=0)
        | {"id": item.demonstration_id, "task_id": task_id}
        for item in new
    ]
    insert_trajectories(connection, rows, [item.trajectory for item in new])
    return len(new)


def attempts(
    connection: Connection,
    run_id: str,
    task: Task,
    *,
    expert_model: str,
    prompt_token_ids: Sequence[int],
    own_run_only: bool = False,
) -> list[DemonstrationAttempt]:
    """Every attempt of this expert at this prompt, oldest first; uses are those of `run_id`.

    With `own_run_only` the attempts are those of `run_id`, too.
    """
    user = aliased(Trajectory)
    num_uses = (
        select(func.count(user.group_id.distinct()))
        .where(user.demonstration_id == Trajectory.id, user.run_id == run_id)
        .scalar_subquery()
    )
    prompt = encode(np.asarray(prompt_token_ids, dtype=np.int32))
    query = (
        select(
            Trajectory.id.label("demonstration_id"),
            Trajectory.accuracy,
            Trajectory.stop_reason,
            Trajectory.num_tokens,
            num_uses.label("num_uses"),
        )
        .join(TaskRow, TaskRow.id == Trajectory.task_id)
        .join(TrajectoryTokens, TrajectoryTokens.trajectory_id == Trajectory.id)
        .where(
            TaskRow.content_key == content_key(task),
            Trajectory.kind == TrajectoryKind.EXPERT.value,
            Trajectory.group_id.is_(None),
            Trajectory.expert_model == expert_model,
            TrajectoryTokens.prompt_token_ids == prompt,
        )
        .order_by(Trajectory.id)
    )
    if own_run_only:
        query = query.where(Trajectory.run_id == run_id)
    return [
        DemonstrationAttempt(**{**row, "stop_reason": StopReason(row["stop_reason"])})
        for row in connection.execute(query).mappings()
    ]


def read(connection: Connection, ids: Sequence[str]) -> list[StoredDemonstration]:
    """Scored demonstrations with their tokens, in the order of `ids`.

    Raises:
        StoreError: one of them is gone (its run was deleted) or was never scored.
    """
    query = (
        select(Trajectory, TrajectoryTokens.token_ids, TrajectoryTokens.expert_logprobs)
        .join(TrajectoryTokens, TrajectoryTokens.trajectory_id == Trajectory.id)
        .where(Trajectory.id.in_(ids), Trajectory.status == "ok")
    )
    found = {
        row["id"]: StoredDemonstration(
            demonstration_id=row["id"],
            score=Score(
                reward=row["reward"], accuracy=row["accuracy"], format_score=row["format_score"]
            ),
            text=row["text"] or "",
            token_ids=decode(row["token_ids"]),
            expert_logprobs=decode(row["expert_logprobs"]),
            stop_reason=StopReason(row["stop_reason"]),
        )
        for row in connection.execute(query).mappings()
    }
    missing = [one for one in ids if one not in found]
    if missing:
        raise StoreError(
            f"expected the scored demonstrations {missing} in the store, found none; they are "
            "generated anew when their tasks come again"
        )
    return [found[one] for one in ids]
