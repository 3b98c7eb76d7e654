"""The tables and views of the first release.

Revision 0001.
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

from mentor_serve.store.views import VIEWS_0001, create_statement, drop_statement

revision: str = "0001"
down_revision: str | None = None
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    """Change the schema."""
    op.create_table(
        "runs",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("config_json", sa.Text(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_runs")),
        sa.UniqueConstraint("name", name=op.f("uq_runs_name")),
    )
    op.create_table(
        "evaluations",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("policy_version", sa.Integer(), nullable=False),
        sa.Column("suite", sa.String(length=200), nullable=False),
        sa.Column("metric", sa.String(length=64), nullable=False),
        sa.Column("k", sa.Integer(), nullable=True),
        sa.Column("value", sa.Double(), nullable=True),
        sa.Column("num_problems", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["run_id"], ["runs.id"], name=op.f("fk_evaluations_run_id_runs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_evaluations")),
    )
    op.create_index(
        op.f("ix_evaluations_run_id_suite_metric_policy_version"),
        "evaluations",
        ["run_id", "suite", "metric", "policy_version"],
        unique=False,
    )

    op.create_table(
        "events",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=64), nullable=False),
        sa.Column("severity", sa.String(length=32), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("details_json", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "severity IN ('info', 'warning', 'error')", name=op.f("ck_events_severity")
        ),
        sa.ForeignKeyConstraint(
            ["run_id"], ["runs.id"], name=op.f("fk_events_run_id_runs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_events")),
    )
    op.create_index(op.f("ix_events_run_id_id"), "events", ["run_id", "id"], unique=False)
    op.create_index(
        op.f("ix_events_run_id_severity_id"), "events", ["run_id", "severity", "id"], unique=False
    )

    op.create_table(
        "policy_versions",
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=True),
        sa.Column("path", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("is_live", sa.Boolean(), nullable=False),
        sa.Column("parent_version", sa.Integer(), nullable=True),
        sa.Column("alpha", sa.Double(), nullable=False),
        sa.Column("gamma", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["run_id"], ["runs.id"], name=op.f("fk_policy_versions_run_id_runs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("run_id", "version", name=op.f("pk_policy_versions")),
    )
    op.create_index(
        "uq_policy_versions_live",
        "policy_versions",
        ["run_id"],
        unique=True,
        sqlite_where=sa.text("is_live"),
        postgresql_where=sa.text("is_live"),
    )

    op.create_table(
        "tasks",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("source", sa.String(length=200), nullable=False),
        sa.Column("prompt", sa.Text(), nullable=False),
        sa.Column("answer", sa.Text(), nullable=False),
        sa.Column("split", sa.String(length=64), nullable=False),
        sa.Column("metadata_json", sa.Text(), nullable=False),
        sa.Column("content_key", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["run_id"], ["runs.id"], name=op.f("fk_tasks_run_id_runs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tasks")),
        sa.UniqueConstraint("run_id", "content_key", name=op.f("uq_tasks_run_id_content_key")),
    )
    op.create_index(
        op.f("ix_tasks_run_id_source_id"), "tasks", ["run_id", "source", "id"], unique=False
    )

    op.create_table(
        "rollout_groups",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("task_id", sa.String(length=64), nullable=False),
        sa.Column("policy_version", sa.Integer(), nullable=False),
        sa.Column("min_policy_version", sa.Integer(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("gamma", sa.Double(), nullable=False),
        sa.Column("alpha", sa.Double(), nullable=False),
        sa.Column("status", sa.String(length=32), nullable=False),
        sa.Column("num_on_policy", sa.Integer(), nullable=False),
        sa.Column("num_mixed", sa.Integer(), nullable=False),
        sa.Column("lease_owner", sa.String(length=200), nullable=True),
        sa.Column("lease_expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("consumed_by_step", sa.Integer(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "status IN ('ready', 'leased', 'consumed', 'stale', 'failed')",
            name=op.f("ck_rollout_groups_status"),
        ),
        sa.ForeignKeyConstraint(
            ["run_id"], ["runs.id"], name=op.f("fk_rollout_groups_run_id_runs"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["task_id"],
            ["tasks.id"],
            name=op.f("fk_rollout_groups_task_id_tasks"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_rollout_groups")),
    )
    op.create_index(
        op.f("ix_rollout_groups_lease_owner"), "rollout_groups", ["lease_owner"], unique=False
    )
    op.create_index(
        op.f("ix_rollout_groups_run_id_consumed_by_step"),
        "rollout_groups",
        ["run_id", "consumed_by_step"],
        unique=False,
    )
    op.create_index(
        op.f("ix_rollout_groups_run_id_created_at"),
        "rollout_groups",
        ["run_id", "created_at"],
        unique=False,
    )
    op.create_index(
        op.f("ix_rollout_groups_run_id_status_id"),
        "rollout_groups",
        ["run_id", "status", "id"],
        unique=False,
    )
    op.create_index(op.f("ix_rollout_groups_task_id"), "rollout_groups", ["task_id"], unique=False)

    op.create_table(
        "updates",
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("step", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("policy_version", sa.Integer(), nullable=False),
        sa.Column("num_groups", sa.Integer(), nullable=False),
        sa.Column("num_trajectories", sa.Integer(), nullable=False),
        sa.Column("num_tokens", sa.Integer(), nullable=False),
        sa.Column("loss", sa.Double(), nullable=True),
        sa.Column("grad_norm", sa.Double(), nullable=True),
        sa.Column("entropy", sa.Double(), nullable=True),
        sa.Column("clip_fraction_low", sa.Double(), nullable=True),
        sa.Column("clip_fraction_high", sa.Double(), nullable=True),
        sa.Column("mismatch_kl", sa.Double(), nullable=True),
        sa.Column("learning_rate", sa.Double(), nullable=True),
        sa.Column("mean_reward_on_policy", sa.Double(), nullable=True),
        sa.Column("mean_reward_mixed", sa.Double(), nullable=True),
        sa.Column("mean_accuracy_on_policy", sa.Double(), nullable=True),
        sa.Column("mean_accuracy_mixed", sa.Double(), nullable=True),
        sa.Column("frac_reward_zero_std", sa.Double(), nullable=True),
        sa.Column("mean_response_tokens", sa.Double(), nullable=True),
        sa.Column("truncated_share", sa.Double(), nullable=True),
        sa.Column("mean_weight", sa.Double(), nullable=True),
        sa.Column("gated_share", sa.Double(), nullable=True),
        sa.Column("intervention_rate", sa.Double(), nullable=True),
        sa.Column("alpha", sa.Double(), nullable=False),
        sa.Column("gamma", sa.Double(), nullable=False),
        sa.Column("staleness_mean", sa.Double(), nullable=True),
        sa.Column("staleness_max", sa.Integer(), nullable=True),
        sa.Column("num_stale", sa.Integer(), nullable=False),
        sa.Column("step_time_s", sa.Double(), nullable=True),
        sa.Column("wait_time_s", sa.Double(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["run_id", "policy_version"],
            ["policy_versions.run_id", "policy_versions.version"],
            name=op.f("fk_updates_run_id_policy_version_policy_versions"),
        ),
        sa.ForeignKeyConstraint(
            ["run_id"], ["runs.id"], name=op.f("fk_updates_run_id_runs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("run_id", "step", name=op.f("pk_updates")),
    )
    op.create_table(
        "trajectories",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("group_id", sa.String(length=64), nullable=True),
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("task_id", sa.String(length=64), nullable=True),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("sample_index", sa.Integer(), nullable=False),
        sa.Column("status", sa.String(length=32), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("reward", sa.Double(), nullable=True),
        sa.Column("accuracy", sa.Double(), nullable=True),
        sa.Column("format_score", sa.Double(), nullable=True),
        sa.Column("text", sa.Text(), nullable=True),
        sa.Column("num_prompt_tokens", sa.Integer(), nullable=False),
        sa.Column("num_tokens", sa.Integer(), nullable=False),
        sa.Column("num_gated", sa.Integer(), nullable=False),
        sa.Column("num_interventions", sa.Integer(), nullable=False),
        sa.Column("mean_entropy", sa.Double(), nullable=True),
        sa.Column("mean_weight", sa.Double(), nullable=True),
        sa.Column("min_policy_version", sa.Integer(), nullable=False),
        sa.Column("max_policy_version", sa.Integer(), nullable=False),
        sa.Column("stop_reason", sa.String(length=32), nullable=True),
        sa.Column("latency_s", sa.Double(), nullable=True),
        sa.Column("seed", sa.BigInteger(), nullable=True),
        sa.Column("expert_lost", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "kind IN ('on_policy', 'mixed', 'expert', 'served')", name=op.f("ck_trajectories_kind")
        ),
        sa.CheckConstraint("status IN ('ok', 'failed')", name=op.f("ck_trajectories_status")),
        sa.ForeignKeyConstraint(
            ["group_id"],
            ["rollout_groups.id"],
            name=op.f("fk_trajectories_group_id_rollout_groups"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["run_id"], ["runs.id"], name=op.f("fk_trajectories_run_id_runs"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["task_id"],
            ["tasks.id"],
            name=op.f("fk_trajectories_task_id_tasks"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_trajectories")),
        sa.UniqueConstraint(
            "group_id",
            "kind",
            "sample_index",
            name=op.f("uq_trajectories_group_id_kind_sample_index"),
        ),
    )
    op.create_index(
        op.f("ix_trajectories_run_id_id"), "trajectories", ["run_id", "id"], unique=False
    )
    op.create_index(
        op.f("ix_trajectories_run_id_kind_status_min_policy_version"),
        "trajectories",
        ["run_id", "kind", "status", "min_policy_version"],
        unique=False,
    )
    op.create_index(op.f("ix_trajectories_task_id"), "trajectories", ["task_id"], unique=False)

    op.create_table(
        "interventions",
        sa.Column("trajectory_id", sa.String(length=64), nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("proposed_token_id", sa.Integer(), nullable=False),
        sa.Column("proposed_text", sa.Text(), nullable=True),
        sa.Column("chosen_token_id", sa.Integer(), nullable=False),
        sa.Column("chosen_text", sa.Text(), nullable=True),
        sa.Column("entropy", sa.Double(), nullable=True),
        sa.Column("weight", sa.Double(), nullable=True),
        sa.Column("policy_logprob", sa.Double(), nullable=True),
        sa.Column("expert_logprob", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(
            ["trajectory_id"],
            ["trajectories.id"],
            name=op.f("fk_interventions_trajectory_id_trajectories"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("trajectory_id", "position", name=op.f("pk_interventions")),
    )
    op.create_table(
        "trajectory_tokens",
        sa.Column("trajectory_id", sa.String(length=64), nullable=False),
        sa.Column("prompt_token_ids", sa.LargeBinary(), nullable=False),
        sa.Column("token_ids", sa.LargeBinary(), nullable=False),
        sa.Column("policy_logprobs", sa.LargeBinary(), nullable=False),
        sa.Column("expert_logprobs", sa.LargeBinary(), nullable=False),
        sa.Column("mixed_logprobs", sa.LargeBinary(), nullable=False),
        sa.Column("entropies", sa.LargeBinary(), nullable=False),
        sa.Column("weights", sa.LargeBinary(), nullable=False),
        sa.Column("sources", sa.LargeBinary(), nullable=False),
        sa.Column("versions", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["trajectory_id"],
            ["trajectories.id"],
            name=op.f("fk_trajectory_tokens_trajectory_id_trajectories"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("trajectory_id", name=op.f("pk_trajectory_tokens")),
    )
    for name in VIEWS_0001:
        op.execute(create_statement(name, views=VIEWS_0001))


def downgrade() -> None:
    """Undo `upgrade`."""
    for name in reversed(list(VIEWS_0001)):
        op.execute(drop_statement(name))
    for table in (
        "trajectory_tokens",
        "interventions",
        "trajectories",
        "updates",
        "rollout_groups",
        "tasks",
        "policy_versions",
        "events",
        "evaluations",
        "runs",
    ):
        op.drop_table(table)
