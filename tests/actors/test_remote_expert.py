"""RemoteExpert: time limits, retries and rest over a Serve handle that the test fakes."""

from __future__ import annotations

import time
from dataclasses import fields

import numpy as np
import pytest
import ray

from mentor_serve.actors import expert as module
from mentor_serve.actors.expert import RemoteExpert
from mentor_serve.engines.advice import ExpertAnswers, ExpertQueries
from mentor_serve.errors import ExpertUnavailable, InvalidRequest


class FakeResponse:
    def __init__(self, outcome):
        self._outcome = outcome
        self.is_cancelled = False

    def result(self, *, timeout_s):
        if isinstance(self._outcome, TimeoutError):
            time.sleep(timeout_s)
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome

    def cancel(self):
        self.is_cancelled = True


class FakeMethod:
    """A handle's method that gives the outcomes in turn, the last one again and again."""

    def __init__(self, *outcomes):
        self._outcomes = list(outcomes)
        self.calls = []
        self.responses = []

    def remote(self, argument):
        self.calls.append(argument)
        outcome = self._outcomes.pop(0) if len(self._outcomes) > 1 else self._outcomes[0]
        self.responses.append(FakeResponse(outcome))
        return self.responses[-1]


class FakeHandle:
    def __init__(self, *outcomes):
        self.advise = FakeMethod(*outcomes)
        self.release = FakeMethod(None)


@pytest.fixture
def queries():
    one = np.ones(1, np.int32)
    return ExpertQueries(
        sequence_ids=np.ones(1, np.int64),
        starts=np.zeros(1, np.int32),
        num_tokens=2 * one,
        token_ids=np.array([4, 5], np.int32),
        num_positions=one,
        positions=one,
        temperatures=np.ones(1, np.float32),
        seeds=np.zeros(1, np.int64),
        first_sample=np.zeros(1, np.int32),
        num_samples=one,
    )


@pytest.fixture
def answers(queries):
    """As Ray hands them over: read-only."""
    made = ExpertAnswers.blank(queries)
    for item in fields(made):
        getattr(made, item.name).setflags(write=False)
    return made


def test_answers_can_be_written(queries, answers):
    got = RemoteExpert(FakeHandle(answers), timeout_s=30.0).advise(queries)
    for item in fields(got):
        array = getattr(got, item.name)
        assert array.flags.writeable
        np.testing.assert_array_equal(array, getattr(answers, item.name))


def test_a_replica_that_died_is_asked_again(queries, answers, monkeypatch):
    monkeypatch.setattr(module, "ATTEMPT_INTERVAL_S", 0.01)
    handle = FakeHandle(ray.exceptions.ActorDiedError(), answers)
    assert isinstance(RemoteExpert(handle, timeout_s=30.0).advise(queries), ExpertAnswers)
    assert handle.advise.calls == [queries, queries]


def test_a_silent_expert_is_given_up_and_left_alone_for_a_while(queries, answers, monkeypatch):
    handle = FakeHandle(TimeoutError(), answers)
    remote = RemoteExpert(handle, timeout_s=0.05)
    with pytest.raises(ExpertUnavailable, match=r"within 0\.05 s, but: TimeoutError"):
        remote.advise(queries)
    assert handle.advise.responses[0].is_cancelled
    with pytest.raises(ExpertUnavailable, match="a moment ago"):
        remote.advise(queries)
    assert len(handle.advise.calls) == 1
    now = time.monotonic()
    monkeypatch.setattr(module.time, "monotonic", lambda: now + module.RETRY_INTERVAL_S + 1)
    assert isinstance(remote.advise(queries), ExpertAnswers)


def test_a_question_that_has_no_answer_is_not_asked_again(queries):
    handle = FakeHandle(InvalidRequest("expert queries: too long"))
    remote = RemoteExpert(handle, timeout_s=30.0)
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="too long"):
            remote.advise(queries)
    assert len(handle.advise.calls) == 2


def test_releases_carry_plain_integers():
    handle = FakeHandle(None)
    RemoteExpert(handle, timeout_s=1.0).release([np.int64(3), 4])
    assert handle.release.calls == [[3, 4]]
    assert all(type(sequence_id) is int for sequence_id in handle.release.calls[0])
