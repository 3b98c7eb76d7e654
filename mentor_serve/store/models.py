"""The tables that users query. Column names are a public contract: see docs/sql.md.

Ids are UUID version 7 strings, so that their order is the order of creation. A change here needs a
migration; `alembic check` in the tests says when one is missing.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    LargeBinary,
    MetaData,
    String,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from mentor_serve.store.columns import JsonText, PlainText, UtcTimestamp
from mentor_serve.types import GuidanceMethod

NAMING_CONVENTION = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    """Declarative base: one type for each Python type, constraint names that Alembic can drop."""

    metadata = MetaData(naming_convention=NAMING_CONVENTION)
    type_annotation_map = {  # noqa: RUF012 (SQLAlchemy reads it as a plain class attribute)
        datetime: UtcTimestamp,
        float: Double,
        bytes: LargeBinary,
        str: PlainText,
        dict[str, Any]: JsonText,
    }


def _id(*args: Any, **kwargs: Any) -> Mapped[str]:
    return mapped_column(String(64), *args, **kwargs)


def _word(**kwargs: Any) -> Mapped[str]:
    return mapped_column(String(32), **kwargs)


def _run_id(**kwargs: Any) -> Mapped[str]:
    return _id(ForeignKey("runs.id", ondelete="CASCADE"), **kwargs)


class Run(Base):
    """One training run; a restart under the same name continues it."""

    __tablename__ = "runs"

    id: Mapped[str] = _id(primary_key=True)
    name: Mapped[str] = mapped_column(String(200), unique=True)
    config_json: Mapped[dict[str, Any]]
    started_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    num_pruned_groups: Mapped[int] = mapped_column(server_default="0")
    """Groups that `mentor-serve db prune` deleted: tasks are counted on from where they were."""


class PolicyVersion(Base):
    """A snapshot of the policy's weights; `alpha` and `gamma` are what its rollouts use."""

    __tablename__ = "policy_versions"
    __table_args__ = (
        # At most one live version a run, whatever the writer does.
        Index(
            "uq_policy_versions_live",
            "run_id",
            unique=True,
            sqlite_where=text("is_live"),
            postgresql_where=text("is_live"),
        ),
    )

    run_id: Mapped[str] = _run_id(primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    step: Mapped[int]
    sha256: Mapped[str | None] = mapped_column(String(64))
    path: Mapped[str | None]
    created_at: Mapped[datetime]
    is_live: Mapped[bool]
    parent_version: Mapped[int | None]
    alpha: Mapped[float]
    gamma: Mapped[float]


class TaskRow(Base):
    """A problem with a verifiable answer."""

    __tablename__ = "tasks"
    __table_args__ = (
        UniqueConstraint("run_id", "content_key"),
        Index(None, "run_id", "source", "id"),
        # The expert's solutions of a problem are found again in other runs.
        Index(None, "content_key"),
    )

    id: Mapped[str] = _id(primary_key=True)
    run_id: Mapped[str] = _run_id()
    source: Mapped[str] = mapped_column(String(200))
    prompt: Mapped[str]
    answer: Mapped[str]
    split: Mapped[str] = mapped_column(String(64))
    metadata_json: Mapped[dict[str, Any]]
    content_key: Mapped[str] = mapped_column(String(64))
    """SHA-256 of everything above but the ids: the same problem is one row."""
    created_at: Mapped[datetime]


class RolloutGroup(Base):
    """All rollouts of one prompt under one guidance: the unit that the learner takes."""

    __tablename__ = "rollout_groups"
    __table_args__ = (
        CheckConstraint(
            "status IN ('ready', 'leased', 'consumed', 'stale', 'failed')", name="status"
        ),
        Index(None, "run_id", "status", "id"),
        Index(None, "run_id", "consumed_by_step"),
        Index(None, "run_id", "created_at"),
        # Partial: a learner holds a handful of the groups that there are.
        Index(
            None,
            "lease_owner",
            sqlite_where=text("lease_owner IS NOT NULL"),
            postgresql_where=text("lease_owner IS NOT NULL"),
        ),
        Index(None, "task_id"),
    )

    id: Mapped[str] = _id(primary_key=True)
    run_id: Mapped[str] = _run_id()
    task_id: Mapped[str] = _id(ForeignKey("tasks.id", ondelete="CASCADE"))
    policy_version: Mapped[int]
    """The version that was live when the group was asked for."""
    min_policy_version: Mapped[int]
    """The oldest version that produced one of its tokens: staleness counts from here."""
    step: Mapped[int]
    gamma: Mapped[float]
    alpha: Mapped[float]
    method: Mapped[str] = _word(server_default=GuidanceMethod.MENTOR.value)
    """How the expert takes part: `mentor`, `on_policy`, `luffy` or `questa`."""
    status: Mapped[str] = _word()
    num_on_policy: Mapped[int]
    num_mixed: Mapped[int]
    num_expert: Mapped[int] = mapped_column(server_default="0")
    """Whole expert trajectories among the group's."""
    num_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
    """Response tokens of the group's trajectories: throughput is read from groups alone."""
    num_hint_tokens: Mapped[int | None]
    """Tokens of an expert trajectory that the prompt shows; NULL where it shows none."""
    hint_fraction: Mapped[float | None]
    lease_owner: Mapped[str | None] = mapped_column(String(200))
    lease_expires_at: Mapped[datetime | None]
    consumed_by_step: Mapped[int | None]
    error: Mapped[str | None]
    created_at: Mapped[datetime]


class Trajectory(Base):
    """One response. `served` ones answer an HTTP request and have no group and no task.

    `expert` ones without a group are demonstrations: the expert's attempts at a task, kept for
    reuse. Those in a group are copies of one.
    """

    __tablename__ = "trajectories"
    __table_args__ = (
        CheckConstraint("kind IN ('on_policy', 'mixed', 'expert', 'served')", name="kind"),
        CheckConstraint("status IN ('ok', 'failed')", name="status"),
        UniqueConstraint("group_id", "kind", "sample_index"),
        # Lists of the newest: what they filter by is in the index, so that a filter which few
        # rows pass walks index entries and not rows with their texts.
        Index("ix_trajectories_listing", "run_id", "id", "kind", "accuracy", "num_interventions"),
        Index(None, "task_id"),
        # Partial: most runs have none.
        Index(
            None,
            "demonstration_id",
            sqlite_where=text("demonstration_id IS NOT NULL"),
            postgresql_where=text("demonstration_id IS NOT NULL"),
        ),
    )

    id: Mapped[str] = _id(primary_key=True)
    group_id: Mapped[str | None] = _id(ForeignKey("rollout_groups.id", ondelete="CASCADE"))
    run_id: Mapped[str] = _run_id()
    task_id: Mapped[str | None] = _id(ForeignKey("tasks.id", ondelete="CASCADE"))
    kind: Mapped[str] = _word()
    sample_index: Mapped[int]
    status: Mapped[str] = _word()
    error: Mapped[str | None]
    reward: Mapped[float | None]
    accuracy: Mapped[float | None]
    format_score: Mapped[float | None]
    text: Mapped[str | None]
    num_prompt_tokens: Mapped[int]
    num_tokens: Mapped[int]
    num_gated: Mapped[int]
    num_interventions: Mapped[int]
    mean_entropy: Mapped[float | None]
    mean_weight: Mapped[float | None]
    min_policy_version: Mapped[int]
    max_policy_version: Mapped[int]
    stop_reason: Mapped[str | None] = _word()
    latency_s: Mapped[float | None]
    seed: Mapped[int | None] = mapped_column(BigInteger)
    expert_lost: Mapped[bool]
    demonstration_id: Mapped[str | None] = _id()
    """The demonstration that this response copies, or that its prompt quotes. Not a foreign key: it
    may be of another run, which may be deleted."""
    expert_model: Mapped[str | None]
    """Name of the model that wrote it; NULL where the policy (or the mixture) did."""
    created_at: Mapped[datetime]


class VersionStats(Base):
    """Sums over the usable trajectories of groups, by kind and oldest policy version.

    Kept by every transaction that stores a group, so that curves over versions cost the same
    however many trajectories there are. Rows that are pruned stay counted.
    """

    __tablename__ = "version_stats"

    run_id: Mapped[str] = _run_id(primary_key=True)
    kind: Mapped[str] = _word(primary_key=True)
    policy_version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    num_trajectories: Mapped[int] = mapped_column(BigInteger)
    num_scored: Mapped[int] = mapped_column(BigInteger)
    """With an accuracy; of these are `num_passed`, `num_scored_tokens` and the next two sums."""
    num_passed: Mapped[int] = mapped_column(BigInteger)
    accuracy_sum: Mapped[float]
    reward_sum: Mapped[float]
    num_scored_tokens: Mapped[int] = mapped_column(BigInteger)
    num_tokens: Mapped[int] = mapped_column(BigInteger)
    num_gated: Mapped[int] = mapped_column(BigInteger)
    num_interventions: Mapped[int] = mapped_column(BigInteger)
    weight_sum: Mapped[float]
    """Over tokens, as is `entropy_sum`."""
    entropy_sum: Mapped[float]
    num_entropy_tokens: Mapped[int] = mapped_column(BigInteger)
    """Of responses whose entropies are known: an expert's own are not."""


class TrajectoryTokens(Base):
    """Per-token arrays of one trajectory, `mentor_serve.store.encoding` bytes."""

    __tablename__ = "trajectory_tokens"

    trajectory_id: Mapped[str] = _id(
        ForeignKey("trajectories.id", ondelete="CASCADE"), primary_key=True
    )
    prompt_token_ids: Mapped[bytes]
    token_ids: Mapped[bytes]
    policy_logprobs: Mapped[bytes]
    expert_logprobs: Mapped[bytes]
    mixed_logprobs: Mapped[bytes]
    entropies: Mapped[bytes]
    weights: Mapped[bytes]
    sources: Mapped[bytes]
    versions: Mapped[bytes]


class InterventionRow(Base):
    """One token of the policy that the expert replaced."""

    __tablename__ = "interventions"

    trajectory_id: Mapped[str] = _id(
        ForeignKey("trajectories.id", ondelete="CASCADE"), primary_key=True
    )
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    proposed_token_id: Mapped[int]
    proposed_text: Mapped[str | None]
    chosen_token_id: Mapped[int]
    chosen_text: Mapped[str | None]
    entropy: Mapped[float | None]
    weight: Mapped[float | None]
    policy_logprob: Mapped[float | None]
    expert_logprob: Mapped[float | None]


class Update(Base):
    """One update of the learner. `policy_version` is the version that it produced."""

    __tablename__ = "updates"
    __table_args__ = (
        ForeignKeyConstraint(
            ["run_id", "policy_version"], ["policy_versions.run_id", "policy_versions.version"]
        ),
    )

    run_id: Mapped[str] = _run_id(primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    policy_version: Mapped[int]
    num_groups: Mapped[int]
    num_trajectories: Mapped[int]
    num_tokens: Mapped[int]
    loss: Mapped[float | None]
    grad_norm: Mapped[float | None]
    entropy: Mapped[float | None]
    clip_fraction_low: Mapped[float | None]
    clip_fraction_high: Mapped[float | None]
    mismatch_kl: Mapped[float | None]
    effective_sample_share: Mapped[float | None]
    truncated_weight_share: Mapped[float | None]
    num_trained_tokens: Mapped[int | None]
    num_skipped_steps: Mapped[int | None]
    learning_rate: Mapped[float | None]
    mean_reward_on_policy: Mapped[float | None]
    mean_reward_mixed: Mapped[float | None]
    mean_accuracy_on_policy: Mapped[float | None]
    mean_accuracy_mixed: Mapped[float | None]
    frac_reward_zero_std: Mapped[float | None]
    mean_response_tokens: Mapped[float | None]
    truncated_share: Mapped[float | None]
    mean_weight: Mapped[float | None]
    gated_share: Mapped[float | None]
    intervention_rate: Mapped[float | None]
    alpha: Mapped[float]
    gamma: Mapped[float]
    staleness_mean: Mapped[float | None]
    staleness_max: Mapped[int | None]
    token_staleness_mean: Mapped[float | None]
    num_silent_groups: Mapped[int | None]
    num_left_out: Mapped[int | None]
    num_stale: Mapped[int]
    step_time_s: Mapped[float | None]
    wait_time_s: Mapped[float | None]
    created_at: Mapped[datetime]


class Evaluation(Base):
    """One number of one evaluation; the rows of an evaluation share `evaluation_id`."""

    __tablename__ = "evaluations"
    __table_args__ = (
        Index(None, "run_id", "suite", "metric", "policy_version"),
        Index(None, "evaluation_id"),
    )

    id: Mapped[str] = _id(primary_key=True)
    evaluation_id: Mapped[str | None] = _id()
    run_id: Mapped[str] = _run_id()
    policy_version: Mapped[int | None]
    """NULL where the weights are no version of the run; `model` then says what they are."""
    model: Mapped[str] = mapped_column(server_default="policy")
    suite: Mapped[str] = mapped_column(String(200))
    metric: Mapped[str] = mapped_column(String(64))
    k: Mapped[int | None]
    value: Mapped[float | None]
    value_low: Mapped[float | None]
    """Ends of the 95 % interval."""
    value_high: Mapped[float | None]
    num_problems: Mapped[int]
    num_samples: Mapped[int | None]
    temperature: Mapped[float | None]
    seed: Mapped[int | None] = mapped_column(BigInteger)
    created_at: Mapped[datetime]


class Event(Base):
    """Something that an operator should know about the run."""

    __tablename__ = "events"
    __table_args__ = (
        CheckConstraint("severity IN ('info', 'warning', 'error')", name="severity"),
        Index(None, "run_id", "severity", "id"),
        Index(None, "run_id", "id"),
    )

    id: Mapped[str] = _id(primary_key=True)
    run_id: Mapped[str] = _run_id()
    kind: Mapped[str] = mapped_column(String(64))
    severity: Mapped[str] = _word()
    message: Mapped[str]
    details_json: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]
