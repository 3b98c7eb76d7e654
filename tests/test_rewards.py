"""The reward functions that configurations in apps/ name."""

from __future__ import annotations

import pytest

from apps.rewards import last_number


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("2", 1.0),
        ("5 - 3 = 2.", 1.0),
        ("The answer is 2.0", 1.0),
        ("2 or 3", 0.0),
        ("-2", 0.0),
        ("22", 0.0),
        ("two", 0.0),
        ("", 0.0),
    ],
)
def test_the_last_number_decides(response, reward):
    assert last_number("What is 5 - 3?", response, "2", {}) == reward


def test_a_negative_answer_needs_its_sign():
    assert last_number("", "3 - 5 is -2", "-2", {}) == 1.0
    assert last_number("", "3 - 5 is 2", "-2", {}) == 0.0
