"""The learner actor: the training loop in a thread, with status, pause and stop beside it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import ray
import structlog

from mentor_serve.actors import names
from mentor_serve.actors.detached import fingerprint
from mentor_serve.actors.runtime import enter_process, open_run, open_store, prepare_state
from mentor_serve.actors.weight_store import RayBroadcaster
from mentor_serve.errors import StoreUnavailable, WeightsError
from mentor_serve.models.loading import load_model, load_tokenizer
from mentor_serve.settings import Settings
from mentor_serve.store import TrajectoryStore, VersionRecord
from mentor_serve.store.outage import Outage
from mentor_serve.telemetry import Tracker, open_tracker
from mentor_serve.weights import Broadcaster

if TYPE_CHECKING:
    from mentor_serve.learner import Learner

log = structlog.get_logger(__name__)

T = TypeVar("T")

_STARTING = "starting"
"""`LearnerPhase.STARTING`, before there is a learner whose modules could say so."""

# The learner's own modules are imported inside functions: the gateway and the collectors import
# this module to find the actor, and their processes should not pay for torch.


def build_learner(settings: Settings, store: TrajectoryStore, broadcaster: Broadcaster) -> Learner:
    """The run's learner, not started; nothing is read or written yet."""
    from mentor_serve.actors.learner_options import (
        learner_config,
        rank_options,
        training_options,
    )
    from mentor_serve.learner import Learner
    from mentor_serve.learner.backends import build_backend

    name = settings.policy.model
    # Ranks of their own take the weights over; this process may not even see a GPU.
    device = "cpu" if settings.learner.num_learners > 0 else settings.learner.device
    return Learner(
        store,
        run_id=open_run(settings, store),
        load_policy=lambda: (load_model(name, device=device), load_tokenizer(name)),
        backend=build_backend(
            settings.learner.backend, training_options(settings), rank_options(settings)
        ),
        broadcaster=broadcaster,
        config=learner_config(settings),
        weights_dir=settings.weights_dir,
        checkpoints_dir=settings.checkpoints_dir,
    )


def roll_back_alone(
    settings: Settings, store: TrajectoryStore, version: int, broadcaster: Broadcaster
) -> VersionRecord:
    """Roll back where no learner runs, under the lock that keeps learners apart.

    Raises:
        WeightsError: a learner runs, the version is unknown, or its snapshot is gone or damaged.
    """
    learner = build_learner(settings, store, broadcaster)
    learner.start()
    try:
        return learner.rollback(version)
    finally:
        learner.close()


class LearnerActor:
    """Owns the learner. Ray restarts it after a crash; the database says where to go on."""

    def __init__(self, settings: Settings) -> None:
        # Nothing slow happens here: `status` answers while torch and the backend are imported and
        # ranks are started, so that a slow start is not taken for a hang.
        self._settings = settings
        self._fingerprint = fingerprint(settings)
        self._learner: Learner | None = None
        self._is_paused = False
        self._lock = threading.Lock()
        self._error: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="learner", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            learner, tracker = self._build()
            self._patiently(learner.start)
            learner.run(self._stop)
            learner.close()
            tracker.close()
        except Exception as error:
            # The thread's boundary: `status` hands the reason to the supervisor.
            log.exception("learner_died")
            self._error = f"{type(error).__name__}: {error}"

    def _build(self) -> tuple[Learner, Tracker]:
        from mentor_serve.learner.records import tracked_numbers

        settings = self._settings
        enter_process(settings, role="learner", num_threads=settings.learner.num_threads)
        self._patiently(lambda: prepare_state(settings))
        store = open_store(settings)
        learner = self._patiently(lambda: build_learner(settings, store, RayBroadcaster(settings)))
        tracker = open_tracker(
            settings.telemetry.tracker,
            directory=settings.home / "trackers" / settings.run_name,
            run_name=settings.run_name,
            config=settings.model_dump(mode="json"),
        )
        learner.add_observer(lambda record: tracker.log(tracked_numbers(record), step=record.step))
        with self._lock:
            self._learner = learner
            if self._is_paused:
                learner.pause()
        return learner, tracker

    def _patiently(self, call: Callable[[], T]) -> T:
        """What `call` returns; a store that is away is waited for, until the learner is stopped."""
        outage = Outage()
        while True:
            try:
                return call()
            except StoreUnavailable as error:
                if self._stop.is_set():
                    raise
                if outage.fail(error):
                    log.warning("learner_waits_for_the_store", error=str(error))
                self._stop.wait(outage.wait_s)

    def status(self) -> dict[str, Any]:
        """The learner's `LearnerStatus`, and `fatal_error` where its loop ended with one."""
        with self._lock:
            document: dict[str, Any]
            if self._learner is None:
                document = {"phase": _STARTING, "is_paused": self._is_paused}
            else:
                document = asdict(self._learner.status())
                # As itself it would have whoever asks import the learner's modules, and torch.
                document["phase"] = str(document["phase"])
        return {**document, "fatal_error": self._error}

    def fingerprint(self) -> str:
        """Of the settings that it runs with."""
        return self._fingerprint

    def set_paused(self, is_paused: bool) -> None:
        """Stop before the next update, or go on."""
        with self._lock:
            self._is_paused = is_paused
            if self._learner is not None:
                if is_paused:
                    self._learner.pause()
                else:
                    self._learner.resume()

    def rollback(self, version: int) -> VersionRecord:
        """Make a new version with the weights of a kept one, after the update in progress.

        Raises:
            WeightsError: the version is unknown, its snapshot is gone or damaged, or the learner
                is starting.
        """
        if not self._thread.is_alive():
            # Finished (`learner.max_steps`): it gave up model, directories and lock.
            with open_store(self._settings) as store:
                broadcaster = RayBroadcaster(self._settings)
                return roll_back_alone(self._settings, store, version, broadcaster)
        learner = self._learner
        if learner is None:
            raise WeightsError("expected a running learner, it is starting; try again")
        # Locks are not fair: a loop that always finds groups would hardly ever let us in.
        learner.pause()
        try:
            return learner.rollback(version)
        finally:
            with self._lock:
                # What was asked for last counts, also if that was during the rollback.
                if not self._is_paused:
                    learner.resume()

    def stop(self, timeout_s: float) -> bool:
        """Finish the update in progress and end the loop; False if that took too long."""
        self._stop.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


def ensure_learner(settings: Settings) -> Any:
    """Handle of the cluster's learner, started if there is none."""
    learner = settings.learner
    return (
        ray.remote(LearnerActor)
        .options(
            name=names.LEARNER,
            namespace=names.NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_concurrency=4,
            num_cpus=learner.num_cpus,
            num_gpus=learner.num_gpus,
        )
        .remote(settings)
    )
