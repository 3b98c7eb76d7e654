"""`POST /v1/chat/completions`: a conversation in, the assistant's turn out."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response

from mentor_serve.serving.backend import Generation
from mentor_serve.serving.errors import invalid, request_id_of
from mentor_serve.serving.fields import check_extra_fields, check_fields
from mentor_serve.serving.jobs import (
    ChoiceEvent,
    Context,
    Job,
    generate_all,
    start_stream,
    until_disconnect,
)
from mentor_serve.serving.reports import chat_logprobs, finish_reason, response_text
from mentor_serve.serving.requests import (
    ChatRequest,
    Message,
    include_usage,
    wants_token_records,
)
from mentor_serve.serving.sampling import (
    Prompt,
    check_mixed,
    find_model,
    fit_context,
    rollout_request,
    sampling_params,
    stops_of,
)
from mentor_serve.serving.streaming import EventStream
from mentor_serve.serving.wire import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    MentorReport,
)
from mentor_serve.types import Rollout


def template_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as chat templates take them. Raises a 400 for what is not text."""
    rendered = []
    for position, message in enumerate(messages):
        where = f"messages.{position}"
        check_extra_fields(
            {f"{where}.{key}": value for key, value in (message.model_extra or {}).items()}
        )
        # `developer` is OpenAI's newer name for `system`, which is what templates know.
        role = "system" if message.role == "developer" else message.role
        turn = {"role": role, "content": _text_of(message, where=where)}
        if message.name is not None:
            turn["name"] = message.name
        rendered.append(turn)
    return rendered


def _text_of(message: Message, *, where: str) -> str:
    if isinstance(message.content, str):
        return message.content
    parts = []
    for number, part in enumerate(message.content):
        if part.type != "text" or part.text is None:
            param = f"{where}.content.{number}.type"
            text = f"expected content parts of type 'text', got '{part.type}'"
            raise invalid(text, param=param, code="unsupported_value")
        parts.append(part.text)
    return "".join(parts)


def _check(body: ChatRequest) -> None:
    check_fields(body)
    if body.top_logprobs and not body.logprobs:
        raise invalid("'top_logprobs' needs 'logprobs': true", param="top_logprobs")


async def _prepare(context: Context, body: ChatRequest) -> Job:
    _check(body)
    card = await find_model(context.backend, body.model)
    check_mixed(card, body)
    await context.codec.load()
    continues = bool(body.continue_final_message)
    opens_turn = not continues if body.add_generation_prompt is None else body.add_generation_prompt
    token_ids = await context.codec.render_chat(
        template_messages(body.messages),
        add_generation_prompt=opens_turn,
        continue_final_message=continues,
        template_kwargs=body.chat_template_kwargs or {},
    )
    prompt = Prompt(token_ids=token_ids)
    stops = stops_of(body, context.codec)
    max_tokens = body.max_completion_tokens or body.max_tokens
    sampling = sampling_params(
        body,
        stops=stops,
        max_new_tokens=fit_context(
            prompt,
            max_tokens=max_tokens,
            default=None,
            max_model_len=context.backend.max_model_len,
        ),
        top_logprobs=body.top_logprobs or 0,
    )
    return Job(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        card=card,
        prompts=[prompt],
        requests=[rollout_request(card, prompt, body=body, sampling=sampling)],
        stops=stops,
    )


class _Writer:
    """Writes one job's response, at once or in events."""

    def __init__(self, context: Context, body: ChatRequest, job: Job) -> None:
        self._context = context
        self._codec = context.codec
        self._body = body
        self._job = job
        self._prompt_token_ids = job.prompts[0].token_ids if body.return_token_ids else None

    def _logprobs(self, rollout: Rollout) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        num_top = self._body.top_logprobs or 0
        return chat_logprobs(rollout, codec=self._codec, num_top=num_top)

    def _report(self, index: int, rollout: Rollout, *, policy_version: int | None) -> MentorReport:
        codec = self._codec if wants_token_records(self._body) else None
        return self._job.choice_report(index, rollout, policy_version=policy_version, codec=codec)

    def completion(self, generation: Generation) -> ChatCompletion:
        """The whole response."""
        job = self._job
        stops = job.stops
        version = generation.policy_version
        choices = [
            ChatChoice(
                index=index,
                message=ChatMessage(content=response_text(rollout, codec=self._codec, stops=stops)),
                logprobs=self._logprobs(rollout),
                finish_reason=finish_reason(rollout),
                token_ids=rollout.token_ids.tolist() if self._body.return_token_ids else None,
                mentor=self._report(index, rollout, policy_version=version),
            )
            for index, rollout in enumerate(generation.rollouts)
        ]
        report = job.report(generation.rollouts, policy_version=version)
        return ChatCompletion(
            id=job.id,
            created=job.created,
            model=job.card.id,
            choices=choices,
            usage=job.usage(generation.rollouts),
            system_fingerprint=self._context.fingerprint(report.policy_version),
            prompt_token_ids=self._prompt_token_ids,
            mentor=report,
        )

    def _chunk(self, choices: list[ChatChunkChoice], **fields: Any) -> ChatChunk:
        job = self._job
        return ChatChunk(
            id=job.id, created=job.created, model=job.card.id, choices=choices, **fields
        )

    async def events(
        self, events: AsyncGenerator[ChoiceEvent, None]
    ) -> AsyncGenerator[ChatChunk, None]:
        """The response in events: roles first, then text, each choice's end by itself."""
        finished: list[Rollout] = []
        async with aclosing(events):
            for index in range(self._job.num_choices):
                role = ChatDelta(role="assistant", content="")
                yield self._chunk(
                    [ChatChunkChoice(index=index, delta=role)],
                    prompt_token_ids=self._prompt_token_ids if index == 0 else None,
                )
            async for event in events:
                if event.text or (event.token_ids and self._body.return_token_ids):
                    yield self._delta(event)
                if event.finished is not None:
                    finished.append(event.finished)
                    yield self._ending(event.index, finished)
        if include_usage(self._body):
            yield self._chunk([], usage=self._job.usage(finished))

    def _delta(self, event: ChoiceEvent) -> ChatChunk:
        choice = ChatChunkChoice(index=event.index, delta=ChatDelta(content=event.text))
        if self._body.return_token_ids:
            choice.token_ids = event.token_ids
        return self._chunk([choice])

    def _ending(self, index: int, finished: Sequence[Rollout]) -> ChatChunk:
        """The last event of a choice; of the last choice, with the response's report."""
        rollout = finished[-1]
        version = self._job.card.policy_version
        choice = ChatChunkChoice(
            index=index,
            delta=ChatDelta(),
            logprobs=self._logprobs(rollout),
            finish_reason=finish_reason(rollout),
            mentor=self._report(index, rollout, policy_version=version),
        )
        if len(finished) < self._job.num_choices:
            return self._chunk([choice])
        report = self._job.report(finished, policy_version=version)
        fingerprint = self._context.fingerprint(report.policy_version)
        return self._chunk([choice], mentor=report, system_fingerprint=fingerprint)


def chat_router(context: Context) -> APIRouter:
    """The chat route."""
    router = APIRouter(tags=["generation"])

    @router.post("/v1/chat/completions", response_model=ChatCompletion)
    async def create_chat_completion(
        body: ChatRequest, request: Request
    ) -> ChatCompletion | Response:
        job = await _prepare(context, body)
        writer = _Writer(context, body, job)
        if body.stream:
            events = await start_stream(context, request, job)
            return EventStream(writer.events(events), request_id=request_id_of(request))
        work = generate_all(context.backend, job)
        (generation,) = await until_disconnect(request, work, timeout_s=context.request_timeout_s)
        return await asyncio.to_thread(writer.completion, generation)

    return router
