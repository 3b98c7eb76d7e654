"""Ranks as Ray actors: placed together, watched together, ended together.

Nothing here waits without a limit. The first error ends the wait: a rank that died leaves the
others in a collective operation that may never return.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from mentor_serve.errors import ConfigError, LearnerWorkerLost
from mentor_serve.learner.backends.options import RankOptions

_GRACE_S = 5.0
"""A peer's death breaks collectives of the others before Ray reports it; how long to wait for that
report before the broken collective is taken for the cause."""


class ActorGroup:
    """`RankGroup` of Ray actors, one a rank, in the order of ranks."""

    def __init__(
        self, actors: Sequence[Any], *, call_timeout_s: float, end: Callable[[], None]
    ) -> None:
        self.actors = list(actors)
        self._call_timeout_s = call_timeout_s
        self._end = end

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call every rank with the same arguments.

        Raises:
            LearnerWorkerLost: a rank died, or did not answer in time.
            Exception: what the method itself raised.
        """
        shared = [ray.put(item) for item in arguments]
        refs = [getattr(actor, method).remote(*shared) for actor in self.actors]
        return gather(refs, timeout_s=self._call_timeout_s, what=method)

    def scatter(self, method: str, values: Sequence[Any], *arguments: Any) -> list[Any]:
        """Call every rank with a value of its own; raises as `call` does."""
        refs = [
            getattr(actor, method).remote(value, *arguments)
            for actor, value in zip(self.actors, values, strict=True)
        ]
        return gather(refs, timeout_s=self._call_timeout_s, what=method)

    def close(self) -> None:
        """End the actors and give back what they had booked."""
        self._end()

    def kill(self) -> None:
        """The same without asking the actors."""
        for actor in self.actors:
            ray.kill(actor, no_restart=True)
        self._end()


def gather(refs: Sequence[Any], *, timeout_s: float, what: str) -> list[Any]:
    """The results of one call to every rank.

    Raises:
        LearnerWorkerLost: a rank died, or did not answer in time.
        Exception: what the call itself raised in a rank.
    """
    deadline = time.monotonic() + timeout_s
    results: dict[Any, Any] = {}
    pending = list(refs)
    while pending:
        done, pending = ray.wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            raise LearnerWorkerLost(
                f"{what}: expected {len(refs)} ranks to answer within {timeout_s:g} s, "
                f"{len(pending)} did not; raise learner.rank_timeout_s if updates take that long"
            )
        try:
            results[done[0]] = ray.get(done[0])
        except RayTaskError as error:
            if _anyone_died(pending):
                raise _lost(what, error) from error
            raise (error.cause if isinstance(error.cause, Exception) else error) from error
        except RayError as error:
            raise _lost(what, error) from error
    return [results[ref] for ref in refs]


def _anyone_died(pending: Sequence[Any]) -> bool:
    if not pending:
        return False
    done, _ = ray.wait(list(pending), num_returns=len(pending), timeout=_GRACE_S)
    for ref in done:
        try:
            ray.get(ref)
        except RayActorError:
            return True
        except RayError:
            continue
    return False


def _lost(what: str, error: Exception) -> LearnerWorkerLost:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return LearnerWorkerLost(
        f"{what}: expected every rank of the learner to answer, but one is gone: {reason}; "
        "training goes on from the last checkpoint in new ranks"
    )


def reserve(ranks: RankOptions) -> PlacementGroup:
    """Book the resources of all ranks at once, so that none waits for ever for its share.

    Raises:
        ConfigError: this process is not part of a Ray cluster.
        LearnerWorkerLost: the cluster did not have them free in time.
    """
    if not ray.is_initialized():
        raise ConfigError(
            f"learner.num_learners = {ranks.num_learners}: expected a process of a Ray cluster; "
            "call ray.init() first, or use num_learners = 0 with the torch or rllib backend"
        )
    bundle = {"CPU": ranks.num_cpus, "GPU": float(ranks.num_gpus)}
    needed = {name: amount for name, amount in bundle.items() if amount > 0}
    group = placement_group([needed] * ranks.num_learners, strategy="PACK")
    if not group.wait(timeout_seconds=ranks.start_timeout_s):
        free = {name: ray.available_resources().get(name, 0.0) for name in needed}
        remove_placement_group(group)
        raise LearnerWorkerLost(
            f"expected {ranks.num_learners} x {needed} free in the Ray cluster within "
            f"{ranks.start_timeout_s:g} s, found {free}; lower learner.num_learners or "
            "learner.num_cpus_per_learner, or add a node"
        )
    return group


@contextmanager
def starting(group: PlacementGroup, *, timeout_s: float) -> Iterator[None]:
    """Around the start of actors in `group`: a start that fails or hangs ends, with the actors.

    Raises:
        LearnerWorkerLost: an actor died, or the start took longer than `timeout_s`.
    """
    # Without its placement group an actor is killed, and whoever waits for it gets an error.
    watchdog = threading.Timer(timeout_s, remove_placement_group, [group])
    watchdog.daemon = True
    watchdog.start()
    try:
        yield
    except BaseException as error:
        remove_placement_group(group)
        if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
            raise error.cause from error
        if isinstance(error, RayError):
            raise _lost("start", error) from error
        raise
    finally:
        watchdog.cancel()
