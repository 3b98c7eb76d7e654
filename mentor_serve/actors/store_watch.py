"""What readiness says about the database and the collectors' spools."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from mentor_serve.errors import StoreError, StoreUnavailable

T = TypeVar("T")

STORE_TIMEOUT_S = 3.0
"""How long readiness waits for the database: probes have time-outs of their own."""
_NUM_THREADS = 4

Counters = Mapping[str, int]


class StoreThreads:
    """Calls to the database from an event loop, in threads of their own.

    A database that does not answer holds only these: what HTTP needs from the loop's own threads
    goes on.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="store")

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """What `function` returns in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: function(*args)
        )


class StoreWatch:
    """Asks the database and the collectors, one question at a time however many probes come."""

    def __init__(
        self,
        count_groups: Callable[[], Awaitable[dict[str, int]]],
        collectors: Callable[[], Awaitable[Sequence[Counters]]],
        *,
        timeout_s: float = STORE_TIMEOUT_S,
    ) -> None:
        """Take the two questions.

        Args:
            count_groups: groups by status, from the database.
            collectors: counters of every collector that answers.
            timeout_s: after which no answer is an answer.
        """
        self._count_groups = count_groups
        self._collectors = collectors
        self._timeout_s = timeout_s
        self._asking: asyncio.Task[dict[str, int]] | None = None

    async def look(self) -> tuple[list[str], dict[str, Any]]:
        """Reasons for concern, none if all is well, and details."""
        problem: str | None = None
        details: dict[str, Any] = {}
        try:
            details["groups"] = await self._counted()
        except TimeoutError:
            problem = f"no answer within {self._timeout_s:g} s"
        except StoreUnavailable as error:
            problem = str(error)
        except StoreError as error:
            return [f"store: {error}"], details
        counters = await self._collectors()
        spool = {
            "groups": sum(one["spool_groups"] for one in counters),
            "bytes": sum(one["spool_bytes"] for one in counters),
        }
        details["spool"] = spool
        is_away = any(one["is_store_away"] for one in counters)
        if problem is None and not is_away:
            return [], details
        return [
            _reason(problem, spool, is_full=any(one["is_spool_full"] for one in counters))
        ], details

    async def _counted(self) -> dict[str, int]:
        # Shielded: the thread cannot be interrupted, so the next probe waits for the same answer.
        if self._asking is None or self._asking.done():
            self._asking = asyncio.ensure_future(self._count_groups())
            self._asking.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.wait_for(asyncio.shield(self._asking), self._timeout_s)


def _reason(problem: str | None, spool: Mapping[str, int], *, is_full: bool) -> str:
    megabytes = spool["bytes"] / 1e6
    waiting = f"{spool['groups']} groups ({megabytes:.1f} MB) wait"
    state = "the spool is full, collection stands still" if is_full else "spooling"
    cause = f": {problem}" if problem else ""
    return f"store_unavailable: {state}, {waiting}{cause}"
