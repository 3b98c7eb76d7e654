"""What an update says about off-policy data, skipped steps and groups that taught nothing.

Revision 0002.
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

from mentor_serve.store.views import VIEWS_0001, VIEWS_0002, create_statement, drop_statement

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

_COLUMNS: dict[str, type[sa.types.TypeEngine[object]]] = {
    "effective_sample_share": sa.Double,
    "truncated_weight_share": sa.Double,
    "num_trained_tokens": sa.Integer,
    "num_skipped_steps": sa.Integer,
    "token_staleness_mean": sa.Double,
    "num_silent_groups": sa.Integer,
    "num_left_out": sa.Integer,
}


def upgrade() -> None:
    """Change the schema."""
    # Columns that may be NULL are added in place, on both databases, whatever views read the table.
    for name, kind in _COLUMNS.items():
        op.add_column("updates", sa.Column(name, kind(), nullable=True))
    op.execute(drop_statement("v_training_curve"))
    op.execute(create_statement("v_training_curve", views=VIEWS_0002))


def downgrade() -> None:
    """Undo `upgrade`."""
    op.execute(drop_statement("v_training_curve"))
    for name in reversed(_COLUMNS):
        op.drop_column("updates", name)
    op.execute(create_statement("v_training_curve", views=VIEWS_0001))
