"""Tasks from reasoning-gym's procedural data sets, `embedded` for the bundled pair's mix.

reasoning-gym draws item i of seed s from `Random(s + i)`, so neighbouring seeds share items. Seeds
are therefore spread: training takes blocks of `size` from the lower half of the 32-bit range,
evaluation the upper half, and different values of `seed` never overlap until 2**31 / size of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from mentor_serve.errors import ConfigError
from mentor_serve.rollout.tasks.sources import HOLDOUT_SPLIT, Position
from mentor_serve.types import Task

EMBEDDED: Final = "embedded"
_HALF: Final = 2**31
_HOLDOUT_SIZE: Final = 2**16
"""Evaluation tasks that one seed can give."""

Part = tuple[str, dict[str, Any]]
"""Data set name and configuration."""


class ReasoningGymSource:
    """An endless mix of procedural data sets, in equal shares."""

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        seed: int = 0,
        size: int = 100_000,
        position: Position | None = None,
    ) -> None:
        """Build the generators of all parts.

        Raises:
            ConfigError: an unknown data set, or arguments that its configuration refuses.
        """
        if not 1 <= size <= 2**30:
            raise ConfigError(f"tasks.size must be from 1 to {2**30}, got {size}")
        self._position = position or Position()
        train_seed = seed % (_HALF // size) * size
        holdout_seed = _HALF + seed % (_HALF // _HOLDOUT_SIZE) * _HOLDOUT_SIZE
        self._train = [_Generator(part, seed=train_seed, size=size) for part in parts]
        self._parts = list(parts)
        self._holdout_seed = holdout_seed
        self._size = size

    def next_task(self) -> Task:
        """Return the task at the position and move on; repeats after `size` items of each part."""
        index, part = divmod(self._position.advance(), len(self._train))
        return self._train[part].task(index % self._size, split="train")

    def state(self) -> dict[str, int]:
        """Return what `restore` needs."""
        return self._position.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._position.restore(state)

    def holdout(self, num_tasks: int) -> list[Task]:
        """Return tasks from seeds that training never uses, parts in turn."""
        per_part = -(-num_tasks // len(self._parts))
        if not 1 <= per_part <= _HOLDOUT_SIZE:
            most = _HOLDOUT_SIZE * len(self._parts)
            raise ConfigError(f"expected 1 to {most} evaluation tasks, got {num_tasks}")
        # No larger than asked for: some data sets (acre) make all their items when created.
        generators = [
            _Generator(part, seed=self._holdout_seed, size=per_part) for part in self._parts
        ]
        return [
            generators[n % len(generators)].task(n // len(generators), split=HOLDOUT_SPLIT)
            for n in range(num_tasks)
        ]


def embedded_parts() -> list[Part]:
    """Return the task mix of the bundled pair."""
    from mentor_serve.models.reference import TASK_MIX

    return [(name, dict(config)) for name, config in TASK_MIX]


class _Generator:
    """One data set of reasoning-gym, item by item."""

    def __init__(self, part: Part, *, seed: int, size: int) -> None:
        self._name, self._config = part
        self._seed, self._size = seed, size
        self._dataset = _create(self._name, self._config, seed=seed, size=size)
        self._regenerate = not self._survives_json()

    def task(self, index: int, *, split: str) -> Task:
        entry = self._dataset[index]
        recipe: dict[str, Any] = {
            "name": self._name,
            "config": self._config,
            "seed": self._seed,
            "size": self._size,
            "index": index,
            "entry": _plain(entry),
        }
        if self._regenerate:
            recipe["regenerate"] = True
        return Task(
            source=f"reasoning_gym:{self._name}",
            prompt=entry["question"],
            answer=str(entry["answer"]),
            metadata={"reasoning_gym": recipe},
            split=split,
        )

    def _survives_json(self) -> bool:
        """Whether the scorer judges the entry as it is stored like the entry itself.

        A few data sets compare tuples, which JSON turns into lists; theirs are generated anew.
        """
        entry = self._dataset[0]
        score = self._dataset.score_answer
        return bool(score(entry["answer"], entry) == score(entry["answer"], _plain(entry)))


def _plain(entry: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(entry, default=str))
    return plain


def _create(name: str, config: dict[str, Any], *, seed: int, size: int) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise ConfigError(
            f"tasks.name {name!r}: reasoning-gym has no such data set; expected {EMBEDDED!r} or "
            f"one of {', '.join(sorted(DATASETS))}"
        )
    if clash := config.keys() & {"seed", "size"}:
        raise ConfigError(
            f"tasks.config.{min(clash)}: set tasks.{min(clash)} instead, which keeps evaluation "
            "tasks apart from training tasks"
        )
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **config)
    except (TypeError, ValueError, AssertionError, LookupError) as error:
        raise ConfigError(f"tasks.config for reasoning-gym's {name}: {error}") from error
