"""A PostgreSQL server that belongs to the tests: made in a temporary directory, gone afterwards.

It listens on a loopback port that the system chose, does not outlive a power cut, and is run by an
unprivileged user where the tests run as root (PostgreSQL refuses root).
"""

from __future__ import annotations

import getpass
import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.ports import free_port

USER = "mentor"
PASSWORD = "only-for-tests"
ABSENT = (
    "needs a PostgreSQL server: install one (`make postgres-for-tests`), or set TEST_POSTGRES_URL "
    "to a server on which databases may be created"
)

# What was committed must survive a killed server, as tests of outages expect: commits are written,
# though not forced to the disk.
_TUNING = ("fsync=off", "full_page_writes=off", "max_connections=200")


def find_binaries() -> Path | None:
    """The directory of `initdb` and `pg_ctl`: of the newest version installed, or on PATH."""
    packaged = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: _version(path)
    )
    if packaged:
        return packaged[-1].parent
    found = shutil.which("initdb")
    return None if found is None else Path(found).resolve().parent


def _version(initdb: Path) -> int:
    name = initdb.parents[1].name
    return int(name) if name.isdigit() else 0


def is_available() -> bool:
    """Whether the tests have a server: one that was named, or one that they can start."""
    return bool(os.environ.get("TEST_POSTGRES_URL")) or find_binaries() is not None


class PostgresServer:
    """One server and its data directory; `stop` and `start` again keep the data and the port."""

    def __init__(self) -> None:
        """Make the data directory; nothing runs yet.

        Raises:
            RuntimeError: no PostgreSQL is installed, or it refused.
        """
        binaries = find_binaries()
        if binaries is None:
            raise RuntimeError(ABSENT)
        self._binaries = binaries
        self._account = _account()
        self.directory = Path(tempfile.mkdtemp(prefix="mentor-postgres-"))
        password = self.directory / "password"
        password.write_text(PASSWORD, encoding="utf-8")
        if self._account is not None:
            for path in (self.directory, password):
                shutil.chown(path, user=self._account)
        self._run(
            "initdb",
            *("--username", USER, "--pwfile", str(password), "--auth", "scram-sha-256"),
            *("--encoding", "UTF8", "--no-locale", "--no-sync"),
        )
        self._port = free_port()

    @property
    def url(self) -> str:
        """Of the database `postgres`, as a user who may do everything."""
        return f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{self._port}/postgres"

    def start(self) -> None:
        """Start the server; returns when it takes connections."""
        settings = (f"port={self._port}", "listen_addresses=127.0.0.1", *_TUNING)
        options = " ".join(f"-c {one}" for one in settings) + f" -k {self.directory}"
        log = str(self.directory / "log")
        self._run("pg_ctl", "start", "--wait", "--silent", "--log", log, "--options", options)

    def stop(self, *, mode: str = "fast") -> None:
        """Stop it as `pg_ctl stop` does; connections are cut. Nothing happens if it is stopped."""
        if (self.directory / "data" / "postmaster.pid").exists():
            self._run("pg_ctl", "stop", "--wait", "--silent", "--mode", mode)

    def remove(self) -> None:
        """Stop it and delete its data."""
        self.stop(mode="immediate")
        shutil.rmtree(self.directory)

    def _run(self, program: str, *arguments: str) -> None:
        account: dict[str, Any] = {}
        if self._account is not None:
            account = {"user": self._account, "group": self._account, "extra_groups": []}
        command = [str(self._binaries / program), "--pgdata", str(self.directory / "data")]
        # A file, not a pipe: the server inherits it and would keep a pipe open.
        with tempfile.TemporaryFile() as output:
            done = subprocess.run(
                [*command, *arguments],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
                **account,
            )
            output.seek(0)
            said = output.read().decode(errors="replace")
        if done.returncode != 0:
            log = self.directory / "log"
            said += log.read_text(errors="replace")[-2000:] if log.exists() else ""
            raise RuntimeError(f"{program} failed with exit code {done.returncode}:\n{said}")


def _account() -> str | None:
    """The unprivileged account that runs the server, None for our own."""
    if os.getuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    for name in ("postgres", "nobody"):
        if name in known:
            return name
    raise RuntimeError(f"PostgreSQL refuses to run as {getpass.getuser()}: add a user `postgres`")
