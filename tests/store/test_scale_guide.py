"""The partitions of docs/scale.md are valid on the real server, and hold what their weeks say."""

import re
import time
from datetime import UTC, datetime
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url

from mentor_serve.store import new_id

GUIDE = Path(__file__).parents[2] / "docs" / "scale.md"
(SKETCH,) = re.findall(r"```sql\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


def id_of(moment):
    """An id as the service makes them, but of another time."""
    milliseconds = f"{int(moment.timestamp() * 1000):012x}"
    return f"{milliseconds[:8]}-{milliseconds[8:]}{new_id()[13:]}"


def test_the_first_digits_of_an_id_are_its_time():
    """Milliseconds since 1970, which partitions by time count on."""
    before = time.time() * 1000
    made = int(new_id().replace("-", "")[:12], 16)
    assert int(before) <= made <= time.time() * 1000 + 1


def test_the_sketched_partitions_hold_the_ids_of_their_weeks(url):
    if url.startswith("sqlite"):
        pytest.skip("SQLite has no partitions")
    location = make_url(url).set(drivername="postgresql")
    sketch, drop = SKETCH.split("DROP TABLE")
    with psycopg.connect(location.render_as_string(hide_password=False)) as connection:
        connection.execute(sketch)
        for day in (5, 11, 12, 25, 28):
            name = id_of(datetime(2026, 1, day, 12, tzinfo=UTC)) + "-mixed-00"
            connection.execute(
                "INSERT INTO part_trajectories (id, run_id, kind, sample_index, status, "
                "num_prompt_tokens, num_tokens, num_gated, num_interventions, min_policy_version, "
                "max_policy_version, expert_lost, created_at) VALUES "
                "(%s, 'r', 'mixed', 0, 'ok', 1, 1, 0, 0, 0, 0, FALSE, now())",
                (name,),
            )
        found = connection.execute(
            "SELECT tableoid::regclass::text, COUNT(*) FROM part_trajectories GROUP BY 1 ORDER BY 1"
        ).fetchall()
        assert found == [
            ("part_trajectories_20260105", 2),
            ("part_trajectories_20260112", 1),
            ("part_trajectories_20260119", 1),
            ("part_trajectories_rest", 1),
        ]
        connection.execute(f"DROP TABLE {drop}")
