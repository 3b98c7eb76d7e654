"""What keeps two learners apart: a renewed lease on groups, a lock on the directories."""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol, Self

from mentor_serve.errors import MentorError, WeightsError

_log = logging.getLogger(__name__)
_LOCK_NAME = "learner.lock"


class LeaseStore(Protocol):
    """The part of the store that renews leases."""

    def renew_leases(self, owner: str, lease_s: float) -> int:
        """Move the end of the owner's leases to `lease_s` from now."""


class LeaseKeeper:
    """Renews an owner's leases from a thread while the block runs, three times a lease.

    A renewal that fails is logged and tried again: if the lease is lost for it, the commit says so.
    """

    def __init__(self, store: LeaseStore, *, owner: str, lease_s: float) -> None:
        self._store = store
        self._owner = owner
        self._lease_s = lease_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease-keeper", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()

    def _renew(self) -> None:
        while not self._done.wait(self._lease_s / 3):
            try:
                self._store.renew_leases(self._owner, self._lease_s)
            except MentorError as error:
                _log.warning("could not renew the leases of %s: %s", self._owner, error)


class DirectoryLock:
    """Exclusive use of a directory by one learner; the system frees it when the process dies."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / _LOCK_NAME
        self._file: IO[str] | None = None

    def acquire(self, *, timeout_s: float) -> None:
        """Take the lock, waiting for a learner that is just ending.

        Raises:
            WeightsError: another learner still holds it after `timeout_s`.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = self._path.open("a+", encoding="utf-8")
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    file.seek(0)
                    holder = file.read().strip() or "unknown"
                    file.close()
                    raise WeightsError(
                        f"expected to be the only learner of {self._path.parent}, but process "
                        f"{holder} is one; stop it, or use another state directory"
                    ) from error
                time.sleep(0.1)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        self._file = file

    def release(self) -> None:
        """Give the lock back; harmless without it."""
        if self._file is not None:
            self._file.close()
            self._file = None
