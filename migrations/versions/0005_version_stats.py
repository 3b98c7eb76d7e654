"""Running sums by policy version, tokens of groups, how many groups were pruned, leaner indexes.

Revision 0005.
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

from mentor_serve.store.views import VIEWS_0003, VIEWS_0005, create_statement, drop_statement

revision: str = "0005"
down_revision: str | None = "0004"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

_CHANGED_VIEWS = ("v_intervention_rate", "v_pass_rate")

_FILL = """
INSERT INTO version_stats
SELECT
    run_id,
    kind,
    min_policy_version,
    COUNT(*),
    COUNT(accuracy),
    SUM(CASE WHEN accuracy >= 1 THEN 1 ELSE 0 END),
    COALESCE(SUM(accuracy), 0),
    COALESCE(SUM(CASE WHEN accuracy IS NOT NULL THEN reward END), 0),
    SUM(CASE WHEN accuracy IS NOT NULL THEN num_tokens ELSE 0 END),
    SUM(num_tokens),
    SUM(num_gated),
    SUM(num_interventions),
    COALESCE(SUM(mean_weight * num_tokens), 0),
    COALESCE(SUM(mean_entropy * num_tokens), 0),
    SUM(CASE WHEN mean_entropy IS NOT NULL THEN num_tokens ELSE 0 END)
FROM trajectories
WHERE status = 'ok' AND group_id IS NOT NULL
GROUP BY run_id, kind, min_policy_version
"""


_COUNT_TOKENS = """
UPDATE rollout_groups
SET num_tokens = (
    SELECT COALESCE(SUM(t.num_tokens), 0)
    FROM trajectories t
    WHERE t.group_id = rollout_groups.id
)
"""

_LEASED = sa.text("lease_owner IS NOT NULL")


def _change_indexes() -> None:
    # Lists of the newest filter within the index; curves by version are read from version_stats.
    op.drop_index("ix_trajectories_run_id_kind_status_min_policy_version", "trajectories")
    op.drop_index("ix_trajectories_run_id_id", "trajectories")
    op.create_index(
        "ix_trajectories_listing",
        "trajectories",
        ["run_id", "id", "kind", "accuracy", "num_interventions"],
    )
    op.drop_index("ix_rollout_groups_lease_owner", "rollout_groups")
    op.create_index(
        "ix_rollout_groups_lease_owner",
        "rollout_groups",
        ["lease_owner"],
        sqlite_where=_LEASED,
        postgresql_where=_LEASED,
    )


def _restore_indexes() -> None:
    op.drop_index("ix_rollout_groups_lease_owner", "rollout_groups")
    op.create_index("ix_rollout_groups_lease_owner", "rollout_groups", ["lease_owner"])
    op.drop_index("ix_trajectories_listing", "trajectories")
    op.create_index("ix_trajectories_run_id_id", "trajectories", ["run_id", "id"])
    op.create_index(
        "ix_trajectories_run_id_kind_status_min_policy_version",
        "trajectories",
        ["run_id", "kind", "status", "min_policy_version"],
    )


def upgrade() -> None:
    """Change the schema."""
    op.add_column(
        "runs", sa.Column("num_pruned_groups", sa.Integer(), server_default="0", nullable=False)
    )
    op.create_table(
        "version_stats",
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("policy_version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("num_trajectories", sa.BigInteger(), nullable=False),
        sa.Column("num_scored", sa.BigInteger(), nullable=False),
        sa.Column("num_passed", sa.BigInteger(), nullable=False),
        sa.Column("accuracy_sum", sa.Double(), nullable=False),
        sa.Column("reward_sum", sa.Double(), nullable=False),
        sa.Column("num_scored_tokens", sa.BigInteger(), nullable=False),
        sa.Column("num_tokens", sa.BigInteger(), nullable=False),
        sa.Column("num_gated", sa.BigInteger(), nullable=False),
        sa.Column("num_interventions", sa.BigInteger(), nullable=False),
        sa.Column("weight_sum", sa.Double(), nullable=False),
        sa.Column("entropy_sum", sa.Double(), nullable=False),
        sa.Column("num_entropy_tokens", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["run_id"], ["runs.id"], name="fk_version_stats_run_id_runs", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("run_id", "kind", "policy_version", name="pk_version_stats"),
    )
    op.execute(_FILL)
    op.add_column(
        "rollout_groups",
        sa.Column("num_tokens", sa.BigInteger(), server_default="0", nullable=False),
    )
    op.execute(_COUNT_TOKENS)
    _change_indexes()
    for name in _CHANGED_VIEWS:
        op.execute(drop_statement(name))
        op.execute(create_statement(name, views=VIEWS_0005))
    dialect = op.get_context().dialect.name
    op.execute(create_statement("v_throughput", views=VIEWS_0005, dialect=dialect))


def downgrade() -> None:
    """Undo `upgrade`."""
    op.execute(drop_statement("v_throughput"))
    for name in _CHANGED_VIEWS:
        op.execute(drop_statement(name))
        op.execute(create_statement(name, views=VIEWS_0003))
    _restore_indexes()
    op.drop_column("rollout_groups", "num_tokens")
    op.drop_table("version_stats")
    op.drop_column("runs", "num_pruned_groups")
