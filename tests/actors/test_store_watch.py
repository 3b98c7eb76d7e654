"""What readiness says while the database is away, and that nobody waits for it."""

import asyncio
import threading

from mentor_serve.actors.store_watch import StoreThreads, StoreWatch
from mentor_serve.errors import SchemaOutOfDate, StoreUnavailable

CALM = {"spool_groups": 0, "spool_bytes": 0, "is_store_away": 0, "is_spool_full": 0}
SPOOLING = {"spool_groups": 6, "spool_bytes": 1_700_000, "is_store_away": 1, "is_spool_full": 0}


def look(count, counters):
    async def collectors():
        return counters

    return asyncio.run(StoreWatch(count, collectors, timeout_s=5).look())


async def answered():
    return {"ready": 3}


async def refused():
    raise StoreUnavailable("counting groups failed: connection refused")


def test_nothing_to_say_while_all_is_well():
    reasons, details = look(answered, [CALM, CALM])
    assert reasons == []
    assert details == {"groups": {"ready": 3}, "spool": {"groups": 0, "bytes": 0}}


def test_spools_of_all_collectors_are_added_up():
    reasons, details = look(refused, [SPOOLING, SPOOLING])
    assert reasons == [
        "store_unavailable: spooling, 12 groups (3.4 MB) wait: "
        "counting groups failed: connection refused"
    ]
    assert details == {"spool": {"groups": 12, "bytes": 3_400_000}}


def test_a_collector_that_cannot_reach_it_is_a_reason_too():
    reasons, _ = look(answered, [CALM, SPOOLING])
    assert reasons == ["store_unavailable: spooling, 6 groups (1.7 MB) wait"]


def test_a_full_spool_is_named():
    reasons, _ = look(refused, [SPOOLING | {"is_spool_full": 1}])
    assert reasons[0].startswith("store_unavailable: the spool is full, collection stands still")


def test_without_collectors_the_reason_remains():
    reasons, _ = look(refused, [])
    assert reasons[0].startswith("store_unavailable: spooling, 0 groups (0.0 MB) wait")


def test_a_schema_that_is_behind_is_no_outage():
    async def behind():
        raise SchemaOutOfDate("no such table: rollout_groups")

    reasons, _ = look(behind, [CALM])
    assert reasons == ["store: no such table: rollout_groups"]


def test_a_database_that_says_nothing_is_asked_once_and_holds_no_other_thread():
    release = threading.Event()
    calls = []

    def hang():
        calls.append(1)
        assert release.wait(60)
        return {"ready": 1}

    async def nobody():
        return [CALM]

    async def probe():
        threads = StoreThreads()
        watch = StoreWatch(lambda: threads.call(hang), nobody, timeout_s=0.05)
        for _ in range(10):
            reasons, _ = await watch.look()
            assert reasons[0].endswith("no answer within 0.05 s")
        assert len(calls) == 1
        # The loop's own threads are free.
        assert await asyncio.to_thread(lambda: "free") == "free"
        release.set()
        reasons, details = await watch.look()
        assert (reasons, details["groups"]) == ([], {"ready": 1})

    asyncio.run(probe())
