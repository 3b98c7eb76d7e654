"""The evaluator actor: measures versions of the policy beside the service, at low priority."""

from __future__ import annotations

import os
import threading
from dataclasses import asdict
from typing import Any

import ray
import structlog

from mentor_serve.actors import names
from mentor_serve.actors.detached import fingerprint
from mentor_serve.actors.runtime import enter_process, open_run, open_store, prepare_state
from mentor_serve.settings import Settings

log = structlog.get_logger(__name__)

NICENESS = 10
"""About a tenth of a busy core's time against processes of normal priority (0). At the lowest
priority, 19, an evaluation on a busy machine would outlast the versions it is of."""


class EvaluatorActor:
    """Runs the `EvaluationLoop` in a thread. Holds no state that SQL does not have."""

    def __init__(self, settings: Settings) -> None:
        # Here, not above: the collectors import this module to find the actor, without torch.
        from mentor_serve.actors.evaluation_loop import EvaluationLoop

        enter_process(settings, role="evaluator", num_threads=settings.evaluation.num_threads)
        prepare_state(settings)
        self._fingerprint = fingerprint(settings)
        store = open_store(settings)
        self._loop = EvaluationLoop(settings, store, open_run(settings, store))
        self._error: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="evaluator", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        # On Linux a thread's own, and that of threads and processes it starts: the engine's, the
        # verifiers'. The actor itself goes on answering.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            self._loop.run(self._stop)
        except Exception as error:
            # The thread's boundary: `status` hands the reason to the supervisor.
            log.exception("evaluator_died")
            self._error = f"{type(error).__name__}: {error}"

    def status(self) -> dict[str, Any]:
        """The loop's `EvaluatorStatus`, and `fatal_error` where it ended with one."""
        return {**asdict(self._loop.status), "fatal_error": self._error}

    def fingerprint(self) -> str:
        """Of the settings that it runs with."""
        return self._fingerprint

    def stop(self, timeout_s: float) -> bool:
        """Cut off the evaluation under way and end the loop; False if that took too long."""
        self._stop.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


def ensure_evaluator(settings: Settings) -> Any:
    """Handle of the cluster's evaluator, started if there is none."""
    evaluation = settings.evaluation
    return (
        ray.remote(EvaluatorActor)
        .options(
            name=names.EVALUATOR,
            namespace=names.NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_concurrency=4,
            num_cpus=evaluation.num_cpus,
            num_gpus=evaluation.num_gpus,
        )
        .remote(settings)
    )
