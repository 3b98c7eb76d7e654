"""What the HTTP face needs of the service behind it.

The Ray gateway implements `Backend`; tests implement it in a few lines. Text stays on this side:
a backend takes and gives token ids, and lends its tokenizer.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from mentor_serve.errors import MentorError
from mentor_serve.types import Rollout, RolloutRequest, TrajectoryKind

if TYPE_CHECKING:
    from mentor_serve.engines.base import StepOutput


class UnknownModelError(MentorError, LookupError):
    """The request names a model that this service does not serve (HTTP 404)."""


class NotFoundError(MentorError, LookupError):
    """The request names a trajectory or other object that does not exist (HTTP 404)."""


class ConflictError(MentorError, RuntimeError):
    """The state of the service does not allow what was asked (HTTP 409)."""


class OverloadedError(MentorError, RuntimeError):
    """No room for another request now (HTTP 503 with `retry-after`)."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """One model a client may name: `policy`, `policy@<version>`, `expert` or `mentor`."""

    id: str
    created: int
    """Unix time, seconds."""
    is_mixed: bool = False
    """Samples from pi_mix (Eq. 6): truncation and greedy sampling are refused."""
    policy_version: int | None = None
    """Version of the weights behind it now; None where there is none (`expert`)."""
    root: str | None = None
    """Name or folder of the weights it started from, if it may be shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A finished request: `request.num_samples` rollouts in sample order."""

    rollouts: Sequence[Rollout]
    policy_version: int
    """Version of the weights when the request was taken; reported where no token was generated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """Whether the service can do its work, and if not, why."""

    ready: bool
    reasons: Sequence[str] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


class Backend(Protocol):
    """The service behind the routes; every method is called from one event loop.

    Errors: `InvalidRequest` 400, `UnknownModelError` and `NotFoundError` 404, `StalePolicyError`
    and `ConflictError` 409, `OverloadedError` and `ExpertUnavailable` 503, `TimeoutError` 504,
    anything else 500.
    Dictionaries hold what JSON can carry; NaN becomes null.
    """

    @property
    def tokenizer(self) -> Any:
        """A Hugging Face tokenizer; read once, in a thread, when text first needs it."""

    @property
    def max_model_len(self) -> int:
        """Largest prompt plus response, in tokens."""

    @property
    def is_draining(self) -> bool:
        """True while the service stops: new requests are refused, running ones finish."""

    async def models(self) -> Sequence[ModelCard]:
        """Every model that a request may name now; asked once a request, so keep it cheap."""

    async def generate(self, model: str, request: RolloutRequest) -> Generation:
        """Run a request to its end; cancelling the call cancels the generation.

        A request for a mixed model arrives with `mixed=True`; the backend sets its gamma.
        """

    def stream(self, model: str, request: RolloutRequest) -> AsyncGenerator[StepOutput, None]:
        """Yield the request's step outputs; closing the generator cancels the generation.

        Ends after every sample has yielded its `finished` rollout.
        """

    async def readiness(self) -> Readiness: ...

    async def training(self) -> Mapping[str, Any]:
        """The training state: step, policy version, alpha, gamma, paused, queue lengths."""

    async def set_paused(self, paused: bool) -> None:
        """Stop or go on collecting and learning; serving goes on either way."""

    async def trajectories(
        self, *, limit: int, kind: TrajectoryKind | None, before: str | None
    ) -> Sequence[Mapping[str, Any]]:
        """Newest first, at most `limit`, older than the id `before`; each has an `id`."""

    async def trajectory(self, trajectory_id: str) -> Mapping[str, Any] | None:
        """One trajectory with its tokens, or None."""

    async def weights(self) -> Sequence[Mapping[str, Any]]:
        """The kept weight snapshots, newest first."""

    async def roll_back(self, version: int) -> Mapping[str, Any]:
        """Make the weights of a kept version the newest version; the new version's row.

        Raises:
            NotFoundError: no such version.
            ConflictError: its snapshot cannot be used, or nothing is trained.
        """
