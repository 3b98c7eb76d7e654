"""No query of the dashboard reads a whole large table, however many rows there are.

Plans of SQLite, which chooses them by the schema alone (no statistics are gathered). PostgreSQL's
depend on how many rows there are: `benchmarks.store_queries` times them.
"""

import re
import sqlite3
from datetime import UTC, datetime
from pathlib import Path

import pytest
import question_samples
from sqlalchemy import event

from mentor_serve.store import upgrade
from mentor_serve.store.experiment_stats import ExperimentReader
from mentor_serve.store.models import Base
from mentor_serve.types import TrajectoryKind

GUIDE = Path(__file__).parents[2] / "docs" / "sql.md"
RUN = "new"
LARGE = "trajectories|trajectory_tokens|interventions|rollout_groups|tasks|version_stats"
QUERIES = {
    "training_curve": lambda reader: reader.training_curve(RUN),
    "latest_update": lambda reader: reader.latest_update(RUN),
    "live_version": lambda reader: reader.live_version(RUN),
    "by_version": lambda reader: reader.by_version(RUN, kind=TrajectoryKind.MIXED),
    "staleness": lambda reader: reader.staleness(RUN),
    "group_counts": lambda reader: reader.group_counts(RUN),
    "throughput": lambda reader: reader.throughput(RUN, now=datetime.now(UTC)),
    "trajectories": lambda reader: reader.trajectories(RUN),
    "trajectories, filtered": lambda reader: reader.trajectories(
        RUN, kind=TrajectoryKind.MIXED, is_passed=False, min_interventions=2
    ),
    "trajectory": lambda reader: reader.trajectory("attempt"),
    "replacements": lambda reader: reader.replacements(RUN),
    "events": lambda reader: reader.events(RUN),
    "evaluations": lambda reader: reader.evaluations(RUN),
    "methods": lambda reader: reader.methods([RUN]),
    "update_curves": lambda reader: reader.update_curves([RUN]),
    "greedy_curves": lambda reader: reader.greedy_curves([RUN]),
    "final_measures": lambda reader: reader.final_measures([RUN]),
}


@pytest.fixture
def plan(tmp_path):
    """A function from a query to the lines of the plans of its statements."""
    path = tmp_path / "mentor.db"
    url = f"sqlite:///{path}"
    upgrade(url)
    question_samples.write_everything(url)
    reader = ExperimentReader(url)
    sent = []
    event.listen(reader._engine, "before_cursor_execute", lambda _1, _2, *one: sent.append(one[:2]))

    def lines(query):
        sent.clear()
        query(reader)
        with sqlite3.connect(path) as connection:
            found = [
                row[-1]
                for statement, parameters in sent
                for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)
            ]
        connection.close()
        return found

    yield lines
    reader.close()


@pytest.mark.parametrize("name", QUERIES)
def test_no_large_table_is_scanned(plan, name):
    found = plan(QUERIES[name])
    assert any(line.startswith("SEARCH") for line in found)
    aliases = rf"SCAN ({LARGE}|[a-z])\b"
    assert [line for line in found if re.match(aliases, line)] == []


def test_lists_filter_within_one_index(plan):
    found = plan(QUERIES["trajectories, filtered"])
    assert found[0] == "SEARCH trajectories USING INDEX ix_trajectories_listing (run_id=?)"
    # No sorting: the index has the order of the ids.
    assert not any("ORDER BY" in line for line in found)


def test_a_scan_would_be_noticed(plan):
    def scan(reader):
        with reader.connection() as connection:
            connection.exec_driver_sql("SELECT COUNT(text) FROM trajectories").all()

    assert plan(scan) == ["SCAN trajectories"]


def test_the_guide_names_every_index():
    named = set(re.findall(r"`((?:ix|uq)_\w+)`", GUIDE.read_text(encoding="utf-8")))
    indexes = {index.name for table in Base.metadata.tables.values() for index in table.indexes}
    assert named >= indexes
    unique = {
        constraint.name
        for table in Base.metadata.tables.values()
        for constraint in table.constraints
        if str(constraint.name).startswith("uq_")
    }
    assert named <= indexes | unique
