"""An engine's line to a remote expert: the engine's thread never waits for the network.

One daemon thread talks to an `ExpertClient`, in the order in which it was asked to. At most one
question is out at a time; the engine goes on decoding and looks from time to time whether the
answer is there. What goes wrong on the line comes back as an `ExpertUnavailable` value, not as an
exception in the middle of a decode step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import structlog

from mentor_serve.engines.advice import ExpertAnswers, ExpertClient, ExpertQueries, check_answers
from mentor_serve.errors import ExpertUnavailable

log = structlog.get_logger(__name__)

_NEWEST_WEIGHT = 0.2
"""Of the newest round trip in the moving average."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reply:
    outcome: ExpertAnswers | ExpertUnavailable
    elapsed_s: float


class ExpertLink:
    """A line to one expert. All methods are called from one thread and return at once.

    Only `poll` with a time-out waits. The thread starts with the first question; it ends when the
    link is closed or garbage collected, after the call that is then in progress.
    """

    def __init__(self, client: ExpertClient, *, vocab_size: int) -> None:
        self.num_calls = 0
        """Questions sent."""
        self.num_bytes = 0
        """Payload of questions and answers."""
        self.round_trip_s = 0.0
        """Moving average of how long an answer takes; 0 before the first one."""
        self._client = client
        self._vocab_size = vocab_size
        self._question: Future[_Reply] | None = None
        self._is_closed = False
        # Not a daemon thread: one that computes while the interpreter goes down aborts the process.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="expert-link")

    @property
    def is_busy(self) -> bool:
        """A question was sent whose answer `poll` has not handed over yet."""
        return self._question is not None

    def send(self, queries: ExpertQueries) -> None:
        """Ask.

        Raises:
            RuntimeError: the last answer was not polled yet, or the link is closed.
        """
        if self._question is not None:
            raise RuntimeError("expected one question at a time; poll the last answer first")
        if self._is_closed:
            raise RuntimeError("expected an open link to the expert; it is closed")
        self.num_calls += 1
        self.num_bytes += queries.num_bytes
        self._question = self._worker.submit(_ask, self._client, queries, self._vocab_size)

    def poll(self, timeout_s: float = 0.0) -> ExpertAnswers | ExpertUnavailable | None:
        """The answer to what was sent, or why there is none; None while neither is known.

        Waits for at most `timeout_s`, and not at all where nothing was sent.
        """
        if self._question is None:
            return None
        try:
            reply = self._question.result(timeout=timeout_s)
        except TimeoutError:
            return None
        self._question = None
        if isinstance(reply.outcome, ExpertAnswers):
            self.num_bytes += reply.outcome.num_bytes
            weight = _NEWEST_WEIGHT if self.round_trip_s else 1.0
            self.round_trip_s += weight * (reply.elapsed_s - self.round_trip_s)
        return reply.outcome

    def release(self, sequence_ids: Sequence[int]) -> None:
        """Let the expert forget sequences, after what was asked before; best effort."""
        # An expert that was never asked has nothing to forget.
        if self.num_calls and not self._is_closed and len(sequence_ids):
            ids = [int(sequence_id) for sequence_id in sequence_ids]
            self._worker.submit(_release, self._client, ids)

    def close(self) -> None:
        """End the thread once its call in progress returns; an answer still out is dropped."""
        self._is_closed = True
        self._question = None
        self._worker.shutdown(wait=False)


def _ask(client: ExpertClient, queries: ExpertQueries, vocab_size: int) -> _Reply:
    started = time.perf_counter()
    outcome = _outcome(client, queries, vocab_size)
    return _Reply(outcome=outcome, elapsed_s=time.perf_counter() - started)


def _outcome(
    client: ExpertClient, queries: ExpertQueries, vocab_size: int
) -> ExpertAnswers | ExpertUnavailable:
    try:
        answers = client.advise(queries)
        check_answers(queries, answers, vocab_size=vocab_size)
    except ExpertUnavailable as error:
        return error
    except Exception as error:
        unavailable = ExpertUnavailable(
            f"expected an answer or ExpertUnavailable, got {type(error).__name__}: {error}"
        )
        unavailable.__cause__ = error
        return unavailable
    return answers


def _release(client: ExpertClient, sequence_ids: list[int]) -> None:
    try:
        client.release(sequence_ids)
    except Exception as error:
        # An expert that is gone has nothing left to forget; one that is not evicts in time.
        log.debug("expert_release_failed", num_sequences=len(sequence_ids), error=repr(error))
