"""What holds for every request: an id, a size limit, no cross-site writes, draining, one last net.

Plain ASGI, because Starlette's function middleware buffers streams and hides disconnects.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mentor_serve.serving.backend import Backend
from mentor_serve.serving.errors import ApiError, as_api_error, unavailable

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestGuard:
    """Gives the request its id, decides whether it may come in, and catches what nobody caught."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        backend: Backend,
        allowed_origins: Sequence[str],
        max_body_bytes: int,
    ) -> None:
        self._app = app
        self._backend = backend
        self._allowed_origins = frozenset(allowed_origins)
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            self._admit(scope, headers)
            await self._app(scope, self._limited(receive), send_with_id)
        except Exception as error:
            if has_started:
                raise
            failure = as_api_error(error, request_id=request_id)
            await failure.response()(scope, receive, send_with_id)

    def _admit(self, scope: Scope, headers: Headers) -> None:
        if self._backend.is_draining and not str(scope["path"]).startswith("/health"):
            raise unavailable(
                "the service is stopping; try again", code="draining", retry_after_s=2
            )
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._max_body_bytes:
            raise self._too_large()
        origin = headers.get("origin")
        if scope["method"] not in {"GET", "HEAD", "OPTIONS"} and origin is not None:
            self._check_origin(origin, host=headers.get("host", ""))

    def _check_origin(self, origin: str, *, host: str) -> None:
        # A page of another site could otherwise drive a service on localhost that has no keys:
        # posts without a JSON body need no preflight.
        if origin in self._allowed_origins or urlsplit(origin).netloc == host:
            return
        message = f"origin {origin} may not call this service; see gateway.cors_origins"
        raise ApiError(403, message, code="origin_not_allowed")

    def _too_large(self) -> ApiError:
        message = f"expected a body of at most {self._max_body_bytes} bytes, got more"
        return ApiError(413, message, code="request_too_large")

    def _limited(self, receive: Receive) -> Receive:
        num_bytes = 0

        async def receive_limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                # FastAPI lets only HTTP exceptions through while it reads a body.
                raise HTTPException(413, self._too_large().message)
            return message

        return receive_limited
