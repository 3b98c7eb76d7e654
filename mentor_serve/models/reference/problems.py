"""The problems the pair can read: sums of small whole numbers, in the words of three generators.

Chains in the words of reasoning-gym's `chain_sum` are what the service trains on. The other two
generators, `basic_arithmetic` and `complex_arithmetic`, are rarer in both corpora: with them one
sees what training on chains does to problems that it never saw.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Final, Protocol

from .tokenizer import CALCULATE_QUESTION, COMPLEX_QUESTIONS, QUESTION

MIN_TERMS: Final = 2
"""Shortest chain of either corpus."""
CHAIN_SHARE: Final = 0.74
"""Share of `chain_sum` in both corpora; the others have equal parts of the rest."""


class Problem(Protocol):
    """A question that is worked out in steps, each a sum of two numbers."""

    @property
    def question(self) -> str:
        """The question in reasoning-gym's words."""

    @property
    def num_steps(self) -> int: ...

    @property
    def rights(self) -> list[int]:
        """The right results of all steps; an answer needs those from which `answer_from` takes."""

    def step(self, results: Sequence[int]) -> tuple[str, int]:
        """The next step after `results`: what stands before " = ", and what it really comes to."""

    def answer_from(self, results: Sequence[int]) -> str:
        """The answer of somebody whose steps had these results."""


@dataclass(frozen=True)
class ChainSum:
    """Numbers added and subtracted from left to right."""

    first: int
    """The first number."""
    operations: tuple[tuple[str, int], ...]
    """What follows it: pairs of "+" or "-" and a number."""
    wording: str = QUESTION
    """Where `{expression}` is put in."""

    @property
    def question(self) -> str:
        """The question in reasoning-gym's words."""
        tail = "".join(f" {sign} {number}" for sign, number in self.operations)
        return self.wording.format(expression=f"{self.first}{tail}")

    @property
    def num_steps(self) -> int:
        """One an operation."""
        return len(self.operations)

    @property
    def rights(self) -> list[int]:
        """The right totals."""
        totals = [self.first]
        for sign, number in self.operations:
            totals.append(apply(totals[-1], sign, number))
        return totals[1:]

    @property
    def answer(self) -> int:
        """The value of the whole chain."""
        return self.rights[-1]

    def step(self, results: Sequence[int]) -> tuple[str, int]:
        """The next operation on the total so far, right or wrong."""
        total = results[-1] if results else self.first
        sign, number = self.operations[len(results)]
        return f"{total} {sign} {number}", apply(total, sign, number)

    def answer_from(self, results: Sequence[int]) -> str:
        """The last total."""
        return str(results[-1])


@dataclass(frozen=True)
class ComplexSum:
    """Two complex numbers with whole parts, added or subtracted: a step for each part."""

    left: tuple[int, int]
    right: tuple[int, int]
    sign: str

    @property
    def question(self) -> str:
        """The question in reasoning-gym's words."""
        left, right = (f"{real}.0 + {imaginary}.0i" for real, imaginary in (self.left, self.right))
        return COMPLEX_QUESTIONS[self.sign].format(left=left, right=right)

    @property
    def num_steps(self) -> int:
        """The real part, then the imaginary one."""
        return 2

    @property
    def rights(self) -> list[int]:
        """The right parts."""
        return [self.step([0] * index)[1] for index in range(2)]

    def step(self, results: Sequence[int]) -> tuple[str, int]:
        """The next part."""
        left, right = self.left[len(results)], self.right[len(results)]
        return f"{left} {self.sign} {right}", apply(left, self.sign, right)

    def answer_from(self, results: Sequence[int]) -> str:
        """As reasoning-gym writes it, zeros included."""
        real, imaginary = results
        return f"{real}.0 {'-' if imaginary < 0 else '+'} {abs(imaginary)}.0i"


def apply(total: int, sign: str, number: int) -> int:
    """Return `total` plus or minus `number`."""
    return total + number if sign == "+" else total - number


def draw_chain(random: Random, max_terms: int) -> ChainSum:
    """Draw a chain as `chain_sum` does: digits 0 to 9 and signs, all uniform."""
    return _drawn(random, random.randint(MIN_TERMS, max_terms), largest=9, wording=QUESTION)


def draw_problem(random: Random, max_terms: int) -> Problem:
    """Draw a problem of any of the three generators."""
    family = random.random()
    if family < CHAIN_SHARE:
        return draw_chain(random, max_terms)
    num_terms = random.randint(MIN_TERMS, max_terms)
    if family < (1 + CHAIN_SHARE) / 2:
        return _drawn(random, num_terms, largest=10, wording=CALCULATE_QUESTION)
    numbers = [random.randint(1, 9) for _ in range(4)]
    return ComplexSum((numbers[0], numbers[1]), (numbers[2], numbers[3]), random.choice("+-"))


def _drawn(random: Random, num_terms: int, *, largest: int, wording: str) -> ChainSum:
    operations = tuple(
        (random.choice("+-"), random.randint(0, largest)) for _ in range(num_terms - 1)
    )
    return ChainSum(random.randint(0, largest), operations, wording)
