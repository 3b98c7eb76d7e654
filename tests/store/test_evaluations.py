import math
from datetime import UTC, datetime

import pytest
from sqlalchemy import inspect, text

from mentor_serve.errors import StoreError
from mentor_serve.store import EvaluationRecord, MeasureRecord, schema
from mentor_serve.store.connection import open_engine

MOMENT = datetime(2026, 1, 31, tzinfo=UTC)


def evaluation(version=3, **options):
    options.setdefault("measures", measures())
    values = {"policy_version": version, "suite": "sums", "num_problems": 100, "seed": 2**40}
    return EvaluationRecord(**(values | options))


def measures():
    return [
        MeasureRecord(
            metric="greedy_pass_at_k", k=1, value=0.5, value_low=0.4, value_high=0.6, temperature=0
        ),
        MeasureRecord(metric="pass_at_k", k=8, value=0.75, num_samples=8, temperature=0.6),
        MeasureRecord(metric="mean_entropy", value=math.nan),
    ]


def test_an_evaluation_is_read_back_whole(store, run_id, clock):
    store.add_evaluation(run_id, evaluation(2))
    evaluation_id = store.add_evaluation(run_id, evaluation(3))
    found = store.latest_evaluation(run_id)
    assert (found.evaluation_id, found.created_at) == (evaluation_id, clock.now)
    # NaN is NULL: "could not be measured".
    stored = [*measures()[:2], MeasureRecord(metric="mean_entropy", value=None)]
    expected = evaluation(3, measures=stored, evaluation_id=evaluation_id, created_at=clock.now)
    assert found == expected


def test_the_newest_evaluation_is_of_the_policy_and_of_the_suite_asked_for(store, run_id):
    assert store.latest_evaluation(run_id) is None
    store.add_evaluation(run_id, evaluation(4, suite="other"))
    store.add_evaluation(run_id, evaluation(3))
    store.add_evaluation(run_id, evaluation(None, model="expert"))
    assert store.latest_evaluation(run_id).policy_version == 3
    assert store.latest_evaluation(run_id, suite="other").policy_version == 4
    assert store.latest_evaluation(run_id, suite="none") is None
    assert store.newest_evaluated_version(run_id, suite="sums") == 3
    assert store.newest_evaluated_version(run_id, suite="none") is None


def test_an_evaluation_is_stored_whole_or_not_at_all(store, run_id):
    """Its second row has no metric, which the database refuses after it took the first."""
    broken = [measures()[0], MeasureRecord(metric=None, value=1.0)]
    with pytest.raises(StoreError):
        store.add_evaluation(run_id, evaluation(measures=broken))
    assert store.latest_evaluation(run_id) is None


@pytest.mark.parametrize("count", [0, 2])
def test_a_number_twice_or_no_number_is_refused(store, run_id, count):
    given = [MeasureRecord(metric="pass_at_k", k=1, value=0.5)] * count
    with pytest.raises(StoreError, match="expected one row a metric and k"):
        store.add_evaluation(run_id, evaluation(measures=given))


def test_evaluations_of_older_databases_stay(alembic_runner, alembic_engine):
    alembic_runner.migrate_up_to("0003")
    run = {"id": "r", "name": "r", "config_json": "{}", "started_at": MOMENT}
    alembic_runner.insert_into("runs", run | {"updated_at": MOMENT})
    row = {"id": "e", "run_id": "r", "policy_version": 7, "suite": "s", "metric": "pass_at_k"}
    row |= {"k": 4, "value": 0.5, "num_problems": 10, "created_at": MOMENT}
    alembic_runner.insert_into("evaluations", row)
    alembic_runner.migrate_up_to("0004")
    with alembic_engine.connect() as connection:
        query = text("SELECT policy_version, value, model, evaluation_id FROM evaluations")
        assert connection.execute(query).all() == [(7, 0.5, "policy", None)]
    alembic_runner.migrate_down_to("0003")
    with alembic_engine.connect() as connection:
        query = text("SELECT policy_version, value FROM evaluations")
        assert connection.execute(query).all() == [(7, 0.5)]
        columns = [item["name"] for item in inspect(connection).get_columns("evaluations")]
        assert "evaluation_id" not in columns


@pytest.fixture
def alembic_config():
    return schema.alembic_config()


@pytest.fixture
def alembic_engine(empty_url):
    engine = open_engine(empty_url)
    yield engine
    engine.dispose()
