"""The collector's side of the store: the writer of groups, reads, retries, events, counts.

Nothing the database does reaches the collector's loop, but for what `persist` gives up on.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import structlog

from mentor_serve.errors import StoreError, StoreUnavailable
from mentor_serve.rollout.interfaces import GroupStore
from mentor_serve.rollout.pacing import Backoff
from mentor_serve.store.outage import Outage
from mentor_serve.store.records import NewGroup
from mentor_serve.store.spool import Spool
from mentor_serve.store.writer import GroupWriter, Outcome, WriterLimits, WriterStatus
from mentor_serve.types import GroupStatus

log = structlog.get_logger(__name__)

T = TypeVar("T")

_MAX_ADDERS = 64
"""Groups that may be on their way to the writer at once; more wait before they are encoded."""

_POISON_ATTEMPTS = 5
"""Failed attempts after which a call is given up, if groups were written meanwhile."""


class Recorder:
    """Reads and writes one run."""

    def __init__(
        self,
        store: GroupStore,
        run_id: str,
        *,
        new_backoff: Callable[[], Backoff],
        spool: Spool | None = None,
        limits: WriterLimits | None = None,
        outage: Outage | None = None,
        num_collectors: int = 1,
    ) -> None:
        """Nothing is written before `start`.

        Args:
            store: the trajectory store.
            run_id: run of everything that is written.
            new_backoff: pauses of `persist`.
            spool: where groups wait while the database is away; None lets them wait in memory.
            limits: bounds of the writer.
            outage: pauses of the writer.
            num_collectors: of the run; each is taken to have as much in its spool as this one.
        """
        self.store = store
        self.run_id = run_id
        self.counts: Counter[str] = Counter()
        """What happened since the start; the collector counts here, too."""
        self._new_backoff = new_backoff
        self._num_collectors = num_collectors
        self._last_ready = 0
        self._is_away = False
        self._writer = GroupWriter(store, run_id, spool=spool, limits=limits, outage=outage)
        # One thread for what is not a group: SQLite has one writer anyway.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        # Here threads only make rows, and wait for the writer.
        self._adders = ThreadPoolExecutor(_MAX_ADDERS, thread_name_prefix="add-group")

    def start(self) -> None:
        """Store what a former process left in the spool, and take groups."""
        self._writer.start()

    async def close(self) -> None:
        """Store or spool what was added; end the threads after what they are doing."""
        await asyncio.to_thread(self._writer.close)
        for threads in (self._thread, self._adders):
            threads.shutdown(wait=False, cancel_futures=True)

    def check_health(self) -> None:
        """Raise `StoreError` where groups are not stored any more."""
        self._writer.check_health()

    def writer_status(self) -> WriterStatus:
        """Where the writer of groups stands; never waits."""
        return self._writer.status()

    @property
    def is_store_away(self) -> bool:
        """Whether the database did not answer when it was last asked."""
        return self._is_away or self._writer.status().is_away

    async def count_groups(self) -> dict[str, int]:
        """Return the number of groups by status; raises whatever the store raises."""
        return await self._call(lambda: self.store.count_groups(self.run_id))

    async def count_groups_ever(self) -> int:
        """Return how many groups the run ever had; raises whatever the store raises."""
        return await self._call(lambda: self.store.count_groups_ever(self.run_id))

    async def count_ready(self) -> int:
        """Return how many groups wait for the learner, those included that wait in spools.

        While the database is away, what it last said stands in for what it would say.
        """
        status = self._writer.status()
        if not (status.is_away and status.num_spooled):  # else the writer asks often enough
            try:
                counts = await self.count_groups()
            except StoreUnavailable as error:
                log.warning("cannot count groups", error=str(error))
                self.counts["store_errors"] += 1
                self._is_away = True
            else:
                self._last_ready = counts.get(GroupStatus.READY.value, 0)
                self._is_away = False
        return self._last_ready + self._num_collectors * self._writer.status().num_spooled

    async def add_group(self, group: NewGroup) -> None:
        """Store a group, or keep it in the spool; waits where neither has room."""
        loop = asyncio.get_running_loop()
        try:
            outcome = await loop.run_in_executor(self._adders, self._writer.add, group)
        except StoreError as error:
            self.counts["groups_dropped"] += 1
            await self.event("group_dropped", "error", str(error))
            return
        if outcome is Outcome.REJECTED:
            self.counts["groups_rejected"] += 1
            return
        self.counts["groups_spooled"] += outcome is Outcome.SPOOLED
        if outcome is Outcome.COMMITTED and group.status == GroupStatus.READY:
            self._last_ready += 1  # until the next count: should there be none, this one counts
        self._count(group)

    async def persist(self, call: Callable[[], T], *, what: str) -> T:
        """Return what `call` returns in the store's thread, trying again while it raises.

        Raises:
            StoreError: this alone keeps failing while groups are written.
        """
        backoff = self._new_backoff()
        written_before = self._num_written()
        while True:
            try:
                return await self._call(call)
            except Exception as error:  # boundary: the database may fail in any way
                self.counts["store_errors"] += 1
                wait_s = backoff.fail()
                is_written = self._num_written() > written_before
                if backoff.num_failures >= _POISON_ATTEMPTS and is_written:
                    raise StoreError(f"{what} cannot be stored: {error}") from error
                log.warning("cannot reach the store", doing=what, error=str(error))
            await asyncio.sleep(wait_s)

    async def event(self, kind: str, severity: str, message: str) -> None:
        """Record what an operator should know; try once."""
        log.info(message, kind=kind)
        try:
            await self._call(
                lambda: self.store.add_event(
                    self.run_id, kind=kind, severity=severity, message=message[:2000]
                )
            )
        except Exception as error:  # boundary: an event is worth less than the group
            self.counts["store_errors"] += 1
            log.warning("cannot store an event", kind=kind, error=str(error))

    def _num_written(self) -> int:
        return self.counts["groups_ready"] + self.counts["groups_failed"]

    def _count(self, group: NewGroup) -> None:
        self.counts[f"groups_{GroupStatus(group.status).value}"] += 1
        for trajectory in group.trajectories:
            self.counts["trajectories"] += 1
            self.counts["trajectories_failed"] += trajectory.error is not None
            if trajectory.rollout is not None:
                self.counts["tokens"] += trajectory.rollout.num_tokens

    async def _call(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)
