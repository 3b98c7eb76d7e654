"""The weight store: one detached actor that owns the newest snapshot and hands it out.

The learner gives it a snapshot by value, because an object that the learner itself had put would
die with the learner. Replicas that start later pull the newest snapshot. All durable state is on
disk and in SQL: a restarted weight store finds the newest committed version there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import ray
import structlog
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from mentor_serve.actors import names
from mentor_serve.actors.application import deployment_handle
from mentor_serve.actors.detached import fingerprint
from mentor_serve.actors.runtime import enter_process, open_run, open_store, prepare_state
from mentor_serve.errors import ServiceError, WeightsError
from mentor_serve.settings import Settings
from mentor_serve.types import Guidance
from mentor_serve.weights import PublishReport, Snapshot, read_snapshot, snapshot_path

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PublishedWeights:
    """A snapshot in the object store. `state` is boxed so that Ray does not fetch it eagerly."""

    guidance: Guidance
    state: list[ray.ObjectRef[Any]]


class WeightStore:
    """See the module docstring; `ensure_weight_store` starts it."""

    def __init__(self, settings: Settings) -> None:
        enter_process(settings, role="weight_store")
        prepare_state(settings)
        self._fingerprint = fingerprint(settings)
        self._timeout_s = settings.weights.swap_timeout_s
        self._latest = self._restore(settings)

    def fingerprint(self) -> str:
        """Of the settings that it runs with."""
        return self._fingerprint

    def latest(self) -> PublishedWeights | None:
        """The newest published snapshot, or None before the first."""
        return self._latest

    def publish(self, snapshot: Snapshot) -> PublishReport:
        """Hand a snapshot to every policy replica and wait until all of them have it.

        A replica that fails takes itself out of the router (its health check fails), and the one
        that replaces it pulls the newest snapshot, which from here on is this one.

        Raises:
            WeightsError: after the time-out some replica still has not taken it; says why.
        """
        started = time.monotonic()
        self._latest = _put(snapshot)
        deadline = started + self._timeout_s
        while True:
            versions, problems = self._broadcast(deadline)
            if not problems:
                return PublishReport(
                    version=snapshot.version,
                    num_replicas=len(versions),
                    duration_s=time.monotonic() - started,
                )
            if time.monotonic() >= deadline:
                raise WeightsError(
                    f"version {snapshot.version} should be on every policy replica within "
                    f"{self._timeout_s:g} s, but: {'; '.join(problems)}"
                )
            time.sleep(0.5)

    def _broadcast(self, deadline: float) -> tuple[list[int], list[str]]:
        remaining_s = max(0.1, deadline - time.monotonic())
        try:
            response = deployment_handle(names.POLICY).broadcast("load_published", self._latest)
            results = response.results(timeout_s=remaining_s, return_exceptions=True)
        except DeploymentUnavailableError:
            return [], []  # no replica is running; those that start pull the newest
        except (TimeoutError, RayServeException, ServiceError) as error:
            return [], [f"no answer from the policy replicas: {error}"]
        problems = [_first_line(item) for item in results if isinstance(item, BaseException)]
        return [item for item in results if isinstance(item, int)], problems

    def _restore(self, settings: Settings) -> PublishedWeights | None:
        with open_store(settings) as store:
            run_id = open_run(settings, store)
            for version in reversed(store.list_versions(run_id)):
                try:
                    return _put(read_snapshot(snapshot_path(settings.weights_dir, version.version)))
                except WeightsError as error:
                    store.add_event(
                        run_id, kind="snapshot_damaged", severity="error", message=str(error)
                    )
        return None


def _put(snapshot: Snapshot) -> PublishedWeights:
    return PublishedWeights(guidance=snapshot.guidance, state=[ray.put(snapshot.state_dict)])


def _first_line(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause) else ''}"


def ensure_weight_store(settings: Settings) -> Any:
    """Handle of the cluster's weight store, started if there is none."""
    actor = ray.remote(WeightStore)
    return actor.options(
        name=names.WEIGHT_STORE,
        namespace=names.NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_task_retries=2,
        num_cpus=0,
    ).remote(settings)


class RayBroadcaster:
    """The learner's way to the replicas: `publish` through the weight store, with a time-out."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # The weight store itself waits for `swap_timeout_s`; the margin is for its own restart.
        self._fingerprint = fingerprint(settings)
        self._timeout_s = settings.weights.swap_timeout_s + 30.0

    def publish(self, snapshot: Snapshot) -> PublishReport:
        """Raises `WeightsError` with the other side's error."""
        store = ensure_weight_store(self._settings)
        try:
            report: PublishReport = ray.get(store.publish.remote(snapshot), timeout=self._timeout_s)
        except ray.exceptions.GetTimeoutError as error:
            raise WeightsError(
                f"the weight store did not confirm version {snapshot.version} within "
                f"{self._timeout_s:g} s"
            ) from error
        except ray.exceptions.RayError as error:
            raise WeightsError(
                f"version {snapshot.version} was not published: {_first_line(error)}"
            ) from error
        return report
