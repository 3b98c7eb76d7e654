import asyncio

from mentor_serve.rollout.pacing import Backoff, Pacer, sleep_unless


class Queue:
    def __init__(self) -> None:
        self.ready = 0

    async def count(self) -> int:
        return self.ready


def test_groups_under_way_count_towards_the_limit() -> None:
    async def run() -> None:
        pacer = Pacer(Queue().count, max_ready_groups=2, poll_s=0.001)
        stop = asyncio.Event()
        assert await pacer.admit(stop)
        assert await pacer.admit(stop)
        third = asyncio.create_task(pacer.admit(stop))
        await asyncio.sleep(0.02)
        assert pacer.is_waiting
        assert not third.done()
        pacer.finish()
        assert await third
        assert not pacer.is_waiting
        assert pacer.waited_s > 0
        assert pacer.num_in_flight == 2

    asyncio.run(run())


def test_ready_groups_hold_back_new_ones_until_the_learner_takes_them() -> None:
    async def run() -> None:
        queue = Queue()
        queue.ready = 3
        pacer = Pacer(queue.count, max_ready_groups=3, poll_s=0.001)
        waiting = asyncio.create_task(pacer.admit(asyncio.Event()))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        queue.ready = 2
        assert await waiting

    asyncio.run(run())


def test_another_limit_holds_while_the_store_is_away() -> None:
    async def run() -> None:
        queue = Queue()
        queue.ready, is_away = 3, True
        pacer = Pacer(
            queue.count,
            max_ready_groups=3,
            max_away_groups=5,
            is_store_away=lambda: is_away,
            poll_s=0.001,
        )
        stop = asyncio.Event()
        assert await pacer.admit(stop)
        assert await pacer.admit(stop)
        third = asyncio.create_task(pacer.admit(stop))
        await asyncio.sleep(0.02)
        assert not third.done()
        pacer.finish()
        pacer.finish()
        assert await third
        pacer.finish()
        is_away = False
        fourth = asyncio.create_task(pacer.admit(stop))
        await asyncio.sleep(0.02)
        assert not fourth.done()
        queue.ready = 2
        assert await fourth

    asyncio.run(run())


def test_a_stop_ends_all_who_wait() -> None:
    async def run() -> None:
        queue = Queue()
        queue.ready = 3
        pacer = Pacer(queue.count, max_ready_groups=3, poll_s=60)
        stop = asyncio.Event()
        waiting = [asyncio.create_task(pacer.admit(stop)) for _ in range(3)]
        await asyncio.sleep(0)
        stop.set()
        assert await asyncio.wait_for(asyncio.gather(*waiting), 5) == [False] * 3
        assert pacer.num_in_flight == 0

    asyncio.run(run())


def test_without_a_limit_everything_is_admitted() -> None:
    async def run() -> None:
        queue = Queue()
        queue.ready = 1000
        pacer = Pacer(queue.count, max_ready_groups=None)
        assert await pacer.admit(asyncio.Event())

    asyncio.run(run())


def test_the_pause_doubles_up_to_its_bound_and_starts_anew_after_a_success() -> None:
    backoff = Backoff(first_s=1.0, longest_s=5.0)
    assert [backoff.fail() for _ in range(5)] == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert backoff.num_failures == 5
    assert backoff.succeed()
    assert not backoff.succeed()
    assert backoff.fail() == 1.0
    assert max(backoff.fail() for _ in range(5000)) == 5.0


def test_a_sleep_ends_early_when_told_to_stop() -> None:
    async def run() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(0.01, stop.set)
        await asyncio.wait_for(sleep_unless(stop, 60), 5)
        await sleep_unless(asyncio.Event(), 0.001)

    asyncio.run(run())
