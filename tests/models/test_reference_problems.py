"""The problems of the pair's corpora read like reasoning-gym's, and are worked out rightly."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import reasoning_gym

from mentor_serve.models.reference.corpus import (
    HINT_HEADER,
    ExpertHabits,
    PolicyHabits,
    expert_example,
    policy_example,
)
from mentor_serve.models.reference.problems import ChainSum, ComplexSum, draw_problem
from mentor_serve.models.reference.tokenizer import CALCULATE_QUESTION, QUESTION
from mentor_serve.rollout.strategies import HintSchedule


def worked(problem):
    """Results of somebody who makes no mistake."""
    results = []
    for _ in range(problem.num_steps):
        results.append(problem.step(results)[1])
    return results


@pytest.mark.parametrize(
    ("name", "config", "build"),
    [
        (
            "chain_sum",
            {"min_digits": 1, "max_digits": 1},
            lambda data: chain(data["metadata"]["expression"], QUESTION),
        ),
        (
            "basic_arithmetic",
            {
                "min_digits": 1,
                "max_digits": 1,
                "operators": ["+", "-"],
                "allow_parentheses": False,
                "allow_negation": False,
                "format_style": "simple",
            },
            lambda data: chain(data["metadata"]["expression"], CALCULATE_QUESTION),
        ),
        (
            "complex_arithmetic",
            {
                "min_real": 1,
                "max_real": 9,
                "min_imag": 1,
                "max_imag": 9,
                "operations_weights": [0.5, 0.5, 0.0, 0.0],
            },
            lambda data: ComplexSum(
                tuple(int(part) for part in data["metadata"]["num1"]),
                tuple(int(part) for part in data["metadata"]["num2"]),
                data["metadata"]["operation"],
            ),
        ),
    ],
)
def test_questions_and_answers_are_reasoning_gyms(name, config, build):
    data_set = reasoning_gym.create_dataset(name, seed=3, size=30, **config)
    for item in data_set:
        problem = build(item)
        assert problem.question == item["question"]
        assert worked(problem) == problem.rights
        assert data_set.score_answer(problem.answer_from(worked(problem)), item) == 1.0


def chain(expression, wording):
    first, *rest = expression.split()
    pairs = zip(rest[::2], rest[1::2], strict=True)
    return ChainSum(int(first), tuple((sign, int(number)) for sign, number in pairs), wording)


def test_the_policys_mistakes_carry_on():
    problem = ChainSum(1, (("-", 4), ("+", 2)))
    assert problem.step([]) == ("1 - 4", -3)
    assert problem.step([3]) == ("3 + 2", 5)
    assert problem.answer_from([3, 5]) == "5"


def test_every_kind_of_problem_is_drawn_about_as_often_as_it_should_be():
    random = Random(0)
    kinds = [draw_problem(random, 7).question.split()[0] for _ in range(2000)]
    # 1480, 260 and 260 of 2000 on average; 5 standard deviations are 98 and 75.
    assert abs(kinds.count("State") - 1480) < 98
    assert abs(kinds.count("Calculate") - 260) < 75


def test_the_expert_learns_no_mistake_and_ends_with_the_right_answer():
    random = Random(1)
    for _ in range(300):
        state = random.getstate()
        example = expert_example(random, ExpertHabits())
        again = Random()
        again.setstate(state)
        problem = draw_problem(again, ExpertHabits().max_terms)
        text = "".join(piece.text for piece in example.response)
        assert text.endswith(f"\\boxed{{{problem.answer_from(problem.rights)}}}")


def test_the_policy_is_often_wrong_and_seldom_says_the_experts_words():
    random = Random(2)
    texts = [
        "".join(piece.text for piece in policy_example(random, PolicyHabits()).response)
        for _ in range(1000)
    ]
    for word in ("verify", "check", "okay", "wait"):
        # Between 1.3 and 2 % each: 13 to 20 of 1000, standard deviation at most 4.5.
        assert 0 < sum(word in text for text in texts) < 45


def test_hints_read_like_questas():
    assert HintSchedule().header == HINT_HEADER


def test_the_policy_takes_over_whole_results_of_a_hint_and_none_of_its_words():
    habits = replace(
        PolicyHabits(), hinted=1.0, guess=0.0, okay=0.0, wait=0.0, verify=0.0, check=0.0
    )
    random, num_steps_shown, num_hints_with_words = Random(3), 0, 0
    for _ in range(300):
        state = random.getstate()
        example = policy_example(random, habits)
        again = Random()
        again.setstate(state)
        problem = draw_problem(again, habits.max_terms)
        question, header, hint = example.question.split("\n\n")
        assert (question, header) == (problem.question, HINT_HEADER)
        (piece,) = example.response
        assert "verify" not in piece.text
        num_hints_with_words += "verify" in hint
        results = []
        for _ in range(problem.num_steps):
            left, result = problem.step(results)
            if f"{left} = {result}" not in hint:
                break
            assert piece.text.count(f"{left} = {result}") >= 1
            results.append(result)
        num_steps_shown += len(results)
    assert num_steps_shown > 300
    assert num_hints_with_words > 15


def test_a_question_in_six_has_a_hint():
    random = Random(4)
    hinted = sum(
        HINT_HEADER in policy_example(random, PolicyHabits()).question for _ in range(3000)
    )
    # 500 on average; 5 standard deviations are 102.
    assert abs(hinted - 500) < 102
