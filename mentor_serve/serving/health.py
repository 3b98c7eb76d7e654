"""`GET /health` (the process lives) and `GET /health/readiness` (it can do its work).

Both are open without a key and go on answering while the service drains.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from mentor_serve.serving.jobs import Context
from mentor_serve.serving.wire import jsonable


def health_router(context: Context) -> APIRouter:
    """The two probes."""
    router = APIRouter(tags=["health"])

    @router.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok", "version": context.service_version}

    @router.get("/health/readiness", response_model=dict[str, Any])
    async def readiness() -> JSONResponse:
        """200 when ready, else 503 with the reasons."""
        state = await context.backend.readiness()
        reasons = list(state.reasons)
        if context.backend.is_draining:
            reasons.append("draining: the service is stopping and takes no new requests")
        is_ready = state.ready and not context.backend.is_draining
        body = {
            "status": "ready" if is_ready else "not_ready",
            "reasons": reasons,
            "details": jsonable(state.details),
        }
        headers = {} if is_ready else {"retry-after": "1"}
        return JSONResponse(body, status_code=200 if is_ready else 503, headers=headers)

    return router
