"""`kill -9` of two collectors and a learner on one database, fifty times, at random moments."""

import logging
import random
import time

import pytest
from books import Books
from fault_processes import Victim, collect, learn, open_writer

NUM_ROUNDS = 50
NUM_COLLECTORS = 2
DEADLINE_S = 120.0
log = logging.getLogger(__name__)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fifty_kills_lose_nothing_and_repeat_nothing(store, run_id, url, tmp_path):
    chance = random.Random(20260131)
    spools = [tmp_path / "spool" / str(index) for index in range(NUM_COLLECTORS)]
    books = Books(url, run_id, spools)
    acknowledged, num_spooled, num_steps = [], 0, 0
    for number in range(NUM_ROUNDS):
        victims = [Victim(collect, url, run_id, spool, chance.randrange(2**31)) for spool in spools]
        victims.append(Victim(learn, url, run_id, tmp_path, 0))
        # Some die before they have done anything, some in the middle of their work.
        if number % 5:
            deadline = time.monotonic() + DEADLINE_S
            victims[number % NUM_COLLECTORS].wait_for(chance.randrange(1, 12), deadline)
            if number % 2:
                victims[-1].wait_for(chance.randrange(1, 3), deadline)
        time.sleep(chance.uniform(0.0, 0.04))
        chance.shuffle(victims)
        for victim in victims:
            victim.kill()
        said = [message for victim in victims for message in victim.said]
        acknowledged += [one for one, outcome in said if outcome in {"committed", "spooled"}]
        num_spooled += sum(outcome == "spooled" for _, outcome in said)
        num_steps += sum(outcome == "consumed" for _, outcome in said)
        books.check(acknowledged)
    for spool in spools:
        writer = open_writer(store, run_id, spool)
        deadline = time.monotonic() + DEADLINE_S
        while writer.status().num_spooled:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        writer.close()
    summary = books.check(acknowledged, is_settled=True)
    books.close()
    assert len(acknowledged) > NUM_ROUNDS, summary
    assert num_spooled > 0, summary
    assert num_steps >= NUM_ROUNDS // 5, summary
    log.info(f"{NUM_ROUNDS} rounds: {summary}; {num_spooled} acknowledged from the spool")
