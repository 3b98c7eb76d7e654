"""How long the database has been away, and when it is asked again."""

from __future__ import annotations

import time
from collections.abc import Callable


class Outage:
    """Failures in a row, and the pause after each: doubling, bounded. Used from one thread."""

    def __init__(
        self,
        *,
        first_s: float = 0.25,
        longest_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._clock = clock
        self._since: float | None = None
        self._retry_at = 0.0
        self._num_failures = 0
        self.num_failures_ever = 0
        self.reason: str | None = None
        """What the database last said; None while it answers."""

    @property
    def is_on(self) -> bool:
        """Whether the database is away."""
        return self._since is not None

    @property
    def duration_s(self) -> float:
        """Since the first failure in a row; 0 while the database answers."""
        since = self._since
        return 0.0 if since is None else self._clock() - since

    @property
    def wait_s(self) -> float:
        """Until the database may be asked again; 0 for now."""
        return max(0.0, self._retry_at - self._clock())

    def fail(self, error: BaseException) -> bool:
        """Count a failure; True for the first in a row."""
        is_first = self._since is None
        now = self._clock()
        self._since = now if self._since is None else self._since
        self.reason = str(error)
        # Bounded exponent: 2.0 ** n overflows after a thousand failures.
        pause_s = min(self._first_s * 2.0 ** min(self._num_failures, 20), self._longest_s)
        self._num_failures += 1
        self.num_failures_ever += 1
        self._retry_at = now + pause_s
        return is_first

    def end(self) -> float:
        """The database answered; returns how long it was away, in seconds."""
        duration_s = self.duration_s
        self._since, self.reason = None, None
        self._retry_at, self._num_failures = 0.0, 0
        return duration_s
