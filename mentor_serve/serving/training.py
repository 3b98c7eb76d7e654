"""Training state, its pause button, trajectories and weight snapshots.

Reading needs an API key, pausing and rolling back an admin key.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query

from mentor_serve.serving.auth import KeyRing
from mentor_serve.serving.backend import Backend, NotFoundError
from mentor_serve.serving.jobs import Context
from mentor_serve.serving.requests import RollbackRequest
from mentor_serve.serving.wire import ObjectList, jsonable
from mentor_serve.types import TrajectoryKind

MAX_PAGE = 500


def training_router(context: Context, *, keys: KeyRing) -> APIRouter:
    """What the service learns from, and how far it is."""
    router = APIRouter(tags=["training"])
    admin = [Depends(keys.require_admin_key())]
    backend: Backend = context.backend

    @router.get("/v1/training")
    async def get_training() -> dict[str, Any]:
        return dict(jsonable(await backend.training()))

    @router.post("/v1/training/pause", dependencies=admin)
    async def pause_training() -> dict[str, Any]:
        """Stop collecting and learning; serving goes on. Pausing twice is fine."""
        await backend.set_paused(True)
        return dict(jsonable(await backend.training()))

    @router.post("/v1/training/resume", dependencies=admin)
    async def resume_training() -> dict[str, Any]:
        await backend.set_paused(False)
        return dict(jsonable(await backend.training()))

    @router.get("/v1/trajectories")
    async def list_trajectories(
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 50,
        kind: TrajectoryKind | None = None,
        before: Annotated[str | None, Query(min_length=1, max_length=64)] = None,
    ) -> ObjectList:
        """Newest first; pass `next_before` as `before` for the next page."""
        # One more than asked tells whether there are more.
        rows = await backend.trajectories(limit=limit + 1, kind=kind, before=before)
        page = [dict(jsonable(row)) for row in rows[:limit]]
        has_more = len(rows) > limit
        next_before = str(page[-1]["id"]) if has_more else None
        return ObjectList(data=page, has_more=has_more, next_before=next_before)

    @router.get("/v1/trajectories/{trajectory_id}")
    async def get_trajectory(trajectory_id: str) -> dict[str, Any]:
        row = await backend.trajectory(trajectory_id)
        if row is None:
            raise NotFoundError(f"trajectory {trajectory_id!r} is not in the store")
        return dict(jsonable(row))

    @router.get("/v1/weights")
    async def list_weights() -> ObjectList:
        return ObjectList(data=[dict(jsonable(row)) for row in await backend.weights()])

    @router.post("/v1/weights/rollback", dependencies=admin)
    async def roll_back_weights(body: RollbackRequest) -> dict[str, Any]:
        """Make the weights of a kept version the newest version; returns the new version."""
        return dict(jsonable(await backend.roll_back(body.version)))

    return router
