"""One shape for every failure: `{"error": {"message", "type", "param", "code"}}`.

The HTTP boundary: exceptions of the layers below become statuses here. Messages of our own
families are written for people and go out; any other exception is logged with its traceback and
leaves as a plain 500 that names the request id.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from mentor_serve.errors import (
    EngineError,
    ExpertUnavailable,
    InvalidRequest,
    MentorError,
    StalePolicyError,
    StoreUnavailable,
)
from mentor_serve.serving.backend import (
    ConflictError,
    NotFoundError,
    OverloadedError,
    UnknownModelError,
)

logger = logging.getLogger(__name__)

_MAX_PARAMETER_ERRORS = 4
_UNION_SIDE = re.compile(r"str|list\[.*\]|texts?|token_ids|token_id_lists")


class ApiError(Exception):
    """A failure with its status and wire fields; raised by routes, rendered by the handlers."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object that goes on the wire."""
        # Lone surrogates arrive legally in JSON escapes, but UTF-8 cannot carry them back.
        message = self.message.encode("utf-8", "backslashreplace").decode("utf-8")
        param = self.param and self.param.encode("utf-8", "backslashreplace").decode("utf-8")
        return {
            "error": {
                "message": message,
                "type": _error_type(self.status),
                "param": param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The failure as a response."""
        return JSONResponse(self.body, status_code=self.status, headers=self.headers)


def _error_type(status: int) -> str:
    if status >= 500:
        return "server_error"
    special = {403: "permission_error", 409: "conflict_error", 429: "rate_limit_error"}
    return special.get(status, "invalid_request_error")


def invalid(message: str, *, param: str | None, code: str | None = "invalid_value") -> ApiError:
    """A 400 that names the field."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, *, code: str, retry_after_s: float) -> ApiError:
    """A 503 that says when to come back."""
    headers = {"retry-after": str(max(1, math.ceil(retry_after_s)))}
    return ApiError(503, message, code=code, headers=headers)


def request_id_of(request: Request) -> str:
    """The id that the middleware gave this request."""
    return str(request.scope.get("state", {}).get("request_id", ""))


def _from_mentor_error(error: MentorError) -> ApiError | None:
    failure = ApiError(0, str(error))
    match error:
        case InvalidRequest():
            failure.status, failure.code = 400, "invalid_request"
        case UnknownModelError():
            failure.status, failure.code, failure.param = 404, "model_not_found", "model"
        case NotFoundError():
            failure.status, failure.code = 404, "not_found"
        case StalePolicyError():
            failure.status, failure.code = 409, "stale_policy"
            failure.headers["x-should-retry"] = "false"
        case ConflictError():
            failure.status, failure.code = 409, "conflict"
        case OverloadedError(retry_after_s=retry_after_s):
            return unavailable(str(error), code="overloaded", retry_after_s=retry_after_s)
        case ExpertUnavailable():
            return unavailable(str(error), code="expert_unavailable", retry_after_s=5)
        case StoreUnavailable():
            return unavailable(
                "the database is away; completions are served, its records not",
                code="store_unavailable",
                retry_after_s=5,
            )
        case EngineError():
            failure.status, failure.code = 500, "engine_error"
        case _:
            return None
    return failure


def as_api_error(error: BaseException, *, request_id: str) -> ApiError:
    """Translate any exception; what is not ours is logged and hidden."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TimeoutError):
        return ApiError(
            504,
            "expected an answer within the time limit, got none; ask for fewer tokens or stream",
            code="timeout",
            headers={"x-should-retry": "false"},
        )
    known = _from_mentor_error(error) if isinstance(error, MentorError) else None
    if known is not None:
        if known.status == 500:
            logger.error("request %s failed", request_id, exc_info=error)
        return known
    logger.error("request %s failed", request_id, exc_info=error)
    return ApiError(
        500,
        f"the server failed on this request; its log has the cause under request id {request_id}",
        code="internal_error",
    )


def _location(parts: Sequence[Any]) -> str | None:
    """The field as the client wrote it, without pydantic's names for the sides of a union."""
    names = [str(part) for part in parts if part not in {"body", "query", "path", "header"}]
    return ".".join(name for name in names if not _UNION_SIDE.fullmatch(name)) or None


def _from_validation(error: RequestValidationError) -> ApiError:
    problems = error.errors()
    if problems and problems[0]["type"] == "json_invalid":
        reason = problems[0].get("ctx", {}).get("error", "not JSON")
        return invalid(f"expected a JSON body, got: {reason}", param=None, code="invalid_json")
    if problems and tuple(problems[0]["loc"]) == ("body",):
        message = "expected a JSON object as body with content-type application/json"
        return invalid(message, param=None, code="invalid_json")
    parts = []
    for problem in problems[:_MAX_PARAMETER_ERRORS]:
        parts.append(f"{_location(problem['loc']) or 'request'}: {problem['msg']}")
    if len(problems) > _MAX_PARAMETER_ERRORS:
        parts.append(f"and {len(problems) - _MAX_PARAMETER_ERRORS} more")
    first: dict[str, Any] = problems[0] if problems else {"type": "invalid", "loc": ()}
    codes = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}
    return invalid(
        "; ".join(parts),
        param=_location(first["loc"]),
        code=codes.get(str(first["type"]), "invalid_value"),
    )


def _from_http(error: HTTPException, request: Request) -> ApiError:
    detail = str(error.detail)
    if error.status_code == 404:
        detail = f"no route {request.method} {request.url.path}; see /docs for the routes"
    elif error.status_code == 405:
        detail = f"{request.method} is not offered on {request.url.path}"
    code = HTTPStatus(error.status_code).name.lower().replace("entity_", "")
    return ApiError(error.status_code, detail, code=code, headers=error.headers)


def install_error_handlers(app: FastAPI) -> None:
    """Render every exception that reaches the application in the one shape."""

    async def on_validation(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for it
        return _from_validation(error).response()

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)  # noqa: S101 - registered for it
        return _from_http(error, request).response()

    async def on_known(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error, request_id=request_id_of(request)).response()

    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    for family in (ApiError, MentorError, TimeoutError):
        app.add_exception_handler(family, on_known)
