"""The questions of docs/sql.md, on both databases, against answers computed by hand.

Statements are read from the guide and sent through the databases' own drivers, as users send them.
"""

import re
import sqlite3
from datetime import UTC, datetime
from decimal import Decimal
from math import comb
from pathlib import Path

import psycopg
import pytest
import question_samples
from question_samples import DAY, RESPONSES, response, run, task, write
from sqlalchemy import make_url

from mentor_serve.store import models

GUIDE = Path(__file__).parents[2] / "docs" / "sql.md"
QUERIES = re.findall(r"```sql\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def asked(url):
    """A database with the rows of `question_samples`."""
    question_samples.write_everything(url)
    return url


def question(part):
    """The one statement of the guide that contains `part`."""
    (found,) = (query for query in QUERIES if part in query)
    return found


def answer(url, query):
    """Rows as plain tuples, from a connection that knows nothing of this package."""
    if url.startswith("sqlite"):
        connection = sqlite3.connect(url.removeprefix("sqlite:///"))
    else:
        plain = make_url(url).set(drivername="postgresql")
        # A client half an hour off: what is said to be UTC has to be.
        connection = psycopg.connect(
            plain.render_as_string(hide_password=False), options="-c timezone=Asia/Kolkata"
        )
    try:
        rows = connection.execute(query).fetchall()
    finally:
        connection.close()
    return [tuple(_number(value) for value in row) for row in rows]


def _number(value):
    return float(value) if isinstance(value, Decimal) else value


def approximately(rows):
    """For comparing rows: floats within rounding, the rest exactly."""
    return [
        tuple(pytest.approx(value) if isinstance(value, float) else value for value in row)
        for row in rows
    ]


def test_entropy_by_version_weighs_responses_by_their_tokens(asked):
    # Version 0, on-policy: (10 * 1 + 20 * 0.25 + 10 * 0.5 + 2 * 10 * 0.5) / 60; unknown ones do
    # not count.
    assert answer(asked, question("entropy_sum / num_entropy_tokens")) == approximately(
        [
            (0, "mixed", 0.4),
            (0, "on_policy", 0.5),
            (1, "mixed", 0.3),
            (1, "on_policy", 0.2),
        ]
    )


def test_pass_at_k_by_task(asked):
    # Task open: one of six is right, 1 - C(5, 4) / C(6, 4) = 2 / 3. Task rare has three samples.
    assert answer(asked, question("AS pass_at_k")) == approximately(
        [("hard?", 4, 0, 0.0), ("open?", 6, 1, 2 / 3), ("easy?", 4, 3, 1.0)]
    )


@pytest.mark.parametrize("k", [1, 4, 8])
def test_pass_at_k_is_the_unbiased_estimate_for_all_counts(url, k):
    counts = {f"{n}-{c}": (n, c) for n in (3, 4, 8, 9) for c in range(n + 1)}
    write(url, models.Run, [run("new", DAY)])
    write(url, models.TaskRow, [task(name, "new") for name in counts])
    base = response(0, *RESPONSES[0])
    rows = [
        base | {"id": f"{name}-{index}", "group_id": None, "task_id": name, "accuracy": accuracy}
        for name, (n, c) in counts.items()
        for index, accuracy in enumerate([1.0] * c + [0.0] * (n - c))
    ]
    write(url, models.Trajectory, rows)
    query = question("AS pass_at_k").replace("SELECT 4 AS k", f"SELECT {k} AS k")
    found = {prompt: share for prompt, _, _, share in answer(url, query)}
    expected = {
        f"{name}?": 1 - comb(n - c, k) / comb(n, k) for name, (n, c) in counts.items() if n >= k
    }
    assert found == pytest.approx(expected)


def test_interventions_by_position(asked):
    # Mixed responses of 20, 8, 40, 16, 5, 16 and 16 tokens.
    assert answer(asked, question("AS first_position")) == approximately(
        [(0, 93, 5, 5 / 93), (16, 20, 1, 1 / 20), (32, 8, 1, 1 / 8)]
    )


def test_words_of_the_policy_and_what_the_expert_puts_there(asked):
    assert answer(asked, question("policy_word")) == approximately(
        [("wait", "verify", 3, 0.75), ("so", "verify", 2, 1.0), ("wait", "check", 1, 0.25)]
    )


def test_responses_that_contain_a_word_by_version(asked):
    assert answer(asked, question("LIKE '%verify%'")) == approximately(
        [(0, 6, 2 / 6), (1, 11, 1 / 11)]
    )


def test_mixed_against_on_policy_of_the_same_group(asked):
    # Rewards mixed and on-policy: g1 1.0 and 0.55, g2 0.55 and 0.1, g3 0.1 and 0.1, g5 0.55 and
    # 1.0; the groups without a mixed response are left out.
    assert answer(asked, question("reward_difference")) == approximately(
        [(4, 0.55, 0.4375, 0.1125, 0.5, 0.375, 0.125, 2, 1)]
    )


def test_reward_against_the_number_of_interventions(asked):
    assert answer(asked, question("GROUP BY num_interventions")) == approximately(
        [
            (0, 3, 0.4, 1 / 3, 16.0),
            (1, 2, 0.55, 0.5, 6.5),
            (2, 1, 1.0, 1.0, 20.0),
            (3, 1, 1.0, 1.0, 40.0),
        ]
    )


def test_problems_that_only_guidance_solves(asked):
    assert answer(asked, question("num_solved_alone")) == [("hard?", 4, 3, 1)]


def test_staleness_of_all_groups(asked):
    # g5 was sampled under version 0 and consumed by the update that started from version 1.
    assert answer(asked, question("SUM(SUM(num_groups)) OVER ()")) == approximately(
        [(0, 3, 0.75), (1, 1, 0.25)]
    )


def test_throughput_by_hour(asked):
    found = answer(asked, question("FROM v_throughput"))
    assert [_hour(row[0]) for row in found] == [9, 12, 13, 15]
    assert [row[1:] for row in found] == [(1, 2, 14), (2, 8, 134), (2, 7, 77), (2, 9, 90)]


def _hour(value):
    at = datetime.fromisoformat(value) if isinstance(value, str) else value
    assert at.tzinfo is not None
    at = at.astimezone(UTC)
    assert at == DAY.replace(hour=at.hour)
    return at.hour


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: " ".join(query.split())[:50])
def test_every_statement_of_the_guide_runs_as_it_stands(asked, query):
    assert (
        answer(asked, query) or query == question("severity <> 'info'") or "expert_model" in query
    )


def test_a_part_of_a_store_is_asked_about_by_id(asked):
    (newest,) = answer(asked, question("newest"))
    assert newest == ("attempt",)
    by_version = question("MIN(id)\nFROM rollout_groups").replace("1900", "1")
    assert answer(asked, by_version) == [("g3",)]
