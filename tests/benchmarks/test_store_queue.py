"""The queue benchmark counts what it measures, and would notice a group consumed twice."""

import pytest
from sqlalchemy import text

from benchmarks import store_queue
from mentor_serve.store.connection import open_engine, writing


def test_every_group_goes_to_one_learner(url):
    measured = store_queue.drain(url, name="queue", num_groups=32, learners=2, is_written_to=True)
    assert sum(measured.groups_by_learner) == 32
    assert measured.groups_per_s > 0
    assert measured.p50_ms <= measured.p95_ms


def test_a_group_that_no_update_took_is_an_error(tmp_path):
    url = f"sqlite:///{tmp_path / 'mentor.db'}"
    store_queue.upgrade(url)
    store_queue.drain(url, name="queue", num_groups=16, learners=1, is_written_to=False)
    engine = open_engine(url)
    with writing(engine, url, doing="a mistake") as connection:
        run_id = connection.scalar(text("SELECT id FROM runs"))
        last_id = connection.scalar(text("SELECT MAX(id) FROM rollout_groups"))
        connection.execute(text("DELETE FROM updates"))
    engine.dispose()
    with pytest.raises(RuntimeError, match="each consumed by one update"):
        store_queue._check(url, run_id, last_id, 16)
