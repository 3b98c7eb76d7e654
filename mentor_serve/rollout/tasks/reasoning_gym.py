"""Tasks from reasoning-gym's procedural data sets, `embedded` for the bundled pair's mix.

reasoning-gym draws item i of seed s from `Random(s + i)`, so neighbouring seeds share items. Seeds
are therefore spread: training takes blocks of `size` from the lowest quarter of the 32-bit range,
evaluation the upper half, and different values of `seed` never overlap until 2**30 / size of them.

Different seeds may still draw the same short problem. What keeps evaluation apart from training
for certain is the problem's text: one text in eight, by its hash, is for evaluation. Where the
generator gives training such a text, the item is replaced by one of the seeds between; so task n
still depends on the seed and n alone. This holds for all seeds, sizes and configurations.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Final

from mentor_serve.errors import ConfigError
from mentor_serve.rollout.tasks.sources import HOLDOUT_SPLIT, Position
from mentor_serve.types import Task

EMBEDDED: Final = "embedded"
_SPARES: Final = 2**30
"""First seed of the items that replace held-out texts in training."""
_HALF: Final = 2**31
_HOLDOUT_SIZE: Final = 2**16
"""Items among which the evaluation tasks of one seed are looked for."""
_HOLDOUT_SHARE: Final = 8
"""One text in so many is held out."""
_MAX_SPARES: Final = 200
"""Items that may in turn replace one: all held out with probability 8**-200, unless the generator
has hardly any texts."""

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
        train_seed = seed % (_SPARES // size) * size
        holdout_seed = _HALF + seed % (_HALF // _HOLDOUT_SIZE) * _HOLDOUT_SIZE
        self._train = [_Generator(part, seed=train_seed, size=size) for part in parts]
        self._parts = list(parts)
        self._holdout_seed = holdout_seed
        self._size = size

    def next_task(self) -> Task:
        """Return the task at the position and move on; repeats after `size` items of each part."""
        index, part = divmod(self._position.advance(), len(self._train))
        return self._train[part].train_task(index % self._size)

    def state(self) -> dict[str, int]:
        """Return what `restore` needs."""
        return self._position.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._position.restore(state)

    def holdout(self, num_tasks: int) -> list[Task]:
        """Return tasks whose texts training never draws, each text once, parts in turn."""
        per_part = -(-num_tasks // len(self._parts))
        most = _HOLDOUT_SIZE // _HOLDOUT_SHARE
        if not 1 <= per_part <= most:
            raise ConfigError(
                f"expected 1 to {most * len(self._parts)} evaluation tasks, got {num_tasks}"
            )
        found = [_held_out_tasks(p, per_part, seed=self._holdout_seed) for p in self._parts]
        return [found[n % len(found)][n // len(found)] for n in range(num_tasks)]


def embedded_parts() -> list[Part]:
    """Return the task mix of the bundled pair."""
    from mentor_serve.models.reference import TASK_MIX

    return [(name, dict(config)) for name, config in TASK_MIX]


def is_held_out(prompt: str) -> bool:
    """Whether a problem's text is for evaluation alone."""
    return hashlib.sha256(prompt.encode("utf-8")).digest()[0] % _HOLDOUT_SHARE == 0


def _held_out_tasks(part: Part, count: int, *, seed: int) -> list[Task]:
    # No more items than needed: some data sets (acre) make all of them when created.
    size = min(_HOLDOUT_SIZE, 2 * _HOLDOUT_SHARE * count)
    while True:
        generator = _Generator(part, seed=seed, size=size)
        found: dict[str, Task] = {}
        for index in range(size):
            task = generator.task(index, split=HOLDOUT_SPLIT)
            if is_held_out(task.prompt):
                found.setdefault(task.prompt, task)
            if len(found) == count:
                return list(found.values())
        if size == _HOLDOUT_SIZE:
            raise ConfigError(
                f"reasoning-gym's {part[0]} as configured can spare {len(found)} different tasks "
                f"for evaluation, asked for {count}; ask for fewer or widen tasks.config"
            )
        size = min(_HOLDOUT_SIZE, 4 * size)


class _Generator:
    """One data set of reasoning-gym, item by item."""

    def __init__(self, part: Part, *, seed: int, size: int, regenerate: bool | None = None) -> None:
        self._part = self._name, self._config = part
        self._seed, self._size = seed, size
        self._dataset = _create(self._name, self._config, seed=seed, size=size)
        self._regenerate = not self._survives_json() if regenerate is None else regenerate

    def train_task(self, index: int) -> Task:
        """The item, or the first of its replacements, whose text is not held out."""
        task = self.task(index, split="train")
        for attempt in range(_MAX_SPARES):
            if not is_held_out(task.prompt):
                return task
            digest = hashlib.sha256(f"{self._seed + index}/{attempt}".encode()).digest()
            seed = _SPARES + int.from_bytes(digest[:8], "big") % (_HALF - _SPARES)
            spare = _Generator(self._part, seed=seed, size=1, regenerate=self._regenerate)
            task = spare.task(0, split="train")
        raise ConfigError(
            f"reasoning-gym's {self._name} as configured gives hardly any different problems: "
            f"{_MAX_SPARES} in a row have texts held out for evaluation; widen tasks.config"
        )

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
