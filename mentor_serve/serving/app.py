"""`create_app`: the routes, keys, limits and error shape over one backend."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import Depends, FastAPI
from starlette.middleware.cors import CORSMiddleware

from mentor_serve.errors import ConfigError
from mentor_serve.serving.auth import KeyRing
from mentor_serve.serving.backend import Backend
from mentor_serve.serving.catalogue import models_router, tokenizer_router
from mentor_serve.serving.chat import chat_router
from mentor_serve.serving.completions import completions_router
from mentor_serve.serving.errors import install_error_handlers
from mentor_serve.serving.health import health_router
from mentor_serve.serving.jobs import Context
from mentor_serve.serving.middleware import RequestGuard
from mentor_serve.serving.text import TextCodec
from mentor_serve.serving.training import training_router
from mentor_serve.serving.wire import ErrorBody

MAX_BODY_BYTES = 8 * 2**20
"""Room for a batch of 64 prompts of 16k token ids."""


def create_app(
    backend: Backend,
    *,
    api_keys: Sequence[str] = (),
    admin_keys: Sequence[str] = (),
    cors_origins: Sequence[str] = (),
    request_timeout_s: float = 600.0,
    service_version: str = "0",
    max_body_bytes: int = MAX_BODY_BYTES,
) -> FastAPI:
    """Build the ASGI application.

    `cors_origins` are exact origins such as `https://lab.example`; `*` is refused with a
    `ConfigError`, because any page a user visits could then read the service.
    """
    for origin in cors_origins:
        if "*" in origin:
            raise ConfigError(f"gateway.cors_origins: expected exact origins, got {origin!r}")
    keys = KeyRing(api_keys=api_keys, admin_keys=admin_keys)
    context = Context(
        backend=backend,
        codec=TextCodec(lambda: backend.tokenizer),
        request_timeout_s=request_timeout_s,
        service_version=service_version,
    )
    app = FastAPI(
        title="mentor-serve",
        version=service_version,
        description="A language model that gets better while it serves it.",
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    install_error_handlers(app)
    app.include_router(health_router(context))
    signed = [Depends(keys.require_api_key())]
    for router in (
        chat_router(context),
        completions_router(context),
        models_router(context),
        tokenizer_router(context),
    ):
        app.include_router(router, dependencies=signed)
    app.include_router(training_router(context, keys=keys), dependencies=signed)
    app.add_middleware(
        RequestGuard,
        backend=backend,
        allowed_origins=cors_origins,
        max_body_bytes=max_body_bytes,
    )
    if cors_origins:
        # Added last, hence outermost: failures carry the CORS headers too.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app
