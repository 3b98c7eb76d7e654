"""What a task source is, and the two that hold tasks in memory.

A source is an endless, seeded sequence: task number `n` depends on the seed and `n` alone, so a
position is all there is to resume. Several collectors read disjoint shares of one sequence.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from mentor_serve.errors import ConfigError
from mentor_serve.types import Task

HOLDOUT_SPLIT = "holdout"


class TaskSource(Protocol):
    """An endless, resumable sequence of tasks, and tasks that never occur in it."""

    def next_task(self) -> Task:
        """Return the task at the position and move on."""

    def state(self) -> dict[str, int]:
        """Return what `restore` needs: `{"position": n}`."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, in a source built with the same arguments."""

    def holdout(self, num_tasks: int) -> list[Task]:
        """Return the same evaluation tasks at every call, none of which training draws.

        Raises:
            ConfigError: the source cannot spare so many.
        """


class Position:
    """A counter over one collector's share: shard, shard + num_shards, ..."""

    def __init__(self, *, shard: int = 0, num_shards: int = 1) -> None:
        if not 0 <= shard < num_shards:
            raise ConfigError(f"shard must be from 0 to num_shards - 1, got {shard}/{num_shards}")
        self._shard = shard
        self._num_shards = num_shards
        self._count = 0

    def advance(self) -> int:
        """Return the index of the next task in the whole sequence and move on."""
        index = self._shard + self._count * self._num_shards
        self._count += 1
        return index

    def state(self) -> dict[str, int]:
        """Return the number of tasks drawn from this share."""
        return {"position": self._count}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a number of tasks drawn.

        Raises:
            ConfigError: not a state of a task source.
        """
        position = state.get("position")
        if not isinstance(position, int) or position < 0:
            raise ConfigError(f"expected a task source's state {{'position': n}}, got {state!r}")
        self._count = position


class ListSource:
    """A finite list of tasks, shuffled anew for each pass; its holdout is cut from the list.

    A list that has a holdout of its own (another split) gives it as `holdout_tasks`; else up to a
    tenth of the tasks, chosen by the seed, is set aside and never trained on.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        name: str,
        seed: int = 0,
        position: Position | None = None,
        holdout_tasks: Sequence[Task] | None = None,
    ) -> None:
        if not tasks:
            raise ConfigError(f"task source {name} is empty; expected at least one task")
        self._name = name
        self._seed = seed
        self._position = position or Position()
        if holdout_tasks is None:
            tasks, holdout_tasks = _set_aside(tasks, seed)
        self._tasks = tasks
        self._holdout = [dataclasses.replace(t, split=HOLDOUT_SPLIT) for t in holdout_tasks]
        self._pass_number = -1
        self._order: np.ndarray[Any, np.dtype[np.intp]] = np.arange(0)

    def __len__(self) -> int:
        """Return the number of training tasks in one pass."""
        return len(self._tasks)

    def next_task(self) -> Task:
        """Return the task at the position and move on."""
        pass_number, offset = divmod(self._position.advance(), len(self._tasks))
        if pass_number != self._pass_number:
            generator = np.random.default_rng([self._seed % 2**32, pass_number])
            self._order = generator.permutation(len(self._tasks))
            self._pass_number = pass_number
        return self._tasks[int(self._order[offset])]

    def state(self) -> dict[str, int]:
        """Return what `restore` needs."""
        return self._position.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._position.restore(state)

    def holdout(self, num_tasks: int) -> list[Task]:
        """Return the first `num_tasks` of the tasks set aside."""
        if num_tasks > len(self._holdout):
            raise ConfigError(
                f"task source {self._name} can spare {len(self._holdout)} tasks for evaluation, "
                f"asked for {num_tasks}; ask for fewer or name a data set of its own to evaluate on"
            )
        return self._holdout[:num_tasks]


class SubmittedTasks:
    """Puts tasks that users submit in front of a source; each is drawn once. Thread-safe."""

    def __init__(self, source: TaskSource) -> None:
        self._source = source
        self._waiting: deque[Task] = deque()
        self._lock = threading.Lock()

    def submit(self, tasks: Sequence[Task]) -> int:
        """Queue tasks and return how many wait now."""
        with self._lock:
            self._waiting.extend(tasks)
            return len(self._waiting)

    def next_task(self) -> Task:
        """Return the oldest submitted task, or the source's next one."""
        with self._lock:
            return self._waiting.popleft() if self._waiting else self._source.next_task()

    def state(self) -> dict[str, int]:
        """Return the source's state; submitted tasks live in the store, not here."""
        return self._source.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the source."""
        self._source.restore(state)

    def holdout(self, num_tasks: int) -> list[Task]:
        """Return the source's evaluation tasks."""
        return self._source.holdout(num_tasks)


def _set_aside(tasks: Sequence[Task], seed: int) -> tuple[list[Task], list[Task]]:
    """Split off a tenth, but never the last task; duplicates of a prompt stay on one side."""
    prompts = list(dict.fromkeys(task.prompt for task in tasks))
    order = np.random.default_rng([seed % 2**32, 2**32 - 1]).permutation(len(prompts))
    spared = {prompts[int(index)] for index in order[: len(prompts) // 10]}
    holdout = {task.prompt: task for task in tasks if task.prompt in spared}
    ordered = [holdout[prompts[int(i)]] for i in order if prompts[int(i)] in spared]
    return [task for task in tasks if task.prompt not in spared], ordered
