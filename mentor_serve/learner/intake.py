"""Takes the groups of the next update from the store, and holds them until there are enough."""

from __future__ import annotations

import logging
import time

from mentor_serve.errors import MentorError
from mentor_serve.learner.batch import has_signal
from mentor_serve.learner.config import LearnerConfig
from mentor_serve.learner.records import LearnerStore
from mentor_serve.store.records import LeasedGroup

_log = logging.getLogger(__name__)

MAX_DYNAMIC_FACTOR = 4
"""With dynamic sampling an update takes at most so many times its groups: where hardly any group
teaches, it goes on with those that do, instead of waiting for ever."""


class GroupIntake:
    """One learner's leases. Called from one thread."""

    def __init__(
        self, store: LearnerStore, *, run_id: str, owner: str, config: LearnerConfig
    ) -> None:
        self._store = store
        self._run_id = run_id
        self._owner = owner
        self._config = config
        self._held: list[LeasedGroup] = []
        self._renewed_at = 0.0
        self.num_stale = 0
        """Groups given up as too old since `reset`."""

    def take(self, *, version: int, alpha: float) -> list[LeasedGroup]:
        """The groups of the next update, leased, or none where too few are ready.

        With dynamic sampling `prompts_per_step` of them have a signal, and the others, leased as
        well, are to be consumed with them; what is there so far is kept between calls.

        Args:
            version: weights that the update starts from.
            alpha: weight of the mixed advantages in it.
        """
        self.mark_stale(version - self._config.max_staleness)
        most = MAX_DYNAMIC_FACTOR * self._config.prompts_per_step
        while (missing := self._num_missing(alpha)) and len(self._held) < most:
            leased = self._store.lease_groups(
                self._run_id,
                num_groups=missing,
                owner=self._owner,
                lease_s=self._config.lease_s,
            )
            if not leased:
                self._renew()
                return []
            self._renewed_at = self._renewed_at if self._held else time.monotonic()
            self._held += leased
        groups, self._held = self._held, []
        return groups

    def mark_stale(self, oldest: int) -> None:
        """Give up groups with a token of a version below `oldest`."""
        self.num_stale += self._store.mark_stale(self._run_id, min_policy_version=oldest)

    def release(self) -> None:
        """Give back every group; where the store fails, the leases end by themselves."""
        self._held = []
        try:
            self._store.release_leases(self._run_id, owner=self._owner)
        except MentorError as error:
            _log.warning("the leases of %s end by themselves: %s", self._owner, error)

    def _num_missing(self, alpha: float) -> int:
        held = self._held
        if self._config.dynamic_sampling:
            held = [item for item in held if has_signal(item, alpha, self._config.advantages)]
        return self._config.prompts_per_step - len(held)

    def _renew(self) -> None:
        now = time.monotonic()
        if self._held and now - self._renewed_at > self._config.lease_s / 3:
            self._store.renew_leases(self._owner, self._config.lease_s)
            self._renewed_at = now
