"""`EngineDriver`: one thread owns an engine; any number of asyncio tasks use it.

Requests of all tasks share the engine's continuous batch. Results go back to the caller's own
event loop, one wake-up a loop and decode step. While nothing runs, the thread sleeps on a
condition. Refuses to restart a dead engine: its callers get `EngineError` and a supervisor decides.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mentor_serve.engines.base import Engine, StepOutput
from mentor_serve.errors import EngineError, MentorError, WeightsError
from mentor_serve.types import Rollout, RolloutRequest

if TYPE_CHECKING:
    import torch

_Event = StepOutput | MentorError


@dataclass(slots=True, eq=False, kw_only=True)
class _Ticket:
    """One caller's request and where its results go."""

    request: RolloutRequest
    is_streamed: bool
    """Every output is wanted, not only the finished rollouts."""
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    events: asyncio.Queue[_Event] = field(default_factory=asyncio.Queue)
    num_open: int = 0
    """Samples that are not finished; the engine thread's own count."""
    request_id: int | None = None
    """None until the engine took the request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Command:
    """Work for the engine thread between two steps, and what to do if it never comes to that."""

    run: Callable[[], None]
    fail: Callable[[MentorError], None]


class EngineDriver:
    """Runs `engine` in a thread of its own, from construction until `close`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._wake = threading.Condition()
        self._commands: deque[_Command] = deque()
        self._open: set[_Ticket] = set()
        self._running: dict[int, _Ticket] = {}
        self._is_closing = False
        self._is_stopping = False
        self._has_ended = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="mentor-engine", daemon=True)
        self._thread.start()

    @property
    def engine(self) -> Engine:
        """The engine; read its counters, leave everything else to the driver."""
        return self._engine

    @property
    def error(self) -> BaseException | None:
        """What ended the engine thread, or None while it is well."""
        return self._error

    @property
    def num_running(self) -> int:
        """Requests that were handed in and are not finished."""
        return len(self._open)

    def check_health(self) -> None:
        """Return while the engine thread works.

        Raises:
            EngineError: it died; the cause is chained.
        """
        if self._error is not None:
            raise self._death()

    async def generate(self, request: RolloutRequest) -> list[Rollout]:
        """The request's rollouts, by sample index. Cancelling the task cancels the request.

        Raises:
            InvalidRequest: the engine could never serve it.
            EngineError: the engine thread died, or the driver is closed.
        """
        rollouts: dict[int, Rollout] = {}
        outputs = self._outputs(request, is_streamed=False)
        try:
            async for output in outputs:
                if output.finished is not None:
                    rollouts[output.sample_index] = output.finished
        finally:
            await outputs.aclose()
        return [rollouts[index] for index in sorted(rollouts)]

    def stream(self, request: RolloutRequest) -> AsyncGenerator[StepOutput, None]:
        """Every step's outputs of the request; closing the iterator cancels the request.

        Raises what `generate` raises, at the first item.
        """
        return self._outputs(request, is_streamed=True)

    async def load_weights(
        self, state_dict: Mapping[str, torch.Tensor], *, version: int, timeout_s: float = 60.0
    ) -> None:
        """Swap the policy's weights between two decode steps, and wait until that is done.

        Raises:
            WeightsError: the weights do not fit, or the engine did not get to them within
                `timeout_s`; in both cases the old ones stay.
            EngineError: the engine thread died, or the driver is closed.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        # Whoever takes it decides: the engine thread to swap, or the caller to give up.
        turn = threading.Lock()

        def settle(error: MentorError | None) -> None:
            _call_soon(loop, _resolve, done, error)

        def swap() -> None:
            if not turn.acquire(blocking=False):
                return
            try:
                self._engine.load_weights(state_dict, version=version)
            except MentorError as error:
                settle(error)
            else:
                settle(None)

        self._command(_Command(run=swap, fail=settle))
        try:
            await asyncio.wait_for(asyncio.shield(done), timeout_s)
        except TimeoutError:
            if turn.acquire(blocking=False):
                raise WeightsError(
                    f"weights of version {version}: expected the engine to take them within "
                    f"{timeout_s} s, but its current step lasts longer; try again"
                ) from None
            await done
        except asyncio.CancelledError:
            turn.acquire(blocking=False)
            raise

    def close(self, drain_timeout_s: float = 0.0) -> None:
        """Refuse new requests, let open ones go on for `drain_timeout_s`, cancel the rest.

        Blocks until the thread has ended; from an event loop call it by `asyncio.to_thread`.
        Cancelled requests return what they have, with `StopReason.CANCELLED`. May be repeated.
        """
        with self._wake:
            self._is_closing = True
            self._wake.wait_for(
                lambda: not self._open or self._has_ended, timeout=max(drain_timeout_s, 0.0)
            )
            self._is_stopping = True
            self._wake.notify_all()
        self._thread.join()

    async def _outputs(
        self, request: RolloutRequest, *, is_streamed: bool
    ) -> AsyncGenerator[StepOutput, None]:
        ticket = _Ticket(request=request, is_streamed=is_streamed)
        submission = _Command(
            run=lambda: self._submit(ticket), fail=lambda error: self._refuse(ticket, error)
        )
        self._command(submission, ticket)
        num_open = request.num_samples
        try:
            while True:
                event = await ticket.events.get()
                if not isinstance(event, StepOutput):
                    num_open = 0
                    raise event
                num_open -= event.finished is not None
                yield event
                if num_open == 0:
                    return
        finally:
            if num_open > 0:
                self._cancel_later(ticket)

    def _command(self, command: _Command, ticket: _Ticket | None = None) -> None:
        with self._wake:
            if self._has_ended or self._is_closing:
                raise self._death()
            self._commands.append(command)
            if ticket is not None:
                self._open.add(ticket)
            self._wake.notify_all()

    def _cancel_later(self, ticket: _Ticket) -> None:
        """Like `_command`, but a driver that is ending has cancelled everything anyway."""
        with self._wake:
            if not self._has_ended:
                cancel = _Command(run=lambda: self._cancel(ticket), fail=lambda _: None)
                self._commands.append(cancel)
                self._wake.notify_all()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            while True:
                is_stopping = self._wait_for_work()
                self._run_commands()
                if is_stopping:
                    for request_id in list(self._running):
                        self._engine.cancel(request_id)
                if self._engine.has_unfinished():
                    self._deliver(self._engine.step())
                elif is_stopping:
                    break
        except BaseException as caught:  # the thread's boundary: callers must learn of it
            error = caught
        self._finish(error)

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; true once the driver is to end."""
        with self._wake:
            while not (self._commands or self._is_stopping or self._engine.has_unfinished()):
                self._wake.wait()
            return self._is_stopping

    def _run_commands(self) -> None:
        while self._commands:
            command = self._commands.popleft()
            try:
                command.run()
            except BaseException:
                # Its caller waits too: `_finish` fails every command that is left.
                self._commands.appendleft(command)
                raise

    def _submit(self, ticket: _Ticket) -> None:
        try:
            ticket.request_id = self._engine.submit(ticket.request)
        except MentorError as error:
            self._refuse(ticket, error)
            return
        ticket.num_open = ticket.request.num_samples
        self._running[ticket.request_id] = ticket

    def _cancel(self, ticket: _Ticket) -> None:
        if ticket.request_id in self._running:
            self._engine.cancel(ticket.request_id)

    def _deliver(self, outputs: Sequence[StepOutput]) -> None:
        """Hand a step's outputs to their loops, one callback a loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Ticket, _Event]]] = {}
        closed: list[_Ticket] = []
        for output in outputs:
            ticket = self._running[output.request_id]
            if output.finished is not None:
                ticket.num_open -= 1
                if ticket.num_open == 0:
                    closed.append(ticket)
                    del self._running[output.request_id]
            if ticket.is_streamed or output.finished is not None:
                by_loop.setdefault(ticket.loop, []).append((ticket, output))
        # Before the callers wake up, so that none sees its own finished request as running.
        if closed:
            self._forget(closed)
        for loop, events in by_loop.items():
            if not _call_soon(loop, _put, events):
                for ticket, _ in events:
                    self._cancel(ticket)

    def _refuse(self, ticket: _Ticket, error: MentorError) -> None:
        self._forget([ticket])
        _call_soon(ticket.loop, _put, [(ticket, error)])

    def _forget(self, tickets: Sequence[_Ticket]) -> None:
        with self._wake:
            self._open.difference_update(tickets)
            self._wake.notify_all()

    def _finish(self, error: BaseException | None) -> None:
        """The thread's last act: whoever still waits gets an error."""
        with self._wake:
            self._error = error
            self._has_ended = True
            commands = list(self._commands)
            self._commands.clear()
        for command in commands:
            command.fail(self._death())
        for ticket in list(self._open):
            self._refuse(ticket, self._death())

    def _death(self) -> EngineError:
        if self._error is None:
            return EngineError("the engine is closed; send the request to another replica")
        death = EngineError(f"the engine thread died: {self._error!r}; restart this replica")
        death.__cause__ = self._error
        return death


def _put(events: Sequence[tuple[_Ticket, _Event]]) -> None:
    for ticket, event in events:
        ticket.events.put_nowait(event)


def _resolve(done: asyncio.Future[None], error: MentorError | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)


def _call_soon(
    loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *arguments: object
) -> bool:
    """Schedule a callback on a loop of another thread; false if that loop is closed."""
    try:
        loop.call_soon_threadsafe(callback, *arguments)
    except RuntimeError:
        return False
    return True
