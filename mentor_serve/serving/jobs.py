"""Running a request: all its prompts together, under a time limit, as long as the client listens.

A *job* is one HTTP request on its way through a backend. Leaving a function of this module, by
error, time-out or a client that went away, ends the generation.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request

from mentor_serve.errors import EngineError
from mentor_serve.serving.backend import Backend, Generation, ModelCard
from mentor_serve.serving.errors import ApiError
from mentor_serve.serving.reports import ended_by_token, mentor_report, token_records
from mentor_serve.serving.sampling import Prompt, Stops, common_seed
from mentor_serve.serving.text import IncrementalDecoder, StopFilter, TextCodec
from mentor_serve.serving.wire import MentorReport, Usage
from mentor_serve.types import Rollout, RolloutRequest

if TYPE_CHECKING:
    from mentor_serve.engines.base import StepOutput

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What every route works with."""

    backend: Backend
    codec: TextCodec
    request_timeout_s: float
    service_version: str

    def fingerprint(self, policy_version: int) -> str:
        """`system_fingerprint`: which code and which weights answered."""
        return f"mentor-serve-{self.service_version}-v{policy_version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One HTTP request: choice `i` is sample `i % num_samples` of prompt `i // num_samples`."""

    id: str
    created: int
    card: ModelCard
    prompts: Sequence[Prompt]
    requests: Sequence[RolloutRequest]
    stops: Stops

    @property
    def num_samples(self) -> int:
        """Responses per prompt."""
        return self.requests[0].num_samples

    @property
    def num_choices(self) -> int:
        """Responses in all."""
        return len(self.requests) * self.num_samples

    def prompt_of(self, index: int) -> Prompt:
        """The prompt of a choice."""
        return self.prompts[index // self.num_samples]

    def choice_report(
        self,
        index: int,
        rollout: Rollout,
        *,
        policy_version: int | None,
        codec: TextCodec | None = None,
    ) -> MentorReport:
        """What MENTOR did in one choice; with `codec`, token by token."""
        return mentor_report(
            [rollout],
            seed=self.requests[index // self.num_samples].seed,
            policy_version=policy_version,
            tokens=None if codec is None else token_records(rollout, codec=codec),
        )

    def report(self, rollouts: Sequence[Rollout], *, policy_version: int | None) -> MentorReport:
        """What MENTOR did in the whole response."""
        return mentor_report(
            rollouts, seed=common_seed(self.requests), policy_version=policy_version
        )

    def usage(self, rollouts: Sequence[Rollout]) -> Usage:
        """Exact token counts; every prompt counts once."""
        return Usage.count(
            prompt_tokens=sum(len(prompt.token_ids) for prompt in self.prompts),
            completion_tokens=sum(rollout.num_tokens for rollout in rollouts),
        )


async def until_disconnect(
    request: Request, work: Coroutine[Any, Any, ResultT], *, timeout_s: float
) -> ResultT:
    """Await `work`; cancel it when the client goes away (499) or time is up (TimeoutError)."""

    async def client_left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.create_task(work)
    watcher = asyncio.create_task(client_left())
    try:
        await asyncio.wait({task, watcher}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if watcher.done():
            watcher.result()
            raise ApiError(499, "the client closed the request", code="client_disconnected")
        raise TimeoutError(f"no answer within {timeout_s} s")
    finally:
        await _cancel([task, watcher])


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def generate_all(backend: Backend, job: Job) -> list[Generation]:
    """Run all prompts of a job at once; the first failure cancels the others."""

    async def generate(request: RolloutRequest) -> Generation:
        generation = await backend.generate(job.card.id, request)
        if len(generation.rollouts) != request.num_samples:
            raise EngineError(
                f"expected {request.num_samples} responses of the engine, "
                f"got {len(generation.rollouts)}"
            )
        return generation

    tasks = [asyncio.create_task(generate(request)) for request in job.requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _cancel(tasks)


async def _next_output(stream: AsyncGenerator[StepOutput, None]) -> StepOutput | None:
    return await anext(stream, None)


async def _interleave(
    streams: Sequence[AsyncGenerator[StepOutput, None]], *, timeout_s: float
) -> AsyncGenerator[tuple[int, StepOutput], None]:
    """Outputs of all streams as they come, with the stream's position."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    pending = {
        asyncio.create_task(_next_output(stream)): position
        for position, stream in enumerate(streams)
    }
    try:
        while pending:
            done, _running = await asyncio.wait(
                pending,
                timeout=max(0.0, deadline - loop.time()),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not done:
                raise TimeoutError(f"not finished within {timeout_s} s")
            for task in done:
                position = pending.pop(task)
                output = task.result()
                if output is None:
                    continue
                pending[asyncio.create_task(_next_output(streams[position]))] = position
                yield position, output
    finally:
        await _cancel(list(pending))
        for stream in streams:
            await stream.aclose()


@dataclass(slots=True, kw_only=True)
class ChoiceEvent:
    """What one choice gained: text that is certain, tokens, and at the end its rollout."""

    index: int
    text: str
    token_ids: list[int]
    finished: Rollout | None = None


class _ChoiceText:
    """The text of one choice as it grows."""

    def __init__(self, codec: TextCodec, *, stops: Stops) -> None:
        self._decoder = IncrementalDecoder(codec)
        self._filter = StopFilter(stops.strings)
        self._stops = stops
        self._unsent: list[int] = []
        self.has_finished = False

    def push(self, index: int, output: StepOutput) -> ChoiceEvent | None:
        """The event for this output, or None while there is nothing certain to say."""
        rollout = output.finished
        visible = output.new_token_ids
        self._unsent.extend(visible)
        if rollout is not None and ended_by_token(rollout, stops=self._stops):
            visible = visible[:-1]
        text = self._filter.push(self._decoder.push(visible))
        if rollout is not None:
            self.has_finished = True
            text += self._filter.push(self._decoder.finish()) + self._filter.finish()
        elif not text:
            return None
        token_ids, self._unsent = self._unsent, []
        return ChoiceEvent(index=index, text=text, token_ids=token_ids, finished=rollout)


async def stream_choices(context: Context, job: Job) -> AsyncGenerator[ChoiceEvent, None]:
    """Events of all choices, interleaved as tokens come; every choice ends with its rollout."""
    texts = [_ChoiceText(context.codec, stops=job.stops) for _choice in range(job.num_choices)]
    streams = [context.backend.stream(job.card.id, request) for request in job.requests]
    outputs = _interleave(streams, timeout_s=context.request_timeout_s)
    try:
        async for position, output in outputs:
            index = position * job.num_samples + output.sample_index
            event = texts[index].push(index, output)
            if event is not None:
                yield event
    finally:
        await outputs.aclose()
    if not all(text.has_finished for text in texts):
        raise EngineError("the engine's stream ended before every response did")


async def start_stream(
    context: Context, request: Request, job: Job
) -> AsyncGenerator[ChoiceEvent, None]:
    """Like `stream_choices`, but the first event is there already.

    A failure before the first token thus still gets its proper HTTP status.
    """
    events = stream_choices(context, job)

    async def first_event() -> ChoiceEvent | None:
        return await anext(events, None)

    timeout_s = context.request_timeout_s
    try:
        first = await until_disconnect(request, first_event(), timeout_s=timeout_s)
    except BaseException:
        await events.aclose()
        raise
    return _rejoin(first, events)


async def _rejoin(
    first: ChoiceEvent | None, events: AsyncGenerator[ChoiceEvent, None]
) -> AsyncGenerator[ChoiceEvent, None]:
    try:
        if first is not None:
            yield first
        async for event in events:
            yield event
    finally:
        await events.aclose()
