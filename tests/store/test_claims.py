"""One learner a run, whoever starts a second one."""

import os

import pytest
from sqlalchemy import create_engine, make_url, text

from mentor_serve.errors import RunClaimed
from mentor_serve.store import TrajectoryStore


@pytest.fixture
def other(url):
    with TrajectoryStore(url) as opened:
        yield opened


def test_a_run_is_claimed_once_and_the_refusal_names_the_holder(store, other, run_id):
    claim, second = store.claim_run(run_id), other.claim_run(run_id)
    claim.hold()
    claim.hold()
    with pytest.raises(RunClaimed, match=rf"{os.getpid()} on .* trains it") as caught:
        second.hold()
    assert run_id in str(caught.value)
    claim.release()
    claim.release()
    second.hold(timeout_s=30)
    with pytest.raises(RunClaimed):
        claim.hold(timeout_s=0.2)
    second.release()


def test_other_runs_are_free(store, other, run_id):
    claim, second = store.claim_run(run_id), other.claim_run(other.open_run("another", {}))
    claim.hold()
    second.hold()
    claim.release()
    second.release()


def test_a_claim_takes_no_place_in_the_pool(url, run_id):
    with TrajectoryStore(url, pool_size=1, timeout_s=5) as store:
        claim = store.claim_run(run_id)
        claim.hold()
        assert store.count_groups(run_id)["ready"] == 0
        claim.release()


def cut_connections(url, database):
    engine = create_engine(
        make_url(url).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = :name AND pid <> pg_backend_pid()"
            ),
            {"name": database},
        )
    engine.dispose()


def test_a_claim_whose_connection_was_cut_is_taken_again_unless_another_was_faster(
    store, other, run_id, url
):
    if url.startswith("sqlite"):
        pytest.skip("a lock on a file has no connection")
    database = make_url(url).database
    claim, second = store.claim_run(run_id), other.claim_run(run_id)
    claim.hold()
    cut_connections(url, database)
    claim.hold()
    with pytest.raises(RunClaimed):
        second.hold()
    cut_connections(url, database)
    second.hold()
    with pytest.raises(RunClaimed):
        claim.hold()
    second.release()
    claim.hold(timeout_s=30)
    claim.release()
