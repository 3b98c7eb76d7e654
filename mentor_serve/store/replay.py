"""From the spool into the database: what waited there is stored in the order that it came."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from mentor_serve.errors import SchemaOutOfDate, StoreError, StoreUnavailable
from mentor_serve.store.group_files import decode_group
from mentor_serve.store.group_rows import GroupRows
from mentor_serve.store.records import NewGroup
from mentor_serve.store.spool import Spool

NOT_THE_GROUPS_FAULT = (StoreUnavailable, SchemaOutOfDate)
"""Failures after which a group waits for the database instead of being rejected."""


class GroupRowsDatabase(Protocol):
    """The part of the trajectory store that takes groups."""

    def group_rows(
        self, run_id: str, group: NewGroup, *, created_at: datetime | None = None
    ) -> GroupRows:
        """What `add_groups` takes."""

    def add_groups(self, rows: Sequence[GroupRows]) -> Any:
        """Store groups in one transaction; storing them again changes nothing."""


class SpoolReplay:
    """Stores the files of one run's spool."""

    def __init__(
        self,
        database: GroupRowsDatabase,
        run_id: str,
        spool: Spool,
        *,
        on_rejected: Callable[[Path, Exception], None],
    ) -> None:
        """Take a function that is told of every file that was set aside, and why."""
        self._database = database
        self._run_id = run_id
        self._spool = spool
        self._on_rejected = on_rejected

    def store_oldest(self, *, max_groups: int, max_bytes: int) -> int:
        """Store one batch in one transaction; returns how many groups.

        Files that cannot be read, or that the database refuses for good, are set aside.

        Raises:
            StoreUnavailable: the database is away.
            SchemaOutOfDate: a table or a column is missing.
            OSError: the directory cannot be read or changed.
        """
        paths = self._spool.oldest(max_groups=max_groups, max_bytes=max_bytes)
        filed = [(path, rows) for path in paths if (rows := self._read(path)) is not None]
        return self._store(filed) if filed else 0

    def _read(self, path: Path) -> GroupRows | None:
        """The rows of a file; None where it was set aside, or another process stored it."""
        try:
            filed = decode_group(path.read_bytes())
            if filed.run_id != self._run_id:
                raise StoreError(
                    f"expected a group of run {self._run_id}, got one of run {filed.run_id}: the "
                    "database was replaced"
                )
            return self._database.group_rows(filed.run_id, filed.group, created_at=filed.created_at)
        except FileNotFoundError:
            self._spool.remove([path])
        except StoreError as error:
            self._set_aside(path, error)
        return None

    def _store(self, filed: Sequence[tuple[Path, GroupRows]]) -> int:
        try:
            self._database.add_groups([rows for _, rows in filed])
        except NOT_THE_GROUPS_FAULT:
            raise
        except Exception as error:  # boundary: one of them is refused
            if len(filed) > 1:
                return sum(self._store([one]) for one in filed)
            self._set_aside(filed[0][0], error)
            return 0
        self._spool.remove(path for path, _ in filed)
        return len(filed)

    def _set_aside(self, path: Path, error: Exception) -> None:
        self._on_rejected(self._spool.set_aside(path, f"{type(error).__name__}: {error}"), error)
