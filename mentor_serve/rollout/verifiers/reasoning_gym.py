"""Accuracy by the scorer that a reasoning-gym data set brings along.

The data set's `score_answer` gets the boxed answer and the entry as the task keeps it. Only its
full mark counts: accuracy is 1 where it returns at least 1, else 0, so that the partial credit that
some data sets give to an answer of the right shape earns nothing.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from mentor_serve.errors import VerifierError
from mentor_serve.rollout.verifiers.base import VerifierSpec
from mentor_serve.rollout.verifiers.format import boxed_answer
from mentor_serve.types import Score, Task


class ReasoningGymVerifier:
    """Accuracy 1 if the data set gives the boxed answer its full mark, else 0."""

    def __init__(self, spec: VerifierSpec) -> None:
        self._spec = spec

    def prepare(self, task: Task) -> None:
        """Import reasoning-gym and build the data set."""
        _dataset_and_entry(task)

    def score(self, task: Task, text: str) -> Score:
        """Judge one response."""
        answer = boxed_answer(text)
        if answer is None:
            return self._spec.weigh(0.0, 0.0)
        dataset, entry = _dataset_and_entry(task)
        mark = float(dataset.score_answer(answer=answer, entry=entry))
        return self._spec.weigh(float(mark >= 1.0), 1.0)


def _dataset_and_entry(task: Task) -> tuple[Any, dict[str, Any]]:
    recipe = task.metadata.get("reasoning_gym")
    if not isinstance(recipe, dict) or "name" not in recipe:
        raise VerifierError(
            f"verifier reasoning_gym: task of {task.source!r} holds no reasoning_gym entry; use "
            "reward.verifier = auto or math for tasks of other sources"
        )
    config = json.dumps(recipe.get("config", {}), sort_keys=True)
    dataset = _dataset(recipe["name"], config, recipe["seed"], recipe["size"])
    if recipe.get("regenerate", False):
        return dataset, dataset[recipe["index"]]
    return dataset, recipe["entry"]


@lru_cache(maxsize=64)
def _dataset(name: str, config: str, seed: int, size: int) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=seed, size=size, **json.loads(config))
