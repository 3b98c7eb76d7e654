"""Settings of the trajectory store and of what stands in for it while it is away.

Part of `mentor_serve.settings`.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, SecretStr


class StoreSettings(BaseModel):
    """The SQL trajectory store."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    url: SecretStr | None = None
    """SQLAlchemy URL; default: SQLite in `mentor.db` under the state directory."""
    pool_size: PositiveInt = 5
    timeout_s: PositiveFloat = 30.0
    """How long a statement waits for a lock or a connection."""
    spool_max_mb: PositiveInt = 1024
    """Disk that each collector may use, under `spool/` of the state directory, for groups that wait
    while the database is away. When it is full, collection waits."""
    buffer_groups: PositiveInt = 64
    """Groups that each collector holds in memory on their way to the database, ..."""
    buffer_mb: PositiveInt = 64
    """... and their size. Above either, collection waits for the database or the spool."""
