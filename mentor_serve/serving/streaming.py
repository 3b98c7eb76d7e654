"""Server-sent events: `data: {json}` lines, `data: [DONE]` at the end.

A failure on the way is an event `{"error": {...}}`, because the status line has left already.
Whatever ends the response closes the events, and with them the generation.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TypeVar

from fastapi.sse import EventSourceResponse, format_sse_event
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from mentor_serve.serving.errors import as_api_error
from mentor_serve.serving.wire import ErrorBody

EventT = TypeVar("EventT", bound=BaseModel)

_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
"""Proxies must pass every event on at once."""


def _encoded(event: BaseModel) -> bytes:
    return format_sse_event(data_str=event.model_dump_json())


async def _encode(
    events: AsyncGenerator[EventT, None], *, request_id: str
) -> AsyncGenerator[bytes, None]:
    try:
        async for event in events:
            yield _encoded(event)
    except Exception as error:
        failure = as_api_error(error, request_id=request_id)
        yield _encoded(ErrorBody.model_validate(failure.body))
    finally:
        await events.aclose()
    yield format_sse_event(data_str="[DONE]")


class EventStream(EventSourceResponse):
    """A streamed response that owns its events.

    They are closed when the response ends in any way: a generator that is only dropped would go
    on until the garbage collector finds it, and the engine with it.
    """

    def __init__(self, events: AsyncGenerator[EventT, None], *, request_id: str) -> None:
        self._encoder = _encode(events, request_id=request_id)
        self._close_events = events.aclose
        super().__init__(self._encoder, headers=_HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, then close them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._encoder.aclose()
            # An encoder that never started has no `finally` to run.
            await self._close_events()
