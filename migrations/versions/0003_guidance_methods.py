"""How the expert took part in a group, and which of its solutions a response goes back to.

Revision 0003.
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

from mentor_serve.store.views import VIEWS_0003, create_statement, drop_statement

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

_USED = sa.text("demonstration_id IS NOT NULL")


def upgrade() -> None:
    """Change the schema."""
    # Columns that may be NULL or have a constant default are added in place, on both databases.
    # Every group before this revision was collected by MENTOR.
    op.add_column(
        "rollout_groups",
        sa.Column("method", sa.String(length=32), nullable=False, server_default="mentor"),
    )
    op.add_column(
        "rollout_groups", sa.Column("num_expert", sa.Integer(), nullable=False, server_default="0")
    )
    op.add_column("rollout_groups", sa.Column("num_hint_tokens", sa.Integer(), nullable=True))
    op.add_column("rollout_groups", sa.Column("hint_fraction", sa.Double(), nullable=True))
    op.add_column(
        "trajectories", sa.Column("demonstration_id", sa.String(length=64), nullable=True)
    )
    op.add_column("trajectories", sa.Column("expert_model", sa.Text(), nullable=True))
    op.create_index(
        "ix_trajectories_demonstration_id",
        "trajectories",
        ["demonstration_id"],
        sqlite_where=_USED,
        postgresql_where=_USED,
    )
    op.create_index("ix_tasks_content_key", "tasks", ["content_key"])
    op.execute(create_statement("v_guidance_methods", views=VIEWS_0003))


def downgrade() -> None:
    """Undo `upgrade`."""
    op.execute(drop_statement("v_guidance_methods"))
    op.drop_index("ix_tasks_content_key", "tasks")
    op.drop_index("ix_trajectories_demonstration_id", "trajectories")
    op.drop_column("trajectories", "expert_model")
    op.drop_column("trajectories", "demonstration_id")
    for name in ("hint_fraction", "num_hint_tokens", "num_expert", "method"):
        op.drop_column("rollout_groups", name)
