"""Which versions of a running service are evaluated, and what is left of an evaluation cut off."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mentor_serve.actors.evaluation import evaluation_plan
from mentor_serve.actors.evaluation_loop import EvaluationLoop, evaluate_version
from mentor_serve.errors import StoreError
from mentor_serve.evaluation import SuiteReport
from mentor_serve.evaluation.measures import Measure
from mentor_serve.evaluation.suite import EvaluationReport
from mentor_serve.models.loading import load_model, load_tokenizer
from mentor_serve.models.reference import reference_path
from mentor_serve.settings import Settings, load_settings
from mentor_serve.store import TrajectoryStore, VersionRecord, upgrade
from mentor_serve.weights import SnapshotLabel, write_snapshot
from tests.imports import loaded_by

SUITE = "reasoning_gym:embedded"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    overrides = {
        "home": str(tmp_path),
        "learner.eval_every": 10,
        "evaluation.num_problems": 3,
        "evaluation.num_samples": 2,
    }
    found = load_settings([], overrides)
    upgrade(found.database_url)
    return found


@pytest.fixture
def store(settings: Settings) -> Iterator[TrajectoryStore]:
    with TrajectoryStore(settings.database_url) as opened:
        yield opened


@pytest.fixture
def run_id(store: TrajectoryStore) -> str:
    return store.open_run("default", {})


@pytest.fixture
def go_live(store: TrajectoryStore, run_id: str) -> Callable[[int], None]:
    """Adds all versions up to a number and makes the last one live."""

    def call(version: int) -> None:
        newest = store.latest_version(run_id)
        for number in range(0 if newest is None else newest.version + 1, version + 1):
            record = VersionRecord(version=number, step=number, alpha=1.0, gamma=1.0)
            store.add_version(run_id, record)
        store.set_live(run_id, version)

    return call


class Evaluations:
    """Stands for the minutes of an evaluation; notes which versions were asked for."""

    def __init__(self) -> None:
        self.versions: list[int] = []
        self.failures = 0
        self.meanwhile: Callable[[], None] | None = None

    async def __call__(self, settings: Settings, version: VersionRecord) -> SuiteReport:
        self.versions.append(version.version)
        if self.meanwhile is not None:
            self.meanwhile()
        if self.failures:
            self.failures -= 1
            raise RuntimeError("out of memory")
        measure = Measure(metric="avg_at_k", k=2, value=0.5, low=0.4, high=0.6)
        report = EvaluationReport(
            num_problems=3,
            num_samples=2,
            temperature=0.6,
            measures=(measure,),
            num_unjudged=0,
            accuracy_by_problem=[0.5] * 3,
            num_correct_by_problem=[1] * 3,
        )
        return SuiteReport(plan=evaluation_plan(settings), greedy=None, sampled=report)


@pytest.fixture
def evaluations() -> Evaluations:
    return Evaluations()


@pytest.fixture
def loop(
    settings: Settings, store: TrajectoryStore, run_id: str, evaluations: Evaluations
) -> EvaluationLoop:
    return EvaluationLoop(settings, store, run_id, evaluate=evaluations, retry_interval_s=0.01)


def skipped(store: TrajectoryStore, run_id: str) -> list[str]:
    events = store.recent_events(run_id)
    return [event.message for event in events if event.kind == "evaluation_skipped"]


def stored_version(store: TrajectoryStore, run_id: str) -> int | None:
    return store.newest_evaluated_version(run_id, suite=SUITE)


NEVER = threading.Event()


def test_multiples_are_evaluated_once(
    loop: EvaluationLoop,
    evaluations: Evaluations,
    go_live: Callable[[int], None],
    store: TrajectoryStore,
    run_id: str,
) -> None:
    assert loop.run_once(NEVER) is False  # no version is live yet
    for version in range(0, 25):
        go_live(version)
        loop.run_once(NEVER)
    assert evaluations.versions == [0, 10, 20]
    assert stored_version(store, run_id) == 20
    assert loop.status.last_version == 20
    assert skipped(store, run_id) == []


def test_an_evaluator_that_fell_behind_takes_the_newest_and_says_so(
    loop: EvaluationLoop,
    evaluations: Evaluations,
    go_live: Callable[[int], None],
    store: TrajectoryStore,
    run_id: str,
) -> None:
    go_live(0)
    evaluations.meanwhile = lambda: go_live(47) if len(evaluations.versions) == 1 else None
    assert loop.run_once(NEVER)
    assert loop.run_once(NEVER)
    assert evaluations.versions == [0, 40]
    (message,) = skipped(store, run_id)
    assert message.endswith("10, 20, 30")


def test_a_restarted_evaluator_goes_on_where_the_store_says(
    settings: Settings,
    loop: EvaluationLoop,
    evaluations: Evaluations,
    go_live: Callable[[int], None],
    store: TrajectoryStore,
    run_id: str,
) -> None:
    go_live(10)
    loop.run_once(NEVER)
    again = EvaluationLoop(settings, store, run_id, evaluate=evaluations)
    assert again.run_once(NEVER) is False
    go_live(31)
    later = EvaluationLoop(settings, store, run_id, evaluate=evaluations)
    assert later.run_once(NEVER)
    assert evaluations.versions == [10, 30]
    (message,) = skipped(store, run_id)
    assert message.endswith(" 20")


def test_what_was_before_the_first_evaluation_is_not_missed(
    loop: EvaluationLoop,
    evaluations: Evaluations,
    go_live: Callable[[int], None],
    store: TrajectoryStore,
    run_id: str,
) -> None:
    go_live(57)
    loop.run_once(NEVER)
    assert evaluations.versions == [50]
    assert skipped(store, run_id) == []


def test_a_failed_evaluation_is_tried_again_and_given_up(
    loop: EvaluationLoop,
    evaluations: Evaluations,
    go_live: Callable[[int], None],
    store: TrajectoryStore,
    run_id: str,
) -> None:
    go_live(10)
    evaluations.failures = 1
    assert loop.run_once(NEVER) is False
    assert loop.status.last_error == "RuntimeError: out of memory"
    assert loop.run_once(NEVER) is True
    go_live(20)
    evaluations.failures = 99
    for _ in range(6):
        loop.run_once(NEVER)
    assert evaluations.versions == [10, 10, 20, 20, 20]
    (message,) = skipped(store, run_id)
    assert message == "version 20: 3 evaluations failed: RuntimeError: out of memory"
    evaluations.failures = 0
    go_live(30)
    assert loop.run_once(NEVER) is True
    assert stored_version(store, run_id) == 30


def test_a_version_that_is_not_kept_is_skipped(
    settings: Settings,
    go_live: Callable[[int], None],
    store: TrajectoryStore,
    run_id: str,
) -> None:
    go_live(10)
    real = EvaluationLoop(settings, store, run_id, evaluate=evaluate_version)
    assert real.run_once(NEVER) is False
    (message,) = skipped(store, run_id)
    assert message.startswith("version 10 was not evaluated: expected")
    assert real.run_once(NEVER) is False
    assert len(skipped(store, run_id)) == 1


def test_a_stop_cuts_the_evaluation_off_and_stores_nothing(
    settings: Settings,
    go_live: Callable[[int], None],
    store: TrajectoryStore,
    run_id: str,
    evaluations: Evaluations,
) -> None:
    began, ended = threading.Event(), threading.Event()

    async def endless(settings: Settings, version: VersionRecord) -> SuiteReport:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError("unreachable")

    go_live(10)
    stop = threading.Event()
    endless_loop = EvaluationLoop(settings, store, run_id, evaluate=endless)
    thread = threading.Thread(target=endless_loop.run, args=(stop,))
    thread.start()
    assert began.wait(20)
    assert endless_loop.status.running_version == 10
    stop.set()
    thread.join(20)
    assert not thread.is_alive()
    assert ended.is_set()
    assert stored_version(store, run_id) is None
    # The next evaluator does it again.
    again = EvaluationLoop(settings, store, run_id, evaluate=evaluations)
    assert again.run_once(NEVER)
    assert evaluations.versions == [10]


def test_the_loop_outlives_a_store_that_does_not_answer(
    loop: EvaluationLoop,
    evaluations: Evaluations,
    go_live: Callable[[int], None],
    store: TrajectoryStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_live(0)
    real = store.live_version
    num_asked = 0

    def live_version(run_id: str) -> VersionRecord | None:
        nonlocal num_asked
        num_asked += 1
        if num_asked < 3:
            raise StoreError("the database is locked")
        return real(run_id)

    monkeypatch.setattr(store, "live_version", live_version)
    stop = threading.Event()
    evaluations.meanwhile = stop.set
    thread = threading.Thread(target=loop.run, args=(stop,))
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert evaluations.versions == [0]


def test_numbers_are_of_the_snapshot_and_of_no_other_weights(
    settings: Settings, go_live: Callable[[int], None], store: TrajectoryStore, run_id: str
) -> None:
    """Version 10 has the expert's weights, which solve what those of `policy.model` do not."""
    path = reference_path("expert")
    model = load_model(path)
    write_snapshot(
        settings.weights_dir,
        label=SnapshotLabel(version=10, step=10, alpha=1.0, gamma=1.0),
        model=model,
        state_dict=model.state_dict(),
        tokenizer=load_tokenizer(path),
    )
    go_live(12)
    assert EvaluationLoop(settings, store, run_id).run_once(NEVER)
    record = store.latest_evaluation(run_id)
    assert record is not None
    assert (record.policy_version, record.suite, record.num_problems) == (10, SUITE, 3)
    values = {(measure.metric, measure.k): measure.value for measure in record.measures}
    assert values["greedy_pass_at_k", 1] == 1.0


def test_importing_the_actor_costs_no_torch() -> None:
    """The collectors import it to find the actor."""
    assert "torch" not in loaded_by("import mentor_serve.actors.evaluator")
