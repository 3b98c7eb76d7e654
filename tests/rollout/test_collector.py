import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rollout_fakes import (
    RIGHT,
    WRONG,
    CountingSource,
    FakeSampler,
    FakeTokenizer,
    MemoryStore,
    make_rollout,
)

from mentor_serve.errors import (
    ConfigError,
    EngineError,
    InvalidRequest,
    StoreError,
    StoreUnavailable,
)
from mentor_serve.rollout.collector import Collector, CollectorConfig, GroupStore
from mentor_serve.rollout.prompts import PromptRenderer
from mentor_serve.rollout.verifiers import VerifierPool
from mentor_serve.store import TrajectoryStore, upgrade
from mentor_serve.store.prune import PrunePlan, prune
from mentor_serve.store.spool import Spool
from mentor_serve.types import Guidance, Rollout, RolloutRequest, StopReason, TrajectoryKind

FAST = {"first_backoff_s": 0.001, "longest_backoff_s": 0.01, "concurrent_groups": 2}


class Scene:
    """A collector over fakes, driven until a condition holds."""

    def __init__(
        self,
        *,
        store: GroupStore | None = None,
        run_id: str = "run",
        verifier: str = "sample_rewards:exact",
        respond: Callable[[RolloutRequest, int], Rollout] | None = None,
        spool: Spool | None = None,
        **config: Any,
    ) -> None:
        options = {"num_on_policy": 3, "num_mixed": 2} | FAST | config
        self.memory = MemoryStore()
        self.store = store or self.memory
        self.sampler = FakeSampler(respond or alternating)
        self.source = CountingSource()
        self.pool = VerifierPool(verifier, timeout_s=1.0)
        self.collector = Collector(
            sampler=self.sampler,
            source=self.source,
            renderer=PromptRenderer(FakeTokenizer()),  # type: ignore[arg-type]
            verifier_pool=self.pool,
            store=self.store,
            run_id=run_id,
            config=CollectorConfig(**options),
            spool=spool,
        )

    @property
    def counts(self) -> dict[str, int]:
        return self.collector.counters()

    def run_until(self, is_done: Callable[[], bool], *, limit_s: float = 20.0) -> None:
        async def run() -> None:
            stop = asyncio.Event()
            running = asyncio.create_task(self.collector.run(stop))
            deadline = time.monotonic() + limit_s
            while not is_done() and not running.done():
                assert time.monotonic() < deadline, f"still waiting, counters {self.counts}"
                await asyncio.sleep(0.005)
            stop.set()
            try:
                await asyncio.wait_for(running, limit_s)
            finally:
                await self.pool.close()

        asyncio.run(run())


def alternating(request: RolloutRequest, sample_index: int) -> Rollout:
    return make_rollout(text="2" if sample_index % 2 == 0 else "3")


def test_groups_are_scored_and_stored_with_what_they_were_sampled_under() -> None:
    scene = Scene()
    scene.run_until(lambda: scene.counts["groups_ready"] >= 3)
    group = scene.memory.groups[0]
    assert group.status == "ready"
    assert group.guidance == scene.sampler.current
    assert [(t.kind.value, t.sample_index) for t in group.trajectories] == [
        ("on_policy", 0),
        ("on_policy", 1),
        ("on_policy", 2),
        ("mixed", 0),
        ("mixed", 1),
    ]
    rewards = [t.score.reward for t in group.trajectories if t.score is not None]
    assert rewards == [1.0, 0.0, 1.0, 1.0, 0.0]
    prompt = [ord(character) for character in f"{group.task.prompt}\n"]
    assert list(group.trajectories[0].prompt_token_ids) == prompt
    assert scene.counts["trajectories"] == 5 * len(scene.memory.groups)
    assert scene.counts["tokens"] == 15 * len(scene.memory.groups)


def test_every_group_gets_its_own_task_and_seeds() -> None:
    scene = Scene(concurrent_groups=4)
    scene.run_until(lambda: scene.counts["groups_ready"] >= 8)
    prompts = [group.task.prompt for group in scene.memory.groups]
    assert len(set(prompts)) == len(prompts)
    seeds = {request.seed for requests in scene.sampler.asked for request in requests}
    assert len(seeds) == 2 * len(scene.sampler.asked)


def test_the_same_run_samples_the_same_task_under_the_same_seeds() -> None:
    def seeds(**config: Any) -> set[int]:
        scene = Scene(concurrent_groups=1, **config)
        scene.run_until(lambda: len(scene.sampler.asked) >= 2)
        return {request.seed for requests in scene.sampler.asked[:2] for request in requests}

    assert seeds() == seeds()
    assert not seeds() & seeds(seed=1)
    assert not seeds() & seeds(collector_index=1)


def test_without_guidance_no_mixed_rollouts_are_asked_for() -> None:
    scene = Scene()
    scene.sampler.current = Guidance(alpha=0.0)
    scene.run_until(lambda: scene.counts["groups_ready"] >= 1)
    assert {t.kind for t in scene.memory.groups[0].trajectories} == {TrajectoryKind.ON_POLICY}


def test_collection_waits_while_enough_groups_are_ready_and_goes_on_after() -> None:
    scene = Scene(max_ready_groups=3, concurrent_groups=4)

    def learner_took_some() -> bool:
        if scene.counts["is_waiting"] and len(scene.memory.groups) == 3:
            scene.memory.num_consumed = 2
        return len(scene.memory.groups) == 5

    scene.run_until(learner_took_some)
    assert len(scene.memory.groups) == 5
    assert scene.counts["in_flight"] == 0


def misbehaving(*texts: str) -> Callable[[RolloutRequest, int], Rollout]:
    return lambda request, index: make_rollout(text=texts[index] if not request.mixed else "fine")


def test_a_verifier_failure_fails_the_trajectory_and_not_the_group() -> None:
    scene = Scene(verifier="sample_rewards:misbehave", respond=misbehaving("fine", "raise", "fine"))
    scene.run_until(lambda: scene.counts["groups_ready"] >= 1)
    errors = [t.error for t in scene.memory.groups[0].trajectories]
    assert errors == [None, "KeyError: 'no such thing'", None, None, None]
    assert scene.memory.groups[0].trajectories[1].rollout is not None
    assert scene.counts["verifier_errors"] >= 1


def test_a_group_without_two_scored_on_policy_rollouts_is_failed() -> None:
    scene = Scene(verifier="sample_rewards:misbehave", respond=misbehaving("fine", "sleep", "die"))
    scene.run_until(lambda: scene.counts["groups_failed"] >= 1)
    group = scene.memory.groups[0]
    assert group.status == "failed"
    assert group.error is not None
    assert "got 1: ran out of time" in group.error
    assert [t.score is None for t in group.trajectories] == [False, True, True, False, False]


def test_rollouts_that_broke_off_are_stored_as_failed() -> None:
    scene = Scene(
        respond=lambda request, index: make_rollout(
            stop_reason=StopReason.CANCELLED if index == 0 else StopReason.EOS, text="2"
        )
    )
    scene.run_until(lambda: scene.counts["groups_ready"] >= 1)
    errors = [t.error for t in scene.memory.groups[0].trajectories]
    assert errors == ["the rollout broke off: cancelled", None, None, errors[0], None]


@pytest.mark.parametrize(
    "error", [EngineError("out of memory"), InvalidRequest("too long"), RuntimeError("actor died")]
)
def test_an_engine_failure_is_a_failed_group_an_event_and_a_pause(error: Exception) -> None:
    scene = Scene(concurrent_groups=1)
    scene.sampler.failures = [error, error]
    scene.run_until(lambda: scene.counts["groups_ready"] >= 1)
    failed = [group for group in scene.memory.groups if group.status == "failed"]
    assert [group.error for group in failed] == [f"{type(error).__name__}: {error}"] * 2
    assert failed[0].trajectories == []
    assert scene.memory.events == [("engine_failed", "warning"), ("engine_back", "info")]
    assert scene.counts["engine_errors"] == 2


def test_too_few_rollouts_are_an_engine_failure() -> None:
    scene = Scene(concurrent_groups=1)
    original = scene.sampler.sample

    async def sample(requests: list[RolloutRequest]) -> list[list[Rollout]]:
        answered = await original(requests)
        return answered if len(scene.sampler.asked) > 1 else answered[:1]

    scene.sampler.sample = sample  # type: ignore[method-assign]
    scene.run_until(lambda: scene.counts["groups_ready"] >= 1)
    assert "expected [3, 2] rollouts" in str(scene.memory.groups[0].error)


def test_an_engine_that_hangs_is_a_failed_group() -> None:
    scene = Scene(sample_timeout_s=0.05)
    scene.sampler.delay_s = 60
    scene.run_until(lambda: scene.counts["groups_failed"] >= 1)
    assert "no answer within 0.05 s" in str(scene.memory.groups[0].error)


def test_an_unreachable_policy_ends_neither_the_loop_nor_the_tasks() -> None:
    scene = Scene(concurrent_groups=1)
    original = scene.sampler.guidance
    calls = []

    async def guidance() -> Guidance:
        calls.append(1)
        if len(calls) < 4:
            raise ConnectionError("no replica")
        return await original()

    scene.sampler.guidance = guidance  # type: ignore[method-assign]
    scene.run_until(lambda: scene.counts["groups_ready"] >= 1)
    assert scene.memory.groups[0].task.prompt == "problem 0"
    assert scene.counts["engine_errors"] == 3


def test_a_source_that_raises_does_not_end_the_loop() -> None:
    scene = Scene(concurrent_groups=1)
    original = scene.source.next_task

    def next_task() -> Any:
        task = original()
        if scene.source.position == 1:
            raise ZeroDivisionError("generator")
        return task

    scene.source.next_task = next_task  # type: ignore[method-assign]
    scene.run_until(lambda: scene.counts["groups_ready"] >= 1)
    assert scene.memory.groups[0].task.prompt == "problem 1"


def test_a_group_is_kept_until_the_store_takes_it() -> None:
    scene = Scene(concurrent_groups=1)
    scene.memory.failures = [StoreUnavailable("database is locked")] * 7
    scene.run_until(lambda: scene.counts["groups_ready"] >= 2)
    assert scene.memory.groups[0].task.prompt == "problem 0"
    assert scene.counts["store_errors"] == 7
    assert scene.counts["groups_dropped"] == 0


def test_a_group_that_alone_cannot_be_stored_is_given_up() -> None:
    scene = Scene()
    scene.memory.rejects = lambda group: group.task.prompt == "problem 0"
    scene.run_until(lambda: scene.counts["groups_dropped"] >= 1)
    assert ("group_dropped", "error") in scene.memory.events
    assert all(group.task.prompt != "problem 0" for group in scene.memory.groups)


def test_a_failing_count_of_ready_groups_is_tried_again() -> None:
    scene = Scene(max_ready_groups=5)
    original = scene.memory.count_groups
    calls = []

    def count_groups(run_id: str) -> dict[str, int]:
        calls.append(1)
        if len(calls) in (1, 3):  # when it resumes, and before a group
            raise StoreError("no connection")
        return original(run_id)

    scene.memory.count_groups = count_groups  # type: ignore[method-assign]
    scene.run_until(lambda: scene.counts["groups_ready"] >= 2)
    assert scene.counts["store_errors"] == 2


class StoreThatGoesAway:
    """A real store and a switch."""

    def __init__(self, store: TrajectoryStore) -> None:
        self._store = store
        self.is_away = False

    def __getattr__(self, name: str) -> Any:
        if self.is_away and name != "group_rows":
            raise StoreUnavailable("the server closed the connection")
        return getattr(self._store, name)


@pytest.fixture
def real_store(tmp_path: Path) -> Iterator[tuple[TrajectoryStore, str]]:
    url = f"sqlite:///{tmp_path / 'mentor.db'}"
    upgrade(url)
    with TrajectoryStore(url) as store:
        yield store, store.open_run("run", {})


def test_collection_goes_on_while_the_store_is_away_but_not_for_ever(
    real_store: tuple[TrajectoryStore, str], tmp_path: Path
) -> None:
    store, run_id = real_store
    switch = StoreThatGoesAway(store)
    spool = Spool(tmp_path / "spool", max_bytes=10**8)
    scene = Scene(
        store=switch,  # type: ignore[arg-type]
        run_id=run_id,
        spool=spool,
        max_ready_groups=3,
        max_away_groups=7,
    )

    def seven_at_hand() -> bool:
        ready = store.count_groups(run_id)["ready"]
        if ready == 3 and not switch.is_away:
            switch.is_away = True
        return ready + spool.num_groups == 7 and scene.counts["is_waiting"] == 1

    scene.run_until(seven_at_hand)
    assert store.count_groups(run_id)["ready"] == 3
    assert (spool.num_groups, scene.counts["spool_groups"]) == (4, 4)
    assert scene.counts["groups_spooled"] == 4
    assert scene.counts["is_store_away"] == 1
    assert scene.counts["groups_ready"] == 7
    assert scene.counts["groups_dropped"] == 0
    assert scene.counts["store_errors"] > 0

    # The next process stores what this one left, and goes on behind it.
    switch.is_away = False
    after = Scene(
        store=store,
        run_id=run_id,
        spool=Spool(spool.directory, max_bytes=10**8),
        max_ready_groups=9,
    )
    after.run_until(lambda: store.count_groups(run_id)["ready"] == 9)
    assert len(store.list_tasks(run_id)) == 9
    assert after.counts["spool_groups"] == 0


def test_a_lost_expert_is_recorded_once_and_so_is_its_return() -> None:
    scene = Scene(concurrent_groups=1)
    scene.sampler.respond = lambda request, index: make_rollout(
        text="2", expert_lost=request.mixed and len(scene.sampler.asked) <= 2
    )
    scene.run_until(lambda: len(scene.memory.events) >= 2)
    assert scene.memory.events == [("expert_lost", "warning"), ("expert_back", "info")]
    assert scene.counts["expert_lost"] == 4
    assert all(group.status == "ready" for group in scene.memory.groups)


def test_a_stop_finishes_the_groups_under_way() -> None:
    scene = Scene(concurrent_groups=3)
    scene.sampler.delay_s = 0.3
    scene.run_until(lambda: len(scene.sampler.asked) == 3)
    assert len(scene.memory.groups) == 3
    assert scene.counts["groups_dropped"] == 0


def test_a_stop_drops_what_does_not_end_within_the_bound() -> None:
    scene = Scene(concurrent_groups=3, stop_timeout_s=0.1)
    scene.sampler.delay_s = 60
    started = time.monotonic()
    scene.run_until(lambda: len(scene.sampler.asked) == 3)
    assert time.monotonic() - started < 15
    assert scene.memory.groups == []
    assert scene.counts["groups_dropped"] == 3
    assert scene.counts["in_flight"] == 0


def test_a_verifier_that_cannot_be_imported_ends_the_loop_at_once() -> None:
    scene = Scene(verifier="no_such_module:function")
    with pytest.raises(ConfigError, match="no_such_module"):
        scene.run_until(lambda: False)


def test_a_new_collector_goes_on_behind_the_groups_that_the_run_has() -> None:
    scene = Scene(num_collectors=2, concurrent_groups=2)
    scene.memory.num_ready, scene.memory.num_consumed = 0, 9
    scene.run_until(lambda: scene.counts["groups_ready"] >= 1)
    assert scene.memory.groups[0].task.prompt in {"problem 7", "problem 8"}


def test_a_new_collector_goes_on_behind_the_groups_that_were_pruned() -> None:
    scene = Scene(num_collectors=2, concurrent_groups=2)
    scene.memory.num_ready, scene.memory.num_consumed, scene.memory.num_pruned = 0, 2, 7
    scene.run_until(lambda: scene.counts["groups_ready"] >= 1)
    assert scene.memory.groups[0].task.prompt in {"problem 7", "problem 8"}


@pytest.mark.parametrize(
    "config",
    [
        {"num_on_policy": 1},
        {"num_mixed": -1},
        {"concurrent_groups": 0},
        {"max_ready_groups": 0},
    ],
)
def test_a_wrong_configuration_is_refused(config: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        CollectorConfig(**config)


def test_groups_reach_a_real_database(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'mentor.db'}"
    upgrade(url)
    with TrajectoryStore(url) as store:
        run_id = store.open_run("run", {})
        scene = Scene(
            store=store,
            run_id=run_id,
            verifier="math",
            max_ready_groups=4,
            respond=lambda request, index: make_rollout(
                text=RIGHT if index == 0 else WRONG, replaced=request.mixed
            ),
        )
        scene.run_until(lambda: store.count_groups(run_id)["ready"] >= 4)
        assert store.count_groups(run_id)["ready"] == 4
        (group,) = store.lease_groups(run_id, num_groups=1, owner="test", lease_s=60)
        rewards = [t.reward for t in group.trajectories]
        assert rewards == pytest.approx([1.0, 0.1, 0.1, 1.0, 0.1])
        assert group.gamma == pytest.approx(0.8)


def test_tasks_of_pruned_groups_do_not_come_again(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'mentor.db'}"
    upgrade(url)
    with TrajectoryStore(url) as store:
        run_id = store.open_run("run", {})
        for _ in range(3):
            scene = Scene(store=store, run_id=run_id)
            scene.run_until(lambda scene=scene: scene.counts["groups_ready"] >= 3)
            store.mark_stale(run_id, min_policy_version=10**6)
            prune(url, PrunePlan(what="groups", keep_days=0, pause_s=0))
            assert sum(store.count_groups(run_id).values()) == 0
        # The same problem would be the same row.
        assert store.count_groups_ever(run_id) == len(store.list_tasks(run_id)) >= 9
