"""`POST /v1/completions`: one or more prompts in, their continuations out.

With `echo`, `logprobs` and `max_tokens` 0 or 1 it scores given text, which is how evaluation
harnesses measure log-likelihoods.
"""

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
from mentor_serve.serving.fields import check_fields
from mentor_serve.serving.jobs import (
    ChoiceEvent,
    Context,
    Job,
    generate_all,
    start_stream,
    until_disconnect,
)
from mentor_serve.serving.reports import (
    completion_logprobs,
    finish_reason,
    response_text,
    without_response,
)
from mentor_serve.serving.requests import (
    MAX_CHOICES,
    CompletionRequest,
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
from mentor_serve.serving.text import TextCodec
from mentor_serve.serving.wire import Completion, CompletionChoice, CompletionLogprobs
from mentor_serve.types import Rollout

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default for this route."""


def _check(body: CompletionRequest, *, num_prompts: int) -> None:
    check_fields(body)
    if num_prompts == 0:
        raise invalid("expected at least one prompt, got an empty list", param="prompt")
    if num_prompts * body.num_samples > MAX_CHOICES:
        message = f"expected at most {MAX_CHOICES} responses (prompts times n), got more"
        raise invalid(message, param="n")
    if body.max_tokens == 0 and not body.echo:
        raise invalid("'max_tokens': 0 needs 'echo': true", param="max_tokens")


async def _prompts(body: CompletionRequest, codec: TextCodec) -> list[Prompt]:
    given = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if given and isinstance(given[0], int):
        given = [given]
    _check(body, num_prompts=len(given))
    prompts = []
    for item in given:
        if isinstance(item, str):
            special = body.add_special_tokens is not False
            token_ids = await codec.encode(item, add_special_tokens=special)
            prompts.append(Prompt(token_ids=token_ids, text=item))
        elif isinstance(item, list):
            prompts.append(Prompt(token_ids=item))
    return prompts


async def _prepare(context: Context, body: CompletionRequest) -> Job:
    card = await find_model(context.backend, body.model)
    check_mixed(card, body)
    await context.codec.load()
    prompts = await _prompts(body, context.codec)
    stops = stops_of(body, context.codec)
    requests = []
    for prompt in prompts:
        max_new_tokens = fit_context(
            prompt,
            max_tokens=body.max_tokens,
            default=DEFAULT_MAX_TOKENS,
            max_model_len=context.backend.max_model_len,
        )
        sampling = sampling_params(
            body,
            stops=stops,
            max_new_tokens=max_new_tokens,
            top_logprobs=body.logprobs or 0,
        )
        scores_prompt = bool(body.echo) and body.logprobs is not None
        requests.append(
            rollout_request(
                card, prompt, body=body, sampling=sampling, prompt_logprobs=scores_prompt
            )
        )
    return Job(
        id=f"cmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        card=card,
        prompts=prompts,
        requests=requests,
        stops=stops,
    )


class _Writer:
    """Writes one job's response, at once or in events."""

    def __init__(self, context: Context, body: CompletionRequest, job: Job) -> None:
        self._context = context
        self._codec = context.codec
        self._body = body
        self._job = job

    def _echo(self, index: int) -> str:
        """The prompt's text where the response is to begin with it."""
        if not self._body.echo:
            return ""
        prompt = self._job.prompt_of(index)
        return self._codec.decode(prompt.token_ids) if prompt.text is None else prompt.text

    def _kept(self, rollout: Rollout) -> Rollout:
        return without_response(rollout) if self._body.max_tokens == 0 else rollout

    def _logprobs(self, index: int, rollout: Rollout) -> CompletionLogprobs | None:
        if self._body.logprobs is None:
            return None
        return completion_logprobs(
            rollout,
            codec=self._codec,
            num_top=self._body.logprobs,
            echoed=self._job.prompt_of(index) if self._body.echo else None,
        )

    def _finished(
        self, index: int, rollout: Rollout, *, text: str, policy_version: int | None
    ) -> CompletionChoice:
        """A choice, or the last event of one, with all that its rollout tells."""
        choice = CompletionChoice(
            index=index,
            text=text,
            logprobs=self._logprobs(index, rollout),
            finish_reason=finish_reason(rollout),
            mentor=self._job.choice_report(
                index,
                rollout,
                policy_version=policy_version,
                codec=self._codec if wants_token_records(self._body) else None,
            ),
        )
        if self._body.return_token_ids:
            choice.prompt_token_ids = self._job.prompt_of(index).token_ids
        return choice

    def completion(self, generations: Sequence[Generation]) -> Completion:
        """The whole response."""
        choices: list[CompletionChoice] = []
        kept = []
        for generation in generations:
            for rollout in map(self._kept, generation.rollouts):
                index = len(choices)
                text = response_text(rollout, codec=self._codec, stops=self._job.stops)
                choice = self._finished(
                    index,
                    rollout,
                    text=self._echo(index) + text,
                    policy_version=generation.policy_version,
                )
                if self._body.return_token_ids:
                    choice.token_ids = rollout.token_ids.tolist()
                choices.append(choice)
                kept.append(rollout)
        report = self._job.report(kept, policy_version=generations[0].policy_version)
        return self._body_of(
            choices,
            usage=self._job.usage(kept),
            mentor=report,
            system_fingerprint=self._context.fingerprint(report.policy_version),
        )

    def _body_of(self, choices: list[CompletionChoice], **fields: Any) -> Completion:
        job = self._job
        return Completion(
            id=job.id, created=job.created, model=job.card.id, choices=choices, **fields
        )

    async def events(
        self, events: AsyncGenerator[ChoiceEvent, None]
    ) -> AsyncGenerator[Completion, None]:
        """The response in events; what only the end tells is on each choice's last one."""
        finished: list[Rollout] = []
        async with aclosing(events):
            for index in range(self._job.num_choices if self._body.echo else 0):
                yield self._body_of([CompletionChoice(index=index, text=self._echo(index))])
            async for event in events:
                part = self._event(event, finished)
                if part is not None:
                    yield part
        if include_usage(self._body):
            yield self._body_of([], usage=self._job.usage(finished))

    def _event(self, event: ChoiceEvent, finished: list[Rollout]) -> Completion | None:
        has_response = self._body.max_tokens != 0
        text = event.text if has_response else ""
        token_ids = event.token_ids if has_response else []
        version = self._job.card.policy_version
        if event.finished is None:
            if not text:
                return None
            choice = CompletionChoice(index=event.index, text=text)
        else:
            rollout = self._kept(event.finished)
            finished.append(rollout)
            choice = self._finished(event.index, rollout, text=text, policy_version=version)
        if self._body.return_token_ids:
            choice.token_ids = token_ids
        part = self._body_of([choice])
        if len(finished) == self._job.num_choices:
            part.mentor = self._job.report(finished, policy_version=version)
            part.system_fingerprint = self._context.fingerprint(part.mentor.policy_version)
        return part


def completions_router(context: Context) -> APIRouter:
    """The completions route."""
    router = APIRouter(tags=["generation"])

    @router.post("/v1/completions", response_model=Completion)
    async def create_completion(body: CompletionRequest, request: Request) -> Completion | Response:
        job = await _prepare(context, body)
        writer = _Writer(context, body, job)
        if body.stream:
            events = await start_stream(context, request, job)
            return EventStream(writer.events(events), request_id=request_id_of(request))
        work = generate_all(context.backend, job)
        generations = await until_disconnect(request, work, timeout_s=context.request_timeout_s)
        # Spelling out a batch of scored prompts takes seconds, which other requests must not wait.
        return await asyncio.to_thread(writer.completion, generations)

    return router
