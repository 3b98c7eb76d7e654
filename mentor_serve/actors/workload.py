"""The tasks and verifiers that the settings name, built the same way wherever they are needed."""

from __future__ import annotations

from mentor_serve.rollout.tasks import TaskSource, build_source
from mentor_serve.rollout.verifiers import VerifierPool
from mentor_serve.settings import Settings


def task_source(
    settings: Settings, *, shard: int = 0, num_shards: int = 1, seed: int | None = None
) -> TaskSource:
    """The source of problems, with `tasks.seed` or another; `ConfigError` if it cannot be read."""
    tasks = settings.tasks.model_dump(exclude={"system_prompt"})
    if seed is not None:
        tasks["seed"] = seed
    return build_source(**tasks, shard=shard, num_shards=num_shards)


def verifier_pool(settings: Settings) -> VerifierPool:
    """The pool of verifier processes; they start with its first batch."""
    reward = settings.reward
    return VerifierPool(
        reward.verifier,
        num_workers=reward.num_workers,
        timeout_s=reward.timeout_s,
        accuracy_weight=reward.accuracy_weight,
        format_weight=reward.format_weight,
    )
