"""ExpertLink: never in the engine's way, and what goes wrong comes back as a value."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from advice_samples import ask, ask_all

from mentor_serve.engines.advice import ExpertAnswers
from mentor_serve.engines.expert_link import ExpertLink
from mentor_serve.errors import ExpertUnavailable

TOKENS = [3, 4, 5, 6, 7, 8]
PATIENCE_S = 30.0
"""Far beyond what anything here takes, so that a busy machine fails no test."""


def answers_to(queries):
    blank = ExpertAnswers.blank(queries)
    return replace(
        blank,
        proposed_logprobs=np.full_like(blank.proposed_logprobs, -1.0),
        sample_logprobs=np.full_like(blank.sample_logprobs, -2.0),
    )


class GatedClient:
    """Answers (or raises `problem`) only once the test opens `gate`."""

    def __init__(self, reply=answers_to, problem=None):
        self.gate = threading.Event()
        self.events = []
        self._reply = reply
        self._problem = problem

    def advise(self, queries):
        assert self.gate.wait(PATIENCE_S)
        self.events.append(("advise", queries.sequence_ids.tolist()))
        if self._problem is not None:
            raise self._problem
        return self._reply(queries)

    def release(self, sequence_ids):
        self.events.append(("release", list(sequence_ids)))
        if 13 in sequence_ids:
            raise ConnectionError("gone")


def open_client(**options):
    client = GatedClient(**options)
    client.gate.set()
    return client


@pytest.fixture
def link_to():
    """Links that are closed, and whose threads have ended, when the test does."""
    links = []

    def make(client):
        links.append(ExpertLink(client, vocab_size=32))
        return links[-1]

    yield make
    for link in links:
        link.close()
    assert_no_thread()


def assert_no_thread():
    deadline = time.monotonic() + PATIENCE_S
    while any(thread.name.startswith("expert-link") for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "expected the link's thread to end"
        time.sleep(0.01)


def test_nothing_waits_for_a_slow_expert(link_to):
    client = GatedClient()
    link = link_to(client)
    began = time.perf_counter()
    link.send(ask(1, TOKENS, [3]))
    assert link.is_busy
    assert link.poll() is None
    link.release([1])
    with pytest.raises(RuntimeError, match="one question at a time"):
        link.send(ask(2, TOKENS, [3]))
    assert link.poll(0.05) is None
    # The expert would have answered after 30 s.
    assert time.perf_counter() - began < PATIENCE_S / 2
    client.gate.set()
    assert isinstance(link.poll(PATIENCE_S), ExpertAnswers)
    assert not link.is_busy
    assert link.poll(PATIENCE_S) is None


def test_counters(link_to):
    link = link_to(open_client())
    queries = ask_all([TOKENS, TOKENS[::-1]], [2, 4])
    for calls in (1, 2):
        link.send(queries)
        answers = link.poll(PATIENCE_S)
        assert link.num_calls == calls
        assert link.num_bytes == calls * (queries.num_bytes + answers.num_bytes)
    assert 0 < link.round_trip_s < PATIENCE_S


def test_the_round_trip_is_what_the_engine_waited(link_to):
    client = GatedClient()
    link = link_to(client)
    link.send(ask(1, TOKENS, [3]))
    time.sleep(0.05)
    client.gate.set()
    link.poll(PATIENCE_S)
    assert 0.05 <= link.round_trip_s < PATIENCE_S


@pytest.mark.parametrize(
    "problem", [ExpertUnavailable("expected an answer within 5 s"), ValueError("odd"), OSError(5)]
)
def test_a_failed_call_comes_back_as_a_value(link_to, problem):
    link = link_to(open_client(problem=problem))
    link.send(ask(1, TOKENS, [3]))
    outcome = link.poll(PATIENCE_S)
    assert isinstance(outcome, ExpertUnavailable)
    assert outcome is problem or outcome.__cause__ is problem
    assert not link.is_busy
    assert link.round_trip_s == 0
    # The line itself still works.
    link.send(ask(1, TOKENS, [3]))
    assert isinstance(link.poll(PATIENCE_S), ExpertUnavailable)


def _changed(**arrays):
    return lambda queries: replace(answers_to(queries), **arrays)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (lambda queries: None, "expected ExpertAnswers, got NoneType"),
        (_changed(proposed_logprobs=np.zeros(3, np.float32)), r"shape \(1,\), got \(3,\)"),
        (_changed(proposed_logprobs=[-1.0]), r"shape \(1,\), got list"),
        (_changed(proposed_logprobs=np.zeros(1, np.float64)), "expected float32, got float64"),
        (_changed(proposed_logprobs=np.full(1, np.nan, np.float32)), "got NaN or above 0"),
        (_changed(proposed_logprobs=np.full(1, 0.1, np.float32)), "got NaN or above 0"),
        (_changed(sample_token_ids=np.full(8, 32, np.int32)), "0 to 31, got 32 to 32"),
        (_changed(sample_token_ids=np.full(8, -1, np.int32)), "0 to 31, got -1 to -1"),
        (_changed(sample_logprobs=np.full(8, -np.inf, np.float32)), "finite"),
        (_changed(sample_logprobs=np.full(8, np.nan, np.float32)), "finite"),
        (_changed(missing=np.ones(1, np.bool_)), "sent whole"),
    ],
)
def test_a_garbled_answer_counts_as_none(link_to, reply, message):
    link = link_to(open_client(reply=reply))
    link.send(ask(1, TOKENS, [3]))
    outcome = link.poll(PATIENCE_S)
    assert isinstance(outcome, ExpertUnavailable)
    with pytest.raises(ExpertUnavailable, match=message):
        raise outcome


def test_missing_sequences_are_an_answer(link_to):
    """What is not computed may hold NaN where it is marked missing, and nowhere else."""
    nothing = ExpertAnswers.blank(ask_all([TOKENS, TOKENS], [3], starts=[2, 0]))
    first = replace(answers_to(ask_all([TOKENS, TOKENS], [3])), missing=np.array([True, False]))
    first.proposed_logprobs[0] = first.sample_logprobs[:8] = np.nan
    link = link_to(open_client(reply=lambda queries: first if queries.call == 1 else nothing))
    link.send(ask_all([TOKENS, TOKENS], [3], starts=[2, 0], call=1))
    assert link.poll(PATIENCE_S) is first
    link.send(ask_all([TOKENS, TOKENS], [3], starts=[2, 0], call=2))
    assert isinstance(link.poll(PATIENCE_S), ExpertUnavailable)


def test_releases_follow_the_questions_asked_before(link_to):
    client = GatedClient()
    link = link_to(client)
    link.send(ask(1, TOKENS, [3]))
    link.release([np.int64(1), 2])
    link.release([])
    link.release([13])
    client.gate.set()
    assert isinstance(link.poll(PATIENCE_S), ExpertAnswers)
    link.send(ask(4, TOKENS, [3]))
    # A release that fails is nobody's problem.
    assert isinstance(link.poll(PATIENCE_S), ExpertAnswers)
    assert client.events == [
        ("advise", [1]),
        ("release", [1, 2]),
        ("release", [13]),
        ("advise", [4]),
    ]


def test_an_expert_that_was_never_asked_has_no_thread(link_to):
    client = open_client()
    link = link_to(client)
    link.release([1])
    assert_no_thread()
    assert client.events == []
    assert link.poll(PATIENCE_S) is None


def test_a_closed_link_ends_its_thread_and_refuses(link_to):
    client = GatedClient()
    link = link_to(client)
    link.send(ask(1, TOKENS, [3]))
    link.close()
    assert not link.is_busy
    assert link.poll(PATIENCE_S) is None
    link.release([1])
    with pytest.raises(RuntimeError, match="closed"):
        link.send(ask(1, TOKENS, [3]))
    link.close()
    client.gate.set()
    assert_no_thread()
    assert client.events == [("advise", [1])]


def test_a_forgotten_link_ends_its_thread():
    client = GatedClient()
    link = ExpertLink(client, vocab_size=32)
    link.send(ask(1, TOKENS, [3]))
    client.gate.set()
    assert isinstance(link.poll(PATIENCE_S), ExpertAnswers)
    assert any(thread.name.startswith("expert-link") for thread in threading.enumerate())
    del link
    gc.collect()
    assert_no_thread()


def test_a_process_ends_once_the_call_in_progress_returns():
    """A thread cut off in the middle of a computation would abort the process instead."""
    program = (
        "import sys, time\n"
        "sys.path.insert(0, 'tests/engines')\n"
        "from advice_samples import ask\n"
        "from mentor_serve.engines.expert_link import ExpertLink\n"
        "class Slow:\n"
        "    def advise(self, queries):\n"
        "        time.sleep(1.0)\n"
        "link = ExpertLink(Slow(), vocab_size=32)\n"
        "link.send(ask(1, [3, 4, 5, 6], [3]))\n"
        "assert link.poll(0.05) is None\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=PATIENCE_S * 4)
