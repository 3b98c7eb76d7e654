"""The SQL that makes a writer and a reader on PostgreSQL: `roles.sql` with the names filled in."""

from __future__ import annotations

import re
from importlib import resources

from mentor_serve.errors import ConfigError

_NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")


def roles_script(*, writer: str = "mentor_writer", reader: str = "mentor_reader") -> str:
    """A script for psql; it holds no password.

    Raises:
        ConfigError: a name that SQL would want quoted, or one name for both.
    """
    for name in (writer, reader):
        if not _NAME.fullmatch(name) or name.startswith("pg_"):
            raise ConfigError(
                f"expected a role name of lower-case letters, digits and underscores, got {name!r}"
            )
    if writer == reader:
        raise ConfigError(f"expected two roles, got {writer!r} for both")
    script = resources.files("mentor_serve.store").joinpath("roles.sql").read_text("utf-8")
    return script.replace(":writer", writer).replace(":reader", reader)
