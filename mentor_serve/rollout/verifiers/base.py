"""What a verifier is, and which one a setting names.

A verifier judges one response to one task. It runs in a worker process of `VerifierPool`, in that
process's main thread, and may therefore block, raise or die; it keeps no state that matters.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any, Protocol

from mentor_serve.errors import ConfigError
from mentor_serve.types import Score, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifierSpec:
    """How responses are scored; plain values, so that it can cross processes."""

    verifier: str = "auto"
    """`auto` (reasoning_gym tasks: their own scorer, others: Math-Verify), `math`,
    `reasoning_gym`, or `module:function`."""
    accuracy_weight: float = 0.9
    """Weight of the accuracy in the reward (paper: 0.9, LLaMA 0.8)."""
    format_weight: float = 0.1
    """Weight of the format in the reward (paper: 0.1, LLaMA 0.2)."""
    timeout_s: float = 5.0
    """Limit of one judgement."""

    def __post_init__(self) -> None:
        weights = (self.accuracy_weight, self.format_weight)
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
            raise ConfigError(
                "reward.accuracy_weight and reward.format_weight must be finite, at least 0 and "
                f"not both 0, got {self.accuracy_weight} and {self.format_weight}"
            )
        if not self.timeout_s > 0:
            raise ConfigError(f"reward.timeout_s must be above 0, got {self.timeout_s}")
        if self.verifier not in {"auto", "math", "reasoning_gym"}:
            _split(self.verifier)

    def weigh(self, accuracy: float, format_score: float) -> Score:
        """Return the paper's reward: the weighted sum of accuracy and format (appendix B)."""
        reward = self.accuracy_weight * accuracy + self.format_weight * format_score
        return Score(reward=reward, accuracy=accuracy, format_score=format_score)


class Verifier(Protocol):
    """Judges responses."""

    def prepare(self, task: Task) -> None:
        """Import and cache what `score` needs for a task; not under the time limit."""

    def score(self, task: Task, text: str) -> Score:
        """Judge one response. Whatever it raises fails that one trajectory."""


def build_verifier(spec: VerifierSpec) -> Verifier:
    """Return the verifier that the specification names.

    Raises:
        ConfigError: a `module:function` that cannot be imported or called.
    """
    from mentor_serve.rollout.verifiers.custom import FunctionVerifier
    from mentor_serve.rollout.verifiers.math import MathVerifier
    from mentor_serve.rollout.verifiers.reasoning_gym import ReasoningGymVerifier

    match spec.verifier:
        case "auto":
            return AutoVerifier(gym=ReasoningGymVerifier(spec), other=MathVerifier(spec))
        case "math":
            return MathVerifier(spec)
        case "reasoning_gym":
            return ReasoningGymVerifier(spec)
        case _:
            return FunctionVerifier(spec, import_function(spec.verifier))


class AutoVerifier:
    """Chooses by task: reasoning_gym's own scorer for its tasks, another verifier otherwise."""

    def __init__(self, *, gym: Verifier, other: Verifier) -> None:
        self._gym = gym
        self._other = other

    def prepare(self, task: Task) -> None:
        """Prepare the verifier that judges this task."""
        self._choose(task).prepare(task)

    def score(self, task: Task, text: str) -> Score:
        """Judge with the verifier that belongs to this task."""
        return self._choose(task).score(task, text)

    def _choose(self, task: Task) -> Verifier:
        return self._gym if "reasoning_gym" in task.metadata else self._other


def import_function(name: str) -> Any:
    """Import `module:function`.

    Raises:
        ConfigError: not of that form, not importable, or not callable.
    """
    module_name, attribute = _split(name)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise ConfigError(
            f"reward.verifier {name!r}: cannot import module {module_name!r} "
            f"({type(error).__name__}: {error}); it must be importable from the directory where "
            "the service starts, or be installed"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"reward.verifier {name!r}: {module_name} has no {attribute!r}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"reward.verifier {name!r}: expected a function, got {found!r:.80}")
    return found


def _split(name: str) -> tuple[str, str]:
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        raise ConfigError(
            f"reward.verifier {name!r}: expected auto, math, reasoning_gym or module:function"
        )
    return module_name, attribute
