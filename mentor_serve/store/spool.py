"""Groups on disk while the database is away: one file each, in the order that they came.

A file is complete and on the disk when `put` returns: written beside, synced, renamed, and the
directory synced. Only what the database has committed is removed, and storing a group twice changes
nothing, so a process may die anywhere in between, and two processes may even share a directory.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from mentor_serve.errors import StoreUnavailable
from mentor_serve.store.records import new_id

_SUFFIX = ".group"
_NAME = re.compile(r"(\d{20})-.+\.group")
_PARTIAL_SUFFIX = ".partial"
_PARTIAL_AGE_S = 600.0
"""A file that nobody has finished for so long belongs to a process that died."""


class SpoolFull(StoreUnavailable):
    """No room for another group: the spool's own bound, or the disk's."""


class Spool:
    """A directory of groups. One thread puts and removes; `reject` and the counts are for any."""

    def __init__(self, directory: Path, *, max_bytes: int) -> None:
        """Make the directory and look what a former process left in it.

        Args:
            directory: of one collector of one run.
            max_bytes: bound of the files that wait; rejected ones do not count.

        Raises:
            StoreUnavailable: the directory cannot be made or read.
        """
        self.directory = directory
        self.rejected_directory = directory / "rejected"
        self.max_bytes = max_bytes
        self._sizes: dict[Path, int] = {}
        self._last_number = 0
        self._number_lock = threading.Lock()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            sync_directory(directory.parent)
            self._remove_partial()
            self.scan()
        except OSError as error:
            raise StoreUnavailable(
                f"expected a spool directory {directory} that can be written, but: {error}"
            ) from error

    @property
    def num_groups(self) -> int:
        """Groups that wait."""
        return len(self._sizes)

    @property
    def num_bytes(self) -> int:
        """Size of their files."""
        return sum(list(self._sizes.values()))

    def scan(self) -> None:
        """Look at the directory again: somebody may have put files there or taken them away."""
        sizes: dict[Path, int] = {}
        for entry in os.scandir(self.directory):
            if _NAME.fullmatch(entry.name):
                try:
                    sizes[Path(entry.path)] = entry.stat().st_size
                except FileNotFoundError:
                    continue
        self._sizes = sizes

    def take_from(self, other: Path) -> int:
        """Move the files of another spool in here; returns how many there were."""
        moved = 0
        for path in sorted(other.glob(f"*{_SUFFIX}")):
            with contextlib.suppress(FileNotFoundError):  # its owner was faster
                os.replace(path, self.directory / path.name)
                moved += 1
        if moved:
            sync_directory(self.directory)
            self.scan()
        return moved

    def has_room(self, num_bytes: int) -> bool:
        """Whether a file of this size may come; an empty spool takes one of any size."""
        return not self._sizes or self.num_bytes + num_bytes <= self.max_bytes

    def put(self, group_id: str, data: bytes) -> None:
        """Keep a file; when this returns, it survives the process and the machine.

        Raises:
            SpoolFull: no room, or the disk does not take it; nothing is kept.
        """
        if not self.has_room(len(data)):
            raise SpoolFull(
                f"expected room for {len(data)} bytes in {self.directory}, which holds "
                f"{self.num_bytes} of {self.max_bytes} (store.spool_max_mb)"
            )
        path = self.directory / f"{self._next_number():020d}-{group_id}{_SUFFIX}"
        try:
            _write_durably(path, data)
        except OSError as error:
            raise SpoolFull(f"expected room in {self.directory}, but: {error}") from error
        self._sizes[path] = len(data)

    def oldest(self, *, max_groups: int, max_bytes: int) -> list[Path]:
        """The files that came first: at most so many, at least one if there is one."""
        chosen: list[Path] = []
        total = 0
        for path in sorted(self._sizes):
            total += self._sizes[path]
            if chosen and (len(chosen) == max_groups or total > max_bytes):
                break
            chosen.append(path)
        return chosen

    def remove(self, paths: Iterable[Path]) -> None:
        """Forget files: what they hold is in the database."""
        for path in paths:
            path.unlink(missing_ok=True)
            self._sizes.pop(path, None)

    def set_aside(self, path: Path, reason: str) -> Path:
        """Move a file that cannot be stored to `rejected/`, with the reason beside it."""
        self.rejected_directory.mkdir(exist_ok=True)
        target = self.rejected_directory / path.name
        os.replace(path, target)
        self._sizes.pop(path, None)
        self._explain(target, reason)
        return target

    def reject(self, group_id: str, data: bytes, reason: str) -> Path:
        """Keep a group that cannot be stored in `rejected/`, with the reason beside it.

        Raises:
            SpoolFull: the disk does not take it.
        """
        path = self.rejected_directory / f"{self._next_number():020d}-{group_id}{_SUFFIX}"
        try:
            self.rejected_directory.mkdir(exist_ok=True)
            _write_durably(path, data)
            self._explain(path, reason)
        except OSError as error:
            raise SpoolFull(f"expected room in {path.parent}, but: {error}") from error
        return path

    def _explain(self, path: Path, reason: str) -> None:
        path.with_suffix(".reason.txt").write_text(reason + "\n", encoding="utf-8")

    def _next_number(self) -> int:
        """Nanoseconds since 1970, but always more than before: names sort as groups came."""
        newest = max((int(path.name[:20]) for path in list(self._sizes)), default=0)
        with self._number_lock:
            self._last_number = max(time.time_ns(), self._last_number + 1, newest + 1)
            return self._last_number

    def _remove_partial(self) -> None:
        for path in self.directory.glob(f"*{_PARTIAL_SUFFIX}"):
            if time.time() - path.stat().st_mtime > _PARTIAL_AGE_S:
                path.unlink(missing_ok=True)


def _write_durably(path: Path, data: bytes) -> None:
    # A name of its own: another process may write the same group.
    partial = path.with_suffix(f".{new_id()}{_PARTIAL_SUFFIX}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_directory(path.parent)
    except OSError:
        partial.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise


def sync_directory(directory: Path) -> None:
    """Make new and changed names in a directory durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
