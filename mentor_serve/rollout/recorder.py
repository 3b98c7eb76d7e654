"""The collector's side of the store: one thread, retries, events, counts.

Nothing the database does reaches the collector's loop, but for what `persist` gives up on.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import structlog

from mentor_serve.errors import StoreError
from mentor_serve.rollout.interfaces import GroupStore
from mentor_serve.rollout.pacing import Backoff
from mentor_serve.store.records import NewGroup
from mentor_serve.types import GroupStatus

log = structlog.get_logger(__name__)

T = TypeVar("T")

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
    ) -> None:
        self.store = store
        self.run_id = run_id
        self.counts: Counter[str] = Counter()
        """What happened since the start; the collector counts here, too."""
        self._new_backoff = new_backoff
        # One thread: SQLite has one writer anyway.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")

    def close(self) -> None:
        """End the thread after what it is doing."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def count_groups(self) -> dict[str, int]:
        """Return the number of groups by status; raises whatever the store raises."""
        return await self._call(lambda: self.store.count_groups(self.run_id))

    async def count_groups_ever(self) -> int:
        """Return how many groups the run ever had; raises whatever the store raises."""
        return await self._call(lambda: self.store.count_groups_ever(self.run_id))

    async def count_ready(self) -> int:
        """Return how many groups wait for the learner."""
        return (await self.count_groups()).get(GroupStatus.READY.value, 0)

    async def add_group(self, group: NewGroup) -> None:
        """Store a group, trying again for as long as it takes."""
        try:
            await self.persist(
                lambda: self.store.add_group(self.run_id, group), what=f"group {group.group_id}"
            )
        except StoreError as error:
            self.counts["groups_dropped"] += 1
            await self.event("group_dropped", "error", str(error))
            return
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
