"""The learner actor without Ray: what it answers while the learner starts, runs and rolls back."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mentor_serve.actors.learner import LearnerActor
from mentor_serve.errors import WeightsError
from mentor_serve.learner import LearnerPhase, LearnerStatus
from mentor_serve.settings import load_settings

PATIENCE_S = 30.0


class FakeLearner:
    """Runs until it is stopped; a rollback calls `during_rollback` first."""

    def __init__(self) -> None:
        self.is_paused = False
        self.during_rollback: Callable[[], None] = lambda: None

    def start(self) -> None:
        pass

    def run(self, stop: threading.Event) -> None:
        stop.wait(PATIENCE_S)

    def close(self) -> None:
        pass

    def pause(self) -> None:
        self.is_paused = True

    def resume(self) -> None:
        self.is_paused = False

    def status(self) -> LearnerStatus:
        return LearnerStatus(phase=LearnerPhase.UPDATING, is_paused=self.is_paused, step=7)

    def rollback(self, version: int) -> str:
        assert self.is_paused, "expected the loop to let a rollback in"
        self.during_rollback()
        if version < 0:
            raise WeightsError("gone")
        return f"version {version}"


class Actor(LearnerActor):
    """Has a fake learner as soon as `may_build` is set."""

    def __init__(self, home: Path) -> None:
        self.fake = FakeLearner()
        self.may_build = threading.Event()
        self.is_built = threading.Event()
        super().__init__(load_settings().model_copy(update={"home": home}))

    def _build(self) -> Any:
        assert self.may_build.wait(PATIENCE_S)
        with self._lock:
            self._learner = self.fake  # type: ignore[assignment]
        self.is_built.set()
        return self.fake, self.fake


@pytest.fixture
def starting(tmp_path: Path) -> Iterator[Actor]:
    actor = Actor(tmp_path)
    yield actor
    actor.may_build.set()
    assert actor.stop(PATIENCE_S)


@pytest.fixture
def running(starting: Actor) -> Actor:
    starting.may_build.set()
    assert starting.is_built.wait(PATIENCE_S)
    return starting


def test_it_answers_while_the_learner_is_built(starting: Actor) -> None:
    assert starting.status() == {"phase": "starting", "is_paused": False, "fatal_error": None}
    starting.set_paused(True)
    assert starting.status()["is_paused"]
    with pytest.raises(WeightsError, match="it is starting; try again"):
        starting.rollback(3)


def test_its_status_names_nothing_of_the_learners_modules(running: Actor) -> None:
    status = running.status()
    assert (status["phase"], status["step"]) == ("updating", 7)
    assert b"mentor_serve" not in pickle.dumps(status)


@pytest.mark.parametrize("is_paused", [False, True])
def test_a_rollback_leaves_a_pause_as_it_was(running: Actor, is_paused: bool) -> None:
    running.set_paused(is_paused)
    assert running.rollback(3) == "version 3"
    assert running.fake.is_paused == is_paused
    with pytest.raises(WeightsError, match="gone"):
        running.rollback(-1)
    assert running.fake.is_paused == is_paused


@pytest.mark.parametrize("is_paused", [False, True])
def test_what_is_asked_for_during_a_rollback_counts(running: Actor, is_paused: bool) -> None:
    running.set_paused(not is_paused)
    running.fake.during_rollback = lambda: running.set_paused(is_paused)
    running.rollback(3)
    assert running.fake.is_paused == is_paused
