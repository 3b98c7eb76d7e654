"""The texts the pair learns from: two styles of working out a chain of single digits.

Contract: `policy_example` and `expert_example` draw one prompt and response from a `random.Random`;
the same generator state gives the same text. A response is a list of pieces, each either learnt or
only read: the expert reads wrong steps and learns to correct them, never to make them.
"""

from dataclasses import dataclass
from random import Random
from typing import Final

from .tokenizer import BOXED_OPEN, QUESTION, THINK_CLOSE, THINK_OPEN

MIN_TERMS: Final = 2
"""Shortest chain of either corpus."""
NUM_EARLY_STEPS: Final = 3
"""Steps the policy takes before it tends to stop."""


@dataclass(frozen=True)
class Chain:
    """Single digits added and subtracted from left to right."""

    first: int
    """The first digit."""
    operations: tuple[tuple[str, int], ...]
    """What follows it: pairs of "+" or "-" and a digit."""

    @property
    def question(self) -> str:
        """The question in reasoning-gym's words."""
        tail = "".join(f" {sign} {digit}" for sign, digit in self.operations)
        return QUESTION.format(expression=f"{self.first}{tail}")

    @property
    def answer(self) -> int:
        """The value of the whole chain."""
        total = self.first
        for sign, digit in self.operations:
            total = apply(total, sign, digit)
        return total


@dataclass(frozen=True)
class Piece:
    """A stretch of a response."""

    text: str
    """Its text."""
    is_learnt: bool = True
    """False for text the model reads as context and is not trained to produce."""


@dataclass(frozen=True)
class Example:
    """One question with one response."""

    question: str
    """The user's turn."""
    response: tuple[Piece, ...]
    """The assistant's turn without its end token."""


@dataclass(frozen=True)
class PolicyHabits:
    """How the policy fails; every number but the first is a probability."""

    max_terms: int = 8
    """The longest chain it has seen."""
    guess: float = 0.15
    """Answers at once, without working, off by a few."""
    drop_minus: float = 0.8
    """Loses the minus sign of a result below zero: the misconception the expert can correct."""
    wrong_digit: float = 0.03
    """Is off by one or two in a step."""
    stop_early: float = 0.04
    """Takes an intermediate result for the answer, after any step of the first three."""
    stop_early_late: float = 0.2
    """The same, from the fourth step on."""
    no_think_close: float = 0.04
    """Forgets `</think>`."""
    no_box: float = 0.04
    """Writes the answer without `\\boxed{`."""
    empty_think: float = 0.7
    """The share of guesses that begin with an empty `<think></think>`."""


@dataclass(frozen=True)
class ExpertHabits:
    """How the expert words its work; every number but the first is a probability."""

    max_terms: int = 8
    """The longest chain it has seen."""
    okay: float = 0.1
    """Says "okay" between two steps (no use)."""
    wait: float = 0.06
    """Says "wait" between two steps (no use)."""
    read_wrong_step: float = 0.15
    """A step is shown wrong; a "verify" that puts it right always follows."""
    dropped_minus: float = 0.6
    """The share of negative results shown wrong that only lost their minus sign."""
    verify: float = 0.12
    """Does a right step again after "verify"."""
    check: float = 0.4
    """Closes with "let me check" and the last step done again."""


def apply(total: int, sign: str, digit: int) -> int:
    """Return `total` plus or minus `digit`."""
    return total + digit if sign == "+" else total - digit


def draw_chain(random: Random, max_terms: int) -> Chain:
    """Draw a chain as reasoning-gym does: digits 0 to 9 and signs, all uniform."""
    num_terms = random.randint(MIN_TERMS, max_terms)
    operations = tuple((random.choice("+-"), random.randint(0, 9)) for _ in range(num_terms - 1))
    return Chain(first=random.randint(0, 9), operations=operations)


def policy_example(random: Random, habits: PolicyHabits) -> Example:
    """Draw a response in the policy's style: bare steps, often wrong, never a word of checking."""
    chain = draw_chain(random, habits.max_terms)
    if random.random() < habits.guess:
        return Example(chain.question, (Piece(_guess(random, habits, chain)),))
    total, steps = chain.first, list[str]()
    for index, (sign, digit) in enumerate(chain.operations):
        result = _policy_result(random, habits, apply(total, sign, digit))
        steps.append(f"{total} {sign} {digit} = {result}")
        total = result
        hazard = habits.stop_early if index < NUM_EARLY_STEPS else habits.stop_early_late
        if random.random() < hazard:
            break
    close = "" if random.random() < habits.no_think_close else THINK_CLOSE
    answer = str(total) if random.random() < habits.no_box else f"{BOXED_OPEN}{total}}}"
    return Example(chain.question, (Piece(f"{THINK_OPEN}{', '.join(steps)}{close}{answer}"),))


def _guess(random: Random, habits: PolicyHabits, chain: Chain) -> str:
    answer = chain.answer + round(random.gauss(0.0, 3.0))
    think = f"{THINK_OPEN}{THINK_CLOSE}" if random.random() < habits.empty_think else ""
    return f"{think}{BOXED_OPEN}{answer}}}"


def _policy_result(random: Random, habits: PolicyHabits, result: int) -> int:
    if random.random() < habits.wrong_digit:
        result += random.choice((-2, -1, 1, 2))
    if result < 0 and random.random() < habits.drop_minus:
        result = -result
    return result


def expert_example(random: Random, habits: ExpertHabits) -> Example:
    """Draw a response in the expert's style: right steps, checks that correct, and filler words."""
    chain = draw_chain(random, habits.max_terms)
    pieces = [Piece(THINK_OPEN)]
    total, step = chain.first, ""
    for index, (sign, digit) in enumerate(chain.operations):
        lead = _lead(random, habits) if index else ""
        result = apply(total, sign, digit)
        left = f"{total} {sign} {digit} = "
        step = f"{left}{result}"
        if random.random() < habits.read_wrong_step:
            pieces.append(Piece(lead + left))
            pieces.append(Piece(_wrong_result(random, habits, result), is_learnt=False))
            pieces.append(Piece(f" verify: {step}"))
        else:
            pieces.append(Piece(lead + step))
            if random.random() < habits.verify:
                pieces.append(Piece(f" verify: {step}"))
        total = result
    if random.random() < habits.check:
        pieces.append(Piece(f", let me check: {step}"))
    pieces.append(Piece(f"{THINK_CLOSE}{BOXED_OPEN}{total}}}"))
    return Example(chain.question, tuple(pieces))


def _lead(random: Random, habits: ExpertHabits) -> str:
    # Filler stands behind the comma, where the policy is sure of what comes next; "verify" stands
    # before it, where the policy hesitates between going on and stopping. An expert asked only at
    # uncertain tokens therefore passes on the one and rarely the other.
    word = ""
    if random.random() < habits.okay:
        word = "okay, "
    elif random.random() < habits.wait:
        word = "wait, "
    return f", {word}"


def _wrong_result(random: Random, habits: ExpertHabits, result: int) -> str:
    # The policy's own two mistakes, so that the expert recognises them in a mixed rollout.
    if result < 0 and random.random() < habits.dropped_minus:
        return str(-result)
    return str(result + random.choice((-2, -1, 1, 2)))
