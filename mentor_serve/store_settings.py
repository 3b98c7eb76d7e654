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
