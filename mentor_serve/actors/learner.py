"""The learner actor: the training loop in a thread, with status, pause and stop beside it."""

from __future__ import annotations

import threading
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import ray
import structlog

from mentor_serve.actors import names
from mentor_serve.actors.detached import fingerprint
from mentor_serve.actors.runtime import enter_process, open_run, open_store, prepare_state
from mentor_serve.actors.weight_store import RayBroadcaster
from mentor_serve.models.loading import load_model, load_tokenizer
from mentor_serve.settings import Settings
from mentor_serve.telemetry import open_tracker

if TYPE_CHECKING:
    from mentor_serve.learner import LearnerConfig

log = structlog.get_logger(__name__)

# The learner's own modules are imported inside functions: the gateway and the collectors import
# this module to find the actor, and their processes should not pay for torch.


def learner_config(settings: Settings) -> LearnerConfig:
    """The learner's own view of the settings."""
    from mentor_serve.learner import LearnerConfig, UpdateConfig

    learner, guidance = settings.learner, settings.guidance
    return LearnerConfig(
        prompts_per_step=learner.prompts_per_step,
        max_staleness=learner.max_staleness,
        max_steps=learner.max_steps,
        alpha_initial=guidance.alpha_initial,
        alpha_steps=guidance.alpha_steps,
        reward_range=guidance.reward_range,
        entropy_quantile=guidance.entropy_quantile,
        initial_gamma=guidance.initial_gamma,
        gamma_floor=guidance.gamma_floor,
        learning_rate_decay_steps=learner.learning_rate_decay_steps,
        learning_rate_final_ratio=learner.learning_rate_final_ratio,
        checkpoint_every=learner.checkpoint_every,
        keep_checkpoints=learner.keep_checkpoints,
        keep_snapshots=settings.weights.keep_versions,
        lease_s=learner.lease_s,
        seed=learner.seed,
        update=UpdateConfig(
            mini_batch_prompts=learner.mini_batch_prompts,
            clip_low=learner.clip_low,
            clip_high=learner.clip_high,
            temperature=settings.rollout.temperature,
            max_grad_norm=learner.max_grad_norm,
            max_tokens_per_micro_batch=learner.max_tokens_per_micro_batch,
        ),
    )


class LearnerActor:
    """Owns the learner. Ray restarts it after a crash; the database says where to go on."""

    def __init__(self, settings: Settings) -> None:
        from mentor_serve.learner import Learner, TorchBackend
        from mentor_serve.learner.records import tracked_numbers

        enter_process(settings, role="learner", num_threads=settings.learner.num_threads)
        prepare_state(settings)
        store = open_store(settings)
        name, device = settings.policy.model, settings.learner.device
        self._learner = Learner(
            store,
            run_id=open_run(settings, store),
            load_policy=lambda: (load_model(name, device=device), load_tokenizer(name)),
            backend=TorchBackend(
                learning_rate=settings.learner.learning_rate,
                weight_decay=settings.learner.weight_decay,
                device=device,
            ),
            broadcaster=RayBroadcaster(settings),
            config=learner_config(settings),
            weights_dir=settings.weights_dir,
            checkpoints_dir=settings.checkpoints_dir,
        )
        self._tracker = open_tracker(
            settings.telemetry.tracker,
            directory=settings.home / "trackers" / settings.run_name,
            run_name=settings.run_name,
            config=settings.model_dump(mode="json"),
        )
        self._learner.add_observer(
            lambda record: self._tracker.log(tracked_numbers(record), step=record.step)
        )
        self._fingerprint = fingerprint(settings)
        self._error: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="learner", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._learner.start()
            self._learner.run(self._stop)
            self._learner.close()
            self._tracker.close()
        except Exception as error:
            # The thread's boundary: `status` hands the reason to the supervisor.
            log.exception("learner_died")
            self._error = f"{type(error).__name__}: {error}"

    def status(self) -> dict[str, Any]:
        """The learner's `LearnerStatus`, and `fatal_error` where its loop ended with one."""
        return {**asdict(self._learner.status()), "fatal_error": self._error}

    def fingerprint(self) -> str:
        """Of the settings that it runs with."""
        return self._fingerprint

    def set_paused(self, is_paused: bool) -> None:
        """Stop before the next update, or go on."""
        if is_paused:
            self._learner.pause()
        else:
            self._learner.resume()

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
