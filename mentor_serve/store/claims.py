"""Who trains a run: one learner at a time, on whatever machine, also by mistake.

The claim belongs to a connection (PostgreSQL: an advisory lock) or to an open file (SQLite: a lock
on a file beside the database), so that it ends with the process that holds it, however that ends.
It keeps two learners from training in turn on each other's groups; that no group is consumed twice
does not depend on it (leases and the primary keys of `updates` and `policy_versions` see to that).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import socket
import time
from pathlib import Path
from typing import IO, Protocol

from sqlalchemy import Connection, Engine, text

from mentor_serve.errors import RunClaimed, StoreUnavailable
from mentor_serve.store.connection import shown, sqlite_path, translated

_POLL_S = 0.1

_HOLDER = text("""
    SELECT a.application_name, a.client_addr, a.backend_start
    FROM pg_locks l
    JOIN pg_stat_activity a ON a.pid = l.pid
    JOIN pg_database d ON d.oid = l.database AND d.datname = current_database()
    WHERE l.locktype = 'advisory' AND l.granted
      AND l.classid = :high AND l.objid = :low AND l.objsubid = 1
""")
"""pg_locks shows the 64 bits of an advisory lock as two unsigned halves."""


class RunClaim(Protocol):
    """The right to train a run; `TrajectoryStore.claim_run` makes one."""

    def hold(self, *, timeout_s: float = 0.0) -> None:
        """Take the claim, or make sure that it is still ours.

        Raises:
            RunClaimed: another learner has it, `timeout_s` long.
            StoreUnavailable: the database is away.
        """

    def release(self) -> None:
        """Give the claim back; harmless without it."""


def make_claim(engine: Engine, url: str, run_id: str) -> RunClaim:
    """A claim that is not held yet."""
    path = sqlite_path(url)
    if path is None:
        return _AdvisoryLock(engine, url, run_id)
    return _FileLock(path, run_id)


def _refusal(run_id: str, holder: str) -> RunClaimed:
    return RunClaimed(
        f"expected to be the only learner of run {run_id}, but {holder} trains it; stop that one, "
        "or give this service a run_name or a store.url of its own"
    )


class _FileLock:
    def __init__(self, database: Path, run_id: str) -> None:
        self._path = database.with_name(f"{database.name}-learner-{run_id}.lock")
        self._run_id = run_id
        self._file: IO[str] | None = None

    def hold(self, *, timeout_s: float = 0.0) -> None:
        if self._file is not None:
            return
        try:
            file = self._path.open("a+", encoding="utf-8")
        except OSError as error:
            raise StoreUnavailable(f"expected to open {self._path}, but: {error}") from error
        deadline = time.monotonic() + timeout_s
        while not _lock(file):
            if time.monotonic() >= deadline:
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise _refusal(self._run_id, holder)
            time.sleep(_POLL_S)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self._file = file

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class _AdvisoryLock:
    """Holds a connection of its own; the server frees the lock when that ends.

    Keepalive probes of the server end it within a minute where the holder's machine is gone.
    """

    def __init__(self, engine: Engine, url: str, run_id: str) -> None:
        self._engine = engine
        self._url = url
        self._run_id = run_id
        digest = hashlib.blake2b(f"mentor learner {run_id}".encode(), digest_size=8).digest()
        self._key = int.from_bytes(digest, "big", signed=True)
        self._connection: Connection | None = None

    def hold(self, *, timeout_s: float = 0.0) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            is_fresh = self._connection is None
            try:
                with translated(self._url, doing="claiming the run"):
                    connection = self._connection or self._connect()
                    self._connection = connection
                    if self._is_ours(connection):
                        return
                    holder = self._holder(connection)
            except StoreUnavailable:
                self.release()
                if is_fresh:
                    raise
                continue  # the server was restarted, maybe: with a new connection
            if time.monotonic() >= deadline:
                self.release()
                raise _refusal(self._run_id, holder)
            time.sleep(_POLL_S)

    def release(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            # A dead connection may say anything here; the server has freed the lock by itself.
            with contextlib.suppress(Exception):
                connection.close()

    def _connect(self) -> Connection:
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        connection.detach()  # neither its place nor its settings are for the pool
        name = f"mentor-serve learner {os.getpid()} on {socket.gethostname()}"
        for setting, value in (
            ("application_name", name[:63]),
            ("tcp_keepalives_idle", "30"),
            ("tcp_keepalives_interval", "10"),
            ("tcp_keepalives_count", "3"),
        ):
            connection.execute(
                text("SELECT set_config(:name, :value, false)"), {"name": setting, "value": value}
            )
        return connection

    def _is_ours(self, connection: Connection) -> bool:
        """Whether this session has the lock; takes it if nobody has."""
        if self._mine(connection):
            return True
        query = text("SELECT pg_try_advisory_lock(:key)")
        return bool(connection.execute(query, {"key": self._key}).scalar_one())

    def _mine(self, connection: Connection) -> bool:
        query = text(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted AND "
            "pid = pg_backend_pid() AND classid = :high AND objid = :low AND objsubid = 1"
        )
        return bool(connection.execute(query, self._halves).scalar_one())

    def _holder(self, connection: Connection) -> str:
        row = connection.execute(_HOLDER, self._halves).first()
        if row is None:
            return f"a learner that just ended, in {shown(self._url)},"
        return f"{row[0] or 'a session'} (from {row[1] or 'this machine'}, since {row[2]:%F %T %Z})"

    @property
    def _halves(self) -> dict[str, int]:
        unsigned = self._key & (2**64 - 1)
        return {"high": unsigned >> 32, "low": unsigned & (2**32 - 1)}
