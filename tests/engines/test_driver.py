"""EngineDriver: many asyncio tasks on one engine thread."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from mentor_serve.engines import RolloutRequest, SamplingParams, TorchEngine
from mentor_serve.engines.driver import EngineDriver
from mentor_serve.errors import EngineError, InvalidRequest, WeightsError
from mentor_serve.types import StopReason


def request(seed=0, *, max_new_tokens=8, **options):
    sampling = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True)
    return RolloutRequest(prompt_token_ids=[3, 4, 5], seed=seed, sampling=sampling, **options)


class SlowEngine:
    """A TorchEngine whose steps wait for a permit, so that tests decide how far it gets."""

    def __init__(self, engine):
        self.inner = engine
        self.permits = threading.Semaphore(0)
        self.num_steps = 0
        self.failure = None

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def step(self):
        assert self.permits.acquire(timeout=30)
        if self.failure is not None:
            raise self.failure
        self.num_steps += 1
        return self.inner.step()


@pytest.fixture
def engine(tiny_pair):
    return TorchEngine(*tiny_pair, max_batch_size=8)


@pytest.fixture
def driver(engine):
    driver = EngineDriver(engine)
    yield driver
    driver.close()


@pytest.fixture
def slow(engine):
    slow = SlowEngine(engine)
    driver = EngineDriver(slow)
    yield slow, driver
    slow.permits.release(10_000)
    driver.close()


async def until(condition):
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the condition did not come true within 30 s")


def test_concurrent_callers_share_the_batch_and_get_their_own(driver, tiny_pair):
    wanted = [request(seed, num_samples=2, mixed=seed % 2 == 0, gamma=2.0) for seed in range(6)]

    async def run():
        return await asyncio.gather(*(driver.generate(asked) for asked in wanted))

    results = asyncio.run(run())
    expected = TorchEngine(*tiny_pair).generate(wanted)
    assert [[r.token_ids.tolist() for r in rollouts] for rollouts in results] == [
        [r.token_ids.tolist() for r in rollouts] for rollouts in expected
    ]
    assert driver.num_running == 0
    # 12 rollouts of 8 tokens on 8 slots: far fewer steps than one after another.
    assert driver.engine.stats.policy_steps < 6 * 8


def test_callers_may_live_in_different_event_loops(driver):
    results = []
    threads = [
        threading.Thread(
            target=lambda seed=seed: results.append(asyncio.run(driver.generate(request(seed))))
        )
        for seed in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert [rollouts[0].num_tokens for rollouts in results] == [8, 8, 8]


def test_a_stream_yields_every_token_as_it_comes(driver):
    async def run():
        return [output async for output in driver.stream(request(num_samples=2))]

    outputs = asyncio.run(run())
    for sample in (0, 1):
        mine = [output for output in outputs if output.sample_index == sample]
        tokens = [token for output in mine for token in output.new_token_ids]
        assert mine[-1].finished.token_ids.tolist() == tokens
        assert len(tokens) == 8


def test_closing_a_stream_cancels_its_request(slow):
    engine, driver = slow

    async def run():
        stream = driver.stream(request(max_new_tokens=200))
        engine.permits.release(2)
        first = await anext(stream)
        await stream.aclose()
        engine.permits.release(5)
        await until(lambda: driver.num_running == 0)
        return first

    assert asyncio.run(run()).num_tokens == 1
    assert engine.num_steps < 7


def test_cancelling_the_awaiting_task_cancels_the_request(slow):
    engine, driver = slow

    async def run():
        task = asyncio.create_task(driver.generate(request(max_new_tokens=200)))
        await until(lambda: driver.num_running == 1)
        engine.permits.release(2)
        await until(lambda: engine.num_steps >= 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        engine.permits.release(5)
        await until(lambda: driver.num_running == 0)

    asyncio.run(run())
    assert not engine.inner.has_unfinished()


def test_an_impossible_request_fails_alone(driver):
    async def run():
        good = asyncio.create_task(driver.generate(request()))
        with pytest.raises(InvalidRequest, match="num_samples"):
            await driver.generate(request(num_samples=0))
        with pytest.raises(InvalidRequest, match="0 to 31"):
            async for _ in driver.stream(RolloutRequest(prompt_token_ids=[99])):
                pass
        return await good

    assert asyncio.run(run())[0].num_tokens == 8
    assert driver.num_running == 0
    driver.check_health()


def test_weights_are_swapped_between_steps_of_a_running_request(slow, tiny_llama):
    engine, driver = slow

    async def run():
        stream = driver.stream(request(max_new_tokens=4))
        engine.permits.release(1)
        outputs = [await anext(stream)]
        swap = asyncio.create_task(
            driver.load_weights(tiny_llama(9).state_dict(), version=4, timeout_s=30)
        )
        await asyncio.sleep(0)
        engine.permits.release(10)
        outputs += [output async for output in stream]
        await swap
        return outputs[-1].finished

    versions = asyncio.run(run()).policy_versions.tolist()
    assert versions[0] == 0
    assert versions[-1] == 4
    assert versions == sorted(versions)


def test_weights_that_do_not_fit_leave_the_driver_working(driver):
    async def run():
        with pytest.raises(WeightsError, match="missing"):
            await driver.load_weights({}, version=1)
        return await driver.generate(request())

    assert asyncio.run(run())[0].policy_versions.tolist() == [0] * 8


def test_weights_that_are_not_taken_in_time_are_not_taken_at_all(slow, tiny_llama):
    engine, driver = slow

    async def run():
        task = asyncio.create_task(driver.generate(request(max_new_tokens=3)))
        await until(lambda: driver.engine.has_unfinished())
        await asyncio.sleep(0.05)
        with pytest.raises(WeightsError, match="version 4"):
            await driver.load_weights(tiny_llama(9).state_dict(), version=4, timeout_s=0.05)
        engine.permits.release(10)
        return await task

    assert asyncio.run(run())[0].policy_versions.tolist() == [0, 0, 0]
    assert engine.inner.policy_version == 0


def test_a_dead_engine_fails_every_caller_and_the_health_check(slow, tiny_llama):
    engine, driver = slow
    engine.failure = RuntimeError("out of memory")

    async def run():
        tasks = [asyncio.create_task(driver.generate(request(seed))) for seed in range(3)]
        await until(lambda: driver.num_running == 3)
        tasks.append(
            asyncio.create_task(driver.load_weights(tiny_llama(9).state_dict(), version=1))
        )
        await asyncio.sleep(0.05)
        engine.permits.release(1)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results[:3]:
            assert isinstance(result, EngineError)
            assert "out of memory" in str(result)
        with pytest.raises(EngineError, match="died"):
            await driver.generate(request())

    asyncio.run(run())
    with pytest.raises(EngineError, match="out of memory"):
        driver.check_health()
    assert isinstance(driver.error, RuntimeError)
    assert driver.num_running == 0


def test_a_broken_submission_kills_the_thread_but_strands_nobody(engine):
    def explode(_):
        raise RuntimeError("broken")

    engine.submit = explode
    driver = EngineDriver(engine)
    with pytest.raises(EngineError, match="broken"):
        asyncio.run(driver.generate(request()))
    driver.close()


def test_closing_drains_what_is_open_and_refuses_more(driver):
    async def run():
        task = asyncio.create_task(driver.generate(request(max_new_tokens=40)))
        await until(lambda: driver.num_running == 1)
        await asyncio.to_thread(driver.close, 30.0)
        with pytest.raises(EngineError, match="closed"):
            await driver.generate(request())
        return await task

    (rollout,) = asyncio.run(run())
    assert rollout.stop_reason is StopReason.LENGTH
    driver.check_health()


def test_closing_without_patience_returns_partial_rollouts(slow):
    engine, driver = slow

    async def run():
        task = asyncio.create_task(driver.generate(request(max_new_tokens=200)))
        await until(lambda: driver.num_running == 1)
        engine.permits.release(3)
        await until(lambda: engine.num_steps == 3)
        closing = asyncio.create_task(asyncio.to_thread(driver.close, 0.0))
        await asyncio.sleep(0.05)
        engine.permits.release(5)
        await closing
        return await task

    (rollout,) = asyncio.run(run())
    assert rollout.stop_reason is StopReason.CANCELLED
    assert 3 <= rollout.num_tokens < 10


def test_an_idle_driver_uses_no_time(driver):
    asyncio.run(driver.generate(request()))
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1
