"""The one writer of a collector: batches groups, and keeps them on disk while the database is away.

`GroupWriter.add` acknowledges a group: when it returns, the group is committed, or on disk in the
spool, from where it is committed later, also by the next process. What waits when the writer's
thread comes round goes into one transaction; nothing waits for a batch to fill. Groups are stored
in the order that they came: as long as any are in the spool, new ones queue behind them.

A group that the database refuses for good never holds up the others: it ends as a file in
`rejected/` and as an event.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Protocol, Self

import structlog

from mentor_serve.errors import StoreError, StoreUnavailable
from mentor_serve.store.event_queue import EventDatabase, EventQueue
from mentor_serve.store.group_files import FiledGroup, encode_group
from mentor_serve.store.group_rows import ARRAY_COLUMNS, GroupRows
from mentor_serve.store.outage import Outage
from mentor_serve.store.records import NewGroup
from mentor_serve.store.replay import NOT_THE_GROUPS_FAULT, GroupRowsDatabase, SpoolReplay
from mentor_serve.store.spool import Spool, SpoolFull

log = structlog.get_logger(__name__)

_BYTES_A_ROLLOUT = 2000
"""What a trajectory takes beside its arrays and texts, about."""


class GroupDatabase(GroupRowsDatabase, EventDatabase, Protocol):
    """The part of the trajectory store that a writer uses."""


class Outcome(StrEnum):
    """What became of a group that was added."""

    COMMITTED = "committed"
    SPOOLED = "spooled"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterLimits:
    """Bounds of what a writer holds in memory, and of its transactions."""

    max_buffered_groups: int = 64
    max_buffered_bytes: int = 64 << 20
    """Above either, `add` waits; one group may always come in."""
    max_batch_groups: int = 64
    max_batch_bytes: int = 64 << 20
    """Groups in one transaction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterStatus:
    """A writer at one moment."""

    is_away: bool
    """Whether the database did not take the last transaction."""
    reason: str | None
    away_s: float
    num_buffered: int
    """Groups in memory that are not acknowledged yet."""
    num_spooled: int
    spooled_bytes: int
    is_full: bool
    """Whether neither the database nor the spool takes groups: collection waits."""
    num_rejected: int
    """Since the writer was made, as is `num_failures`."""
    num_failures: int
    """Times that the database was asked in vain."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Item:
    group: NewGroup
    rows: GroupRows
    num_bytes: int
    acknowledged: Future[Outcome] = field(default_factory=Future)


class GroupWriter:
    """Writes the groups of one run from one thread; `add` may be called from any number."""

    def __init__(
        self,
        database: GroupDatabase,
        run_id: str,
        *,
        spool: Spool | None,
        limits: WriterLimits | None = None,
        outage: Outage | None = None,
    ) -> None:
        """Nothing happens before `start`.

        Args:
            database: where groups belong.
            run_id: run of every group.
            spool: None keeps groups in memory alone: then `add` waits for the database.
            limits: bounds of memory and transactions.
            outage: pauses between attempts.
        """
        self._database = database
        self._run_id = run_id
        self._spool = spool
        self._limits = limits or WriterLimits()
        self._outage = outage or Outage()
        self._buffer: deque[_Item] = deque()
        self._buffered_bytes = 0
        self._changed = threading.Condition()
        self._is_closing = False
        self._is_full = False
        self._death: Exception | None = None
        self._num_rejected = 0
        self._events = EventQueue(database, run_id)
        self._replay = None
        if spool is not None:
            self._replay = SpoolReplay(database, run_id, spool, on_rejected=self._note_rejected)
        self._thread = threading.Thread(target=self._run, name="group-writer", daemon=True)

    # Any thread

    def start(self) -> Self:
        """Start the thread; it first stores what a former process left in the spool."""
        self._thread.start()
        return self

    def add(self, group: NewGroup) -> Outcome:
        """Store a group; returns when that is certain, or when the group was refused for good.

        Waits while the buffer is full.

        Raises:
            StoreError: the writer was closed before the group was acknowledged, or there is no
                spool to keep a refused group in.
        """
        try:
            rows = self._database.group_rows(self._run_id, group)
        except Exception as error:  # boundary: whatever a group is made of
            return self._rejected(group, error)
        item = _Item(group=group, rows=rows, num_bytes=_size(group))
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing or self._has_room(item))
            if self._is_closing:
                raise StoreError(f"group {group.group_id} came after the writer was closed")
            self._buffer.append(item)
            self._buffered_bytes += item.num_bytes
            self._changed.notify_all()
        return item.acknowledged.result()

    def status(self) -> WriterStatus:
        """Where the writer stands; never waits."""
        spool = self._spool
        return WriterStatus(
            is_away=self._outage.is_on,
            reason=self._outage.reason,
            away_s=self._outage.duration_s,
            num_buffered=len(self._buffer),
            num_spooled=0 if spool is None else spool.num_groups,
            spooled_bytes=0 if spool is None else spool.num_bytes,
            is_full=self._is_full,
            num_rejected=self._num_rejected,
            num_failures=self._outage.num_failures_ever,
        )

    def check_health(self) -> None:
        """Raise what the writer's thread ended with, if it did.

        Raises:
            StoreError: the thread ended by itself: no group is stored any more.
        """
        if self._death is not None:
            raise StoreError("the writer of groups ended by itself") from self._death

    def close(self, timeout_s: float = 10.0) -> None:
        """Store or spool what was added, once more, and end the thread.

        What neither takes is not acknowledged: its `add` raises. What is in the spool stays there.
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        self._give_up(StoreError("the writer was closed before the group could be stored"))

    def _has_room(self, item: _Item) -> bool:
        limits = self._limits
        return not self._buffer or (
            len(self._buffer) < limits.max_buffered_groups
            and self._buffered_bytes + item.num_bytes <= limits.max_buffered_bytes
        )

    def _give_up(self, error: StoreError) -> None:
        with self._changed:
            items, self._buffer = list(self._buffer), deque()
            self._buffered_bytes = 0
        for item in items:
            if not item.acknowledged.done():
                item.acknowledged.set_exception(error)

    # The writer's thread

    def _run(self) -> None:
        try:
            while self._wait():
                self._turn()
            self._turn()
        except Exception as error:
            # Nothing in a turn should raise; a thread that ends all the same must not be waited
            # for, and `check_health` says so.
            log.exception("group_writer_died")
            with self._changed:
                self._death = error
                self._is_closing = True
                self._changed.notify_all()
            self._give_up(StoreError(f"the writer ended: {type(error).__name__}: {error}"))

    def _wait(self) -> bool:
        """Wait until there is something to do; False once the writer is to end."""
        with self._changed:
            while not self._is_closing:
                pause_s = self._outage.wait_s
                has_work = bool(self._buffer) or self._num_spooled > 0
                if has_work and (pause_s == 0.0 or self._can_spool()):
                    return True
                self._changed.wait(pause_s if has_work else None)
        return False

    def _can_spool(self) -> bool:
        return bool(self._buffer) and self._spool is not None and not self._is_full

    @property
    def _num_spooled(self) -> int:
        return 0 if self._spool is None else self._spool.num_groups

    def _turn(self) -> None:
        """Move what waits one step nearer to the database."""
        if self._outage.wait_s == 0.0:
            self._is_full = False  # a disk may have room again: looked at as often as the database
            self._store_spooled()
            if self._num_spooled == 0:
                self._commit_buffered()
        self._spool_buffered()
        if not self._outage.is_on:
            self._events.write()

    def _store_spooled(self) -> None:
        """One transaction of what is in the spool."""
        if self._replay is None or self._num_spooled == 0:
            return
        limits = self._limits
        try:
            num_stored = self._replay.store_oldest(
                max_groups=limits.max_batch_groups, max_bytes=limits.max_batch_bytes
            )
        except (*NOT_THE_GROUPS_FAULT, OSError) as error:
            # A directory that cannot be read is as bad as no database, and tried again as well.
            self._note_away(error)
        else:
            if num_stored:
                self._note_back()

    def _commit_buffered(self) -> None:
        while items := self._next_batch():
            try:
                self._database.add_groups([item.rows for item in items])
            except NOT_THE_GROUPS_FAULT as error:
                self._note_away(error)
                return
            except Exception as error:  # boundary: one of them is refused
                if not self._commit_one_by_one(items, error):
                    return
            else:
                self._note_back()
                self._settle(items, Outcome.COMMITTED)

    def _next_batch(self) -> list[_Item]:
        """The oldest items that fit into a transaction; they stay in the buffer."""
        limits = self._limits
        items: list[_Item] = []
        total = 0
        with self._changed:
            for item in self._buffer:
                total += item.num_bytes
                if items and (
                    len(items) == limits.max_batch_groups or total > limits.max_batch_bytes
                ):
                    break
                items.append(item)
        return items

    def _commit_one_by_one(self, items: Sequence[_Item], refused: Exception) -> bool:
        """Store each alone, reject those that are refused; False where the database went away."""
        for item in items:
            outcome = Outcome.COMMITTED
            try:
                if len(items) == 1:
                    raise refused
                self._database.add_groups([item.rows])
            except NOT_THE_GROUPS_FAULT as error:
                self._note_away(error)
                return False
            except Exception as error:  # boundary: this one is refused
                try:
                    outcome = self._rejected(item.group, error)
                except StoreUnavailable as full:  # not even a file can be written: it waits
                    self._note_away(full)
                    return False
                except StoreError as lost:
                    self._settle([item], lost)
                    continue
            self._note_back()
            self._settle([item], outcome)
        return True

    def _spool_buffered(self) -> None:
        """While the database is away, or older groups wait in the spool: newer ones behind them."""
        if self._spool is None or not (self._outage.is_on or self._num_spooled):
            return
        while self._buffer:
            item = self._buffer[0]
            try:
                self._spool.put(item.group.group_id, self._file(item.group, item.rows.created_at))
            except SpoolFull as error:
                if not self._is_full:
                    log.warning("spool_full", reason=str(error))
                self._is_full = True
                return
            except StoreError as error:
                self._settle([item], error)
                continue
            self._settle([item], Outcome.SPOOLED)

    def _settle(self, items: Sequence[_Item], outcome: Outcome | StoreError) -> None:
        """Take the items, the oldest of the buffer, out of it and tell who waits for them."""
        with self._changed:
            ours = [item for item in items if item in self._buffer]  # else close() gave them up
            for item in ours:
                self._buffer.remove(item)
                self._buffered_bytes -= item.num_bytes
            self._changed.notify_all()
        for item in ours:
            if isinstance(outcome, StoreError):
                item.acknowledged.set_exception(outcome)
            else:
                item.acknowledged.set_result(outcome)

    # Refusals and events

    def _rejected(self, group: NewGroup, error: Exception) -> Outcome:
        """Keep a group that cannot be stored as a file.

        Raises:
            StoreUnavailable: the disk does not take it.
            StoreError: there is no spool, or the group cannot be written down at all.
        """
        reason = f"{type(error).__name__}: {error}"
        if self._spool is None:
            raise StoreError(f"group {group.group_id} cannot be stored: {reason}") from error
        data = self._file(group, datetime.now(UTC))
        self._note_rejected(self._spool.reject(group.group_id, data, reason), error)
        return Outcome.REJECTED

    def _file(self, group: NewGroup, created_at: datetime) -> bytes:
        return encode_group(FiledGroup(run_id=self._run_id, created_at=created_at, group=group))

    def _note_rejected(self, path: Path, error: Exception) -> None:
        with self._changed:
            self._num_rejected += 1
        message = f"a group was refused and is kept in {path}: {error}"
        self._events.add("group_rejected", "error", message)
        log.error("group_rejected", path=str(path), error=str(error))

    def _note_away(self, error: Exception) -> None:
        if self._outage.fail(error):
            log.warning("store_away", error=str(error), spool=self._spool is not None)

    def _note_back(self) -> None:
        if not self._outage.is_on:
            return
        reason = self._outage.reason
        duration_s = self._outage.end()
        message = f"the database takes groups again after {duration_s:.1f} s: {reason}"
        log.info("store_back", away_s=round(duration_s, 1), num_spooled=self._num_spooled)
        self._events.add("store_back", "warning", message)


def _size(group: NewGroup) -> int:
    """Bytes that a group takes in memory, about."""
    total = 0
    for item in group.trajectories:
        total += _BYTES_A_ROLLOUT + len(item.text or "")
        if item.rollout is not None:
            total += sum(getattr(item.rollout, name).nbytes for name in ARRAY_COLUMNS)
    return total
