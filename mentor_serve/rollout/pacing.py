"""When a collector starts the next group, and how long it waits after a failure."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable


async def sleep_unless(stop: asyncio.Event, seconds: float) -> None:
    """Sleep, or return at once when `stop` is set."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)


class Pacer:
    """Admits groups while fewer than `max_ready_groups` wait for the learner or are under way.

    What is collected too early is stale before it is trained on, so the store's queue is kept
    short. Counting under way what is not stored yet, the bound holds exactly for one collector.
    While the store is away nobody trains, and the bound may be a wider one: as many groups as can
    still be trained on afterwards.
    """

    def __init__(
        self,
        count_ready: Callable[[], Awaitable[int]],
        *,
        max_ready_groups: int | None,
        max_away_groups: int | None = None,
        is_store_away: Callable[[], bool] = lambda: False,
        poll_s: float = 0.25,
    ) -> None:
        """Take an awaitable count of the groups that wait; None as the maximum admits always.

        Args:
            count_ready: asked before every admission.
            max_ready_groups: groups that wait or are under way at most.
            max_away_groups: the same while the store is away; None is no difference.
            is_store_away: asked after `count_ready`.
            poll_s: time between two counts while the queue is full.
        """
        self._count_ready = count_ready
        self._max_ready_groups = max_ready_groups
        self._max_away_groups = max_away_groups
        self._is_store_away = is_store_away
        self._poll_s = poll_s
        self._lock = asyncio.Lock()
        self.num_in_flight = 0
        """Groups admitted and not finished."""
        self.is_waiting = False
        """Whether the queue is full right now."""
        self.waited_s = 0.0
        """Time spent waiting for the learner."""

    async def admit(self, stop: asyncio.Event) -> bool:
        """Wait until a group may start and count it as under way; False once `stop` is set."""
        async with self._lock:
            while not stop.is_set():
                if await self._has_room():
                    self.is_waiting = False
                    self.num_in_flight += 1
                    return True
                self.is_waiting = True
                started = time.monotonic()
                await sleep_unless(stop, self._poll_s)
                self.waited_s += time.monotonic() - started
            self.is_waiting = False
            return False

    def finish(self) -> None:
        """Count a group as no longer under way: stored, or given up."""
        self.num_in_flight -= 1

    async def _has_room(self) -> bool:
        if self._max_ready_groups is None:
            return True
        in_flight = self.num_in_flight
        num_groups = in_flight + await self._count_ready()
        if self._max_away_groups is not None and self._is_store_away():
            return num_groups < self._max_away_groups
        return num_groups < self._max_ready_groups


class Backoff:
    """Exponential waiting times, bounded, shared by everything that fails for the same reason."""

    def __init__(self, *, first_s: float = 0.5, longest_s: float = 30.0) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self.num_failures = 0
        """Failures since the last success."""

    def fail(self) -> float:
        """Count a failure and return how long to wait: first_s, twice that, ... longest_s."""
        # Bounded exponent: 2.0 ** n overflows after a thousand failures.
        wait_s = self._first_s * 2.0 ** min(self.num_failures, 20)
        self.num_failures += 1
        return min(wait_s, self._longest_s)

    def succeed(self) -> bool:
        """Forget the failures; True if there were any."""
        had_failures, self.num_failures = self.num_failures > 0, 0
        return had_failures
