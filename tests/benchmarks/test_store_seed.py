"""A seeded store is sound, the same on both databases, and every query can be timed on it."""

import json
import re
import sys

import pytest
from sqlalchemy import text

from benchmarks import store_queries
from benchmarks.seeded_run import SeededRun
from benchmarks.store_seed import seed_store
from mentor_serve.errors import StoreError
from mentor_serve.store import database_check
from mentor_serve.store.connection import open_engine, reading

NUM_RESPONSES = 245
"""Twenty groups of twelve, and five that make none."""


def rows(url, statement):
    engine = open_engine(url)
    with reading(engine, url, doing="reading a seeded store") as connection:
        found = [tuple(row) for row in connection.execute(text(statement))]
    engine.dispose()
    return found


def test_a_seeded_store_is_sound(url):
    seeded = seed_store(url, num_trajectories=NUM_RESPONSES, seed=3, with_tokens=True)
    report = database_check(url)
    assert (report["ok"], report["problems"]) == (True, [])
    assert (seeded.num_groups, seeded.num_trajectories) == (20, 240)
    counts = report["counts"]
    assert counts["rollout_groups"] == 20
    assert counts["interventions"] == seeded.num_interventions > 80
    grouped = "SELECT COUNT(*), SUM(num_tokens) FROM trajectories WHERE group_id IS NOT NULL"
    summed = "SELECT SUM(num_trajectories), SUM(num_tokens) FROM version_stats"
    assert rows(url, grouped) == rows(url, summed)
    assert rows(url, "SELECT SUM(num_tokens) FROM rollout_groups") == [(rows(url, summed)[0][1],)]


def test_both_databases_hold_the_rows_that_the_seed_makes(url):
    seed_store(url, num_trajectories=NUM_RESPONSES, seed=3)
    made = SeededRun(seed=3, num_groups=20).groups(range(20), with_tokens=False)
    columns = "id", "task_id", "reward", "num_tokens", "num_interventions", "expert_lost", "text"
    found = rows(
        url, f"SELECT {', '.join(columns)} FROM trajectories WHERE kind <> 'expert' ORDER BY id"
    )
    expected = sorted(tuple(row[name] for name in columns) for row in made["trajectories"])
    assert found == expected
    with pytest.raises(StoreError, match="found one; choose another seed"):
        seed_store(url, num_trajectories=NUM_RESPONSES, seed=3)


def test_rows_are_those_of_their_seed_with_tokens_or_without():
    def responses(seed, *, with_tokens):
        run = SeededRun(seed=seed, num_groups=20)
        return run.groups(range(20), with_tokens=with_tokens)["trajectories"]

    first = responses(3, with_tokens=False)
    assert responses(3, with_tokens=True) == first
    assert responses(4, with_tokens=False) != first


def test_every_query_is_timed(url, monkeypatch, capsys):
    seed_store(url, num_trajectories=NUM_RESPONSES, seed=0, with_tokens=True)
    monkeypatch.setattr(sys, "argv", ["store_queries", url, "--repeats", "1"])
    store_queries.main()
    result = json.loads(capsys.readouterr().out)
    statements = re.findall("```sql", store_queries.GUIDE.read_text(encoding="utf-8"))
    assert len(result["guide"]) == len(statements)
    assert len(result["experiments"]) == 4
    for part in ("dashboard", "experiments"):
        assert all(times["p50_ms"] > 0 for times in result[part].values())
