"""Which rows are one evaluation, of which weights, sampled how, and how sure its numbers are.

Revision 0004.
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0004"
down_revision: str | None = "0003"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

_INDEX = "ix_evaluations_evaluation_id"


def _new_columns() -> list[sa.Column[object]]:
    return [
        sa.Column("evaluation_id", sa.String(length=64), nullable=True),
        sa.Column("model", sa.Text(), nullable=False, server_default="policy"),
        sa.Column("value_low", sa.Double(), nullable=True),
        sa.Column("value_high", sa.Double(), nullable=True),
        sa.Column("num_samples", sa.Integer(), nullable=True),
        sa.Column("temperature", sa.Double(), nullable=True),
        sa.Column("seed", sa.BigInteger(), nullable=True),
    ]


def _table(*, version_is_optional: bool, with_new: bool) -> sa.Table:
    """The table as SQLite, which copies it, finds it: written out, so that --sql works too."""
    return sa.Table(
        "evaluations",
        sa.MetaData(),
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("policy_version", sa.Integer(), nullable=version_is_optional),
        sa.Column("suite", sa.String(length=200), nullable=False),
        sa.Column("metric", sa.String(length=64), nullable=False),
        sa.Column("k", sa.Integer(), nullable=True),
        sa.Column("value", sa.Double(), nullable=True),
        sa.Column("num_problems", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        *(_new_columns() if with_new else []),
        sa.ForeignKeyConstraint(
            ["run_id"], ["runs.id"], name="fk_evaluations_run_id_runs", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_evaluations"),
        sa.Index(
            "ix_evaluations_run_id_suite_metric_policy_version",
            "run_id",
            "suite",
            "metric",
            "policy_version",
        ),
    )


def upgrade() -> None:
    """Change the schema."""
    for column in _new_columns():
        op.add_column("evaluations", column)
    # NULL for weights that are no version of the run. No view reads this table: it may be copied.
    before = _table(version_is_optional=False, with_new=True)
    with op.batch_alter_table("evaluations", copy_from=before) as table:
        table.alter_column("policy_version", existing_type=sa.Integer(), nullable=True)
    op.create_index(_INDEX, "evaluations", ["evaluation_id"])


def downgrade() -> None:
    """Undo `upgrade`."""
    op.drop_index(_INDEX, "evaluations")
    # The older schema cannot hold them.
    op.execute("DELETE FROM evaluations WHERE policy_version IS NULL")
    for column in reversed(_new_columns()):
        op.drop_column("evaluations", column.name)
    before = _table(version_is_optional=True, with_new=False)
    with op.batch_alter_table("evaluations", copy_from=before) as table:
        table.alter_column("policy_version", existing_type=sa.Integer(), nullable=False)
