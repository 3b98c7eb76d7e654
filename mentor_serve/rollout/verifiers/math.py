"""Accuracy of mathematical answers by Math-Verify, inside the required format (appendix B).

Math-Verify compares with `signal.alarm`, so this verifier works in a main thread only. It never
judges a response that is not in the format: such a response has accuracy 0.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

from mentor_serve.rollout.verifiers.base import VerifierSpec
from mentor_serve.rollout.verifiers.format import BOXED_OPEN, boxed_answer, last_boxed
from mentor_serve.types import Score, Task

GSM8K_MARK: Final = "####"
_GOLD_LIMIT_S: Final = 20


class MathVerifier:
    """Accuracy 1 if the boxed answer equals the task's answer as mathematics, else 0."""

    def __init__(self, spec: VerifierSpec) -> None:
        self._spec = spec
        # An answer that takes sympy too long counts as wrong, well before the pool's own limit
        # kills the process: parsing and comparing get less than half of the time each.
        self._limit_s = max(1, int(spec.timeout_s * 0.4))

    def prepare(self, task: Task) -> None:
        """Import Math-Verify, build its grammar and parse the reference answer."""
        _parse_gold(gold_answer(task.answer))
        _parse("1", limit_s=_GOLD_LIMIT_S)

    def score(self, task: Task, text: str) -> Score:
        """Judge one response; an answer that cannot be parsed is wrong."""
        answer = boxed_answer(text)
        if answer is None:
            return self._spec.weigh(0.0, 0.0)
        return self._spec.weigh(float(self._is_equal(gold_answer(task.answer), answer)), 1.0)

    def _is_equal(self, gold: str, answer: str) -> bool:
        if gold == answer:
            return True
        from math_verify import verify

        parsed = _parse(answer, limit_s=self._limit_s)
        # The order matters: the reference first.
        return bool(verify(_parse_gold(gold), parsed, timeout_seconds=self._limit_s))


def gold_answer(answer: str) -> str:
    """Return the final answer in a reference solution.

    The last box of a worked solution (MATH's `solution`), what follows `####` (GSM8K's `answer`),
    the text itself otherwise.
    """
    if BOXED_OPEN in answer and (boxed := last_boxed(answer)) is not None:
        return boxed
    return answer.rpartition(GSM8K_MARK)[2].strip().strip("$").strip()


@lru_cache(maxsize=256)
def _parse_gold(gold: str) -> list[Any]:
    return _parse(gold, limit_s=_GOLD_LIMIT_S)


def _parse(answer: str, *, limit_s: int) -> list[Any]:
    from math_verify import parse

    parsed: list[Any] = parse(f"{BOXED_OPEN}{answer}}}", parsing_timeout=limit_s)
    return parsed
