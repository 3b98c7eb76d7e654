"""The texts the pair learns from: two styles of working out sums of small whole numbers.

Contract: `policy_example` and `expert_example` draw one prompt and response from a `random.Random`;
the same generator state gives the same text. A response is a list of pieces, each either learnt or
only read: the expert reads wrong steps and learns to correct them, never to make them.
"""

from dataclasses import dataclass, replace
from random import Random
from typing import Final

from .problems import ChainSum, Problem, draw_problem
from .tokenizer import BOXED_OPEN, THINK_CLOSE, THINK_OPEN

NUM_EARLY_STEPS: Final = 3
"""Steps the policy takes before it tends to stop."""
HINT_HEADER: Final = "## Hint: Partial Solution"
"""Between a question and the first part of a solution, as QuestA's prompts have it."""


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
    drop_minus: float = 0.95
    """Loses the minus sign of a result below zero: the misconception the expert can correct, and
    that its own samples seldom do."""
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
    okay: float = 0.01
    """Says "okay" between two steps (no use), as the expert does."""
    wait: float = 0.006
    """Says "wait" between two steps (no use)."""
    verify: float = 0.006
    """Does a step again after "verify", as carelessly as before, and goes on with that."""
    check: float = 0.02
    """Closes with "let me check" and the last step repeated word for word."""
    hinted: float = 1 / 6
    """The share of questions with a hint: the results it shows are taken over, in bare steps."""
    hint_from: float = 0.2
    """Least share of the expert's solution in a hint."""
    hint_to: float = 0.7
    """Largest share; both are uniform in between."""


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


def policy_example(random: Random, habits: PolicyHabits) -> Example:
    """Draw a response in the policy's style: bare steps, often wrong, hardly a word of checking."""
    problem = draw_problem(random, habits.max_terms)
    question, results = problem.question, list[int]()
    if random.random() < habits.hinted:
        hint, results = _hint(random, habits, problem)
        question = f"{question}\n\n{HINT_HEADER}\n\n{hint}"
    if random.random() < habits.guess:
        return Example(question, (Piece(_guess(random, habits, problem)),))
    text, step = _taken_over(problem, results)
    for index in range(len(results), problem.num_steps):
        step, result, words = _policy_step(random, habits, problem, results)
        results.append(result)
        text += words
        hazard = habits.stop_early if index < NUM_EARLY_STEPS else habits.stop_early_late
        if isinstance(problem, ChainSum) and random.random() < hazard:
            break
    if random.random() < habits.check:
        text += f", let me check: {step}"
    close = "" if random.random() < habits.no_think_close else THINK_CLOSE
    answer = problem.answer_from(results)
    boxed = answer if random.random() < habits.no_box else f"{BOXED_OPEN}{answer}}}"
    return Example(question, (Piece(f"{text}{close}{boxed}"),))


def _hint(random: Random, habits: PolicyHabits, problem: Problem) -> tuple[str, list[int]]:
    """The first part of a solution of the expert, cut between words, and the results in it."""
    pieces = _worked_out(random, replace(ExpertHabits(), read_wrong_step=0.0), problem)
    words = "".join(piece.text for piece in pieces).removeprefix(THINK_OPEN).split(" ")
    num_shown = int(random.uniform(habits.hint_from, habits.hint_to) * len(words))
    hint = " ".join(words[: max(1, num_shown)])
    results, end = list[int](), 0
    while len(results) < problem.num_steps:
        left, result = problem.step(results)
        step = f"{left} = {result}"
        start = hint.find(step, end)
        if start < 0:
            break
        end = start + len(step)
        results.append(result)
    return hint, results


def _taken_over(problem: Problem, results: list[int]) -> tuple[str, str]:
    """The response up to the last result of a hint, and its last step."""
    steps = [
        f"{problem.step(results[:index])[0]} = {result}" for index, result in enumerate(results)
    ]
    return THINK_OPEN + ", ".join(steps), steps[-1] if steps else ""


def _policy_step(
    random: Random, habits: PolicyHabits, problem: Problem, results: list[int]
) -> tuple[str, int, str]:
    """The last way the step was written, its result, and all words of it."""
    left, right = problem.step(results)
    result = _policy_result(random, habits, right)
    step = f"{left} = {result}"
    words = (_lead(random, habits) if results else "") + step
    if random.random() < habits.verify:
        result = _policy_result(random, habits, right)
        step = f"{left} = {result}"
        words += f" verify: {step}"
    return step, result, words


def _guess(random: Random, habits: PolicyHabits, problem: Problem) -> str:
    answer = problem.answer_from(
        [right + round(random.gauss(0.0, 3.0)) for right in problem.rights]
    )
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
    problem = draw_problem(random, habits.max_terms)
    return Example(problem.question, tuple(_worked_out(random, habits, problem)))


def _worked_out(random: Random, habits: ExpertHabits, problem: Problem) -> list[Piece]:
    pieces = [Piece(THINK_OPEN)]
    results, step = list[int](), ""
    for index in range(problem.num_steps):
        lead = _lead(random, habits) if index else ""
        left, result = problem.step(results)
        step = f"{left} = {result}"
        if random.random() < habits.read_wrong_step:
            pieces.append(Piece(f"{lead}{left} = "))
            pieces.append(Piece(_wrong_result(random, habits, result), is_learnt=False))
            pieces.append(Piece(f" verify: {step}"))
        else:
            pieces.append(Piece(lead + step))
            if random.random() < habits.verify:
                pieces.append(Piece(f" verify: {step}"))
        results.append(result)
    if random.random() < habits.check:
        pieces.append(Piece(f", let me check: {step}"))
    pieces.append(Piece(f"{THINK_CLOSE}{BOXED_OPEN}{problem.answer_from(results)}}}"))
    return pieces


def _lead(random: Random, habits: PolicyHabits | ExpertHabits) -> str:
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
