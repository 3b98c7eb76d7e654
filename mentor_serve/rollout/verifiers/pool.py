"""Runs verifiers in processes of their own, with a time limit that holds.

Contract: `score_batch` gives one `Score` or one `VerifierError` for each response, in order, and
never raises for what a verifier did. A verifier that hangs has its process killed and replaced; one
that raises or dies fails that response alone. Worker processes import neither torch nor ray, read
their work from a pipe, and end with their parent. A pool belongs to the event loop that uses it
first. It does not sandbox: a verifier runs with the rights of the service.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, Final

from mentor_serve.errors import ConfigError, VerifierError
from mentor_serve.rollout.verifiers.base import VerifierSpec
from mentor_serve.types import Score, Task

_MODULE: Final = "mentor_serve.rollout.verifiers.worker"
_MAX_LINE_BYTES: Final = 1 << 20
_END_S: Final = 5.0

Item = tuple[Task, str]


@dataclasses.dataclass(slots=True)
class VerifierPoolStats:
    """Counters since the pool was built."""

    num_scored: int = 0
    num_errors: int = 0
    """Responses whose verifier raised, died or ran out of time."""
    num_workers_replaced: int = 0


class VerifierPool:
    """A fixed number of verifier processes; use as an async context manager or call `close`."""

    def __init__(
        self,
        verifier: str = "auto",
        *,
        num_workers: int = 1,
        timeout_s: float = 5.0,
        accuracy_weight: float = 0.9,
        format_weight: float = 0.1,
        start_timeout_s: float = 120.0,
        memory_limit_mib: int | None = 4096,
    ) -> None:
        """Describe the pool; processes start with `start` or the first batch.

        Args:
            verifier: see `VerifierSpec`, as for the two weights.
            num_workers: processes.
            timeout_s: limit of one judgement.
            accuracy_weight: weight of the accuracy in the reward.
            format_weight: weight of the format in the reward.
            start_timeout_s: how long a process may take to start, or to prepare a batch's tasks.
            memory_limit_mib: address space of one process; None sets no limit.

        Raises:
            ConfigError: a value out of range, or a verifier of no known form.
        """
        if num_workers < 1:
            raise ConfigError(f"reward.num_workers must be at least 1, got {num_workers}")
        spec = VerifierSpec(
            verifier=verifier,
            accuracy_weight=accuracy_weight,
            format_weight=format_weight,
            timeout_s=timeout_s,
        )
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._command = _command(spec, memory_limit_mib)
        self._workers = [_Worker(self._command) for _ in range(num_workers)]
        self._idle: asyncio.Queue[_Worker] | None = None
        self.stats = VerifierPoolStats()

    async def __aenter__(self) -> VerifierPool:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Start every process now, so that a wrong `module:function` shows at once.

        Raises:
            ConfigError: the verifier cannot be built.
            VerifierError: a process did not come up.
        """
        await asyncio.gather(*(w.ensure_started(self._start_timeout_s) for w in self._workers))

    async def close(self) -> None:
        """End every process; running judgements are dropped."""
        await asyncio.gather(*(worker.stop() for worker in self._workers))

    async def score_batch(self, items: Sequence[Item]) -> list[Score | VerifierError]:
        """Judge responses; the batch is split evenly over the processes that it needs.

        Raises:
            ConfigError: the verifier cannot be built.
        """
        if self._idle is None:
            self._idle = asyncio.Queue()
            for worker in self._workers:
                self._idle.put_nowait(worker)
        num_parts = min(len(self._workers), len(items)) or 1
        parts = [list(items[start::num_parts]) for start in range(num_parts)]
        judged = await asyncio.gather(*(self._score_part(part, self._idle) for part in parts))
        results: list[Any] = [None] * len(items)
        for start, outcomes in enumerate(judged):
            results[start::num_parts] = outcomes
        self.stats.num_scored += sum(isinstance(result, Score) for result in results)
        self.stats.num_errors += sum(isinstance(result, VerifierError) for result in results)
        return results

    async def _score_part(
        self, items: list[Item], idle: asyncio.Queue[_Worker]
    ) -> list[Score | VerifierError]:
        worker = await idle.get()
        try:
            outcomes: list[Score | VerifierError] = []
            while len(outcomes) < len(items):
                outcomes += await self._attempt(worker, items[len(outcomes) :])
            return outcomes
        except BaseException:
            # Cancelled half way: the process still owes answers, so it cannot be used again.
            await worker.stop()
            raise
        finally:
            idle.put_nowait(worker)

    async def _attempt(self, worker: _Worker, items: list[Item]) -> list[Score | VerifierError]:
        """Judge until the process fails; the last outcome then says how. Never empty."""
        try:
            batch = _encode(items, self._timeout_s)
        except (TypeError, ValueError) as error:
            reason = f"task metadata must be JSON-serialisable: {error}"
            return [VerifierError(reason) for _ in items]
        try:
            await worker.ensure_started(self._start_timeout_s)
            await worker.send(batch)
            await worker.receive(self._start_timeout_s, what="preparing the task")
        except VerifierError as error:
            await self._drop(worker)
            return [error for _ in items]
        outcomes: list[Score | VerifierError] = []
        try:
            for _ in items:
                reply = await worker.receive(self._timeout_s, what="judging the response")
                outcomes.append(_outcome(reply))
        except VerifierError as error:
            await self._drop(worker)
            outcomes.append(error)
        return outcomes

    async def _drop(self, worker: _Worker) -> None:
        self.stats.num_workers_replaced += 1
        await worker.stop()


class _Worker:
    """One process that is started again after it was stopped."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._process: asyncio.subprocess.Process | None = None

    async def ensure_started(self, timeout_s: float) -> None:
        if self._process is not None and self._process.returncode is None:
            return
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            # One response is little work: threads would only compete with the engine.
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_MAX_LINE_BYTES,
            env=environment,
            # Ctrl-C at the terminal is for the service, which then closes the pool.
            start_new_session=True,
        )
        try:
            reply = await self.receive(timeout_s, what="starting")
        except BaseException:
            await self.stop()
            raise
        if "fatal" in reply:
            await self.stop()
            raise ConfigError(reply["fatal"])

    async def send(self, batch: bytes) -> None:
        process = self._running()
        assert process.stdin is not None  # noqa: S101 - opened as a pipe above
        try:
            process.stdin.write(batch)
            await process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError) as error:
            raise VerifierError("the verifier's process died before it got the response") from error

    async def receive(self, timeout_s: float, *, what: str) -> dict[str, Any]:
        process = self._running()
        assert process.stdout is not None  # noqa: S101 - opened as a pipe above
        try:
            line = await asyncio.wait_for(process.stdout.readline(), timeout_s)
        except TimeoutError as error:
            raise VerifierError(f"ran out of time while {what}: limit {timeout_s:g} s") from error
        if not line.endswith(b"\n"):
            code = await process.wait()
            raise VerifierError(f"the verifier's process died while {what} (exit code {code})")
        reply: dict[str, Any] = json.loads(line)
        return reply

    async def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            # The whole session, so that what the verifier started goes too.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if process.stdin is not None:
            process.stdin.close()
        with contextlib.suppress(TimeoutError):
            # Reading to the end closes the pipe, which waiting alone would leave to the collector
            # of garbage.
            await asyncio.wait_for(process.communicate(), _END_S)

    def _running(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise VerifierError("the verifier's process is not running")
        return self._process


def _command(spec: VerifierSpec, memory_limit_mib: int | None) -> list[str]:
    limit = None if memory_limit_mib is None else memory_limit_mib * 2**20
    options = {"spec": dataclasses.asdict(spec), "memory_limit_bytes": limit}
    return [sys.executable, "-m", _MODULE, json.dumps(options)]


def _encode(items: Sequence[Item], limit_s: float) -> bytes:
    tasks: list[Task] = []
    indices: dict[int, int] = {}
    for task, _ in items:
        if id(task) not in indices:
            indices[id(task)] = len(tasks)
            tasks.append(task)
    batch = {
        "limit_s": limit_s,
        "tasks": [dataclasses.asdict(task) for task in tasks],
        "items": [[indices[id(task)], text] for task, text in items],
    }
    return (json.dumps(batch) + "\n").encode("ascii")


def _outcome(reply: dict[str, Any]) -> Score | VerifierError:
    return VerifierError(reply["error"]) if "error" in reply else Score(**reply)
