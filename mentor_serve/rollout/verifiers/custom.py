"""A user's own reward function, `module:function`.

It is called as `function(prompt, response, answer, metadata)` and returns a number in [0, 1], which
is the reward and the accuracy; or a mapping or `Score` with `reward`, `accuracy`, `format_score`.
Left out: `format_score` is the required format's, `accuracy` is the reward, and `reward` is the
weighted sum of accuracy and format. Any other value fails the trajectory.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from mentor_serve.errors import VerifierError
from mentor_serve.rollout.verifiers.base import VerifierSpec
from mentor_serve.rollout.verifiers.format import has_required_format
from mentor_serve.types import Score, Task

_PARTS = frozenset({"reward", "accuracy", "format_score"})


class FunctionVerifier:
    """Wraps the user's function and checks what it returns."""

    def __init__(self, spec: VerifierSpec, function: Callable[..., Any]) -> None:
        self._spec = spec
        self._function = function

    def prepare(self, task: Task) -> None:
        """Nothing to prepare: the function was imported when the worker started."""

    def score(self, task: Task, text: str) -> Score:
        """Call the function.

        Raises:
            VerifierError: it returned something that is not a score.
        """
        returned = self._function(task.prompt, text, task.answer, task.metadata)
        parts = self._parts(returned)
        form = parts.get("format_score", float(has_required_format(text)))
        if "reward" not in parts:
            return self._spec.weigh(parts["accuracy"], form)
        reward = parts["reward"]
        return Score(reward=reward, accuracy=parts.get("accuracy", reward), format_score=form)

    def _parts(self, returned: Any) -> dict[str, float]:
        if isinstance(returned, Score):
            returned = dataclasses.asdict(returned)
        if not isinstance(returned, Mapping):
            returned = {"reward": returned}
        if not (returned.keys() & {"reward", "accuracy"}) or returned.keys() - _PARTS:
            raise self._refuse(f"a mapping with the keys {sorted(map(str, returned))}")
        return {str(key): self._number(str(key), value) for key, value in returned.items()}

    def _number(self, part: str, value: Any) -> float:
        if not isinstance(value, numbers.Real):
            raise self._refuse(f"{part} = {value!r:.80}")
        number = float(value)
        if not (math.isfinite(number) and 0.0 <= number <= 1.0):
            raise self._refuse(f"{part} = {number}")
        return number

    def _refuse(self, came: str) -> VerifierError:
        return VerifierError(
            f"{self._spec.verifier} returned {came}; expected a number from 0 to 1, or a mapping "
            "with reward or accuracy (and format_score) from 0 to 1"
        )
