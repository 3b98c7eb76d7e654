"""A run of real parts without Ray: engine, store and learner; its rows are what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mentor_serve.actors.learner import build_learner
from mentor_serve.actors.runtime import open_run, open_store, prepare_state
from mentor_serve.engines import TorchEngine
from mentor_serve.models.loading import load_model, load_tokenizer
from mentor_serve.settings import Settings, load_settings
from mentor_serve.store import NewGroup, NewTrajectory, new_id
from mentor_serve.types import (
    Guidance,
    Rollout,
    RolloutRequest,
    SamplingParams,
    Score,
    Task,
    TrajectoryKind,
)
from mentor_serve.weights import PublishReport, Snapshot

NUM_STEPS = 3
OVERRIDES = {
    "rollout.num_on_policy": 4,
    "rollout.num_mixed": 2,
    "rollout.max_new_tokens": 20,
    "learner.prompts_per_step": 2,
    "learner.mini_batch_prompts": 2,
    "learner.learning_rate": 1e-3,
}


class EngineBroadcaster:
    """`Broadcaster` to one engine of this process."""

    def __init__(self, engine: TorchEngine) -> None:
        self._engine = engine

    def publish(self, snapshot: Snapshot) -> PublishReport:
        assert snapshot.state_dict is not None
        self._engine.load_weights(snapshot.state_dict, version=snapshot.version)
        return PublishReport(version=snapshot.version, num_replicas=1)


def train(home: Path, *, num_steps: int = NUM_STEPS, **overrides: object) -> Settings:
    """Train `num_steps` updates under `home`; versions 0 to `num_steps` are then kept."""
    settings = load_settings([], {"home": str(home), **OVERRIDES, **overrides})
    prepare_state(settings)
    engine = TorchEngine(
        policy=load_model(settings.policy.model),
        expert=load_model(settings.expert.model),
        tokenizer=load_tokenizer(settings.policy.model),
        dtype="float32",
        max_batch_size=16,
    )
    with open_store(settings) as store:
        run_id = open_run(settings, store)
        learner = build_learner(settings, store, EngineBroadcaster(engine))
        learner.start()
        number = 0
        while learner.guidance.step < num_steps:
            for _ in range(settings.learner.prompts_per_step):
                store.add_group(run_id, sample_group(engine, settings, learner.guidance, number))
                number += 1
            assert learner.run_step() is not None
        learner.close()
    return settings


def sample_group(
    engine: TorchEngine, settings: Settings, guidance: Guidance, number: int
) -> NewGroup:
    """Rollouts of one prompt with rewards drawn by its number."""
    generator = np.random.default_rng(number)
    prompt = tuple(int(token) for token in generator.integers(5, 60, 12))
    sampling = SamplingParams(
        temperature=settings.rollout.temperature, max_new_tokens=settings.rollout.max_new_tokens
    )
    kinds = {
        TrajectoryKind.ON_POLICY: settings.rollout.num_on_policy,
        TrajectoryKind.MIXED: settings.rollout.num_mixed,
    }
    requests = [
        RolloutRequest(
            prompt_token_ids=prompt,
            mixed=kind is TrajectoryKind.MIXED,
            gamma=guidance.gamma,
            num_samples=count,
            seed=number,
            sampling=sampling,
        )
        for kind, count in kinds.items()
    ]
    trajectories = []
    for kind, rollouts in zip(kinds, engine.generate(requests), strict=True):
        for index, rollout in enumerate(rollouts):
            trajectories.append(_scored(kind, index, rollout, prompt, reward=index % 2))
    return NewGroup(
        group_id=new_id(),
        task=Task(source="test", prompt=f"problem {number}", answer="1"),
        guidance=guidance,
        trajectories=trajectories,
    )


def _scored(
    kind: TrajectoryKind, index: int, rollout: Rollout, prompt: tuple[int, ...], *, reward: int
) -> NewTrajectory:
    return NewTrajectory(
        rollout=rollout,
        kind=kind,
        sample_index=index,
        score=Score(reward=float(reward), accuracy=float(reward), format_score=1.0),
        prompt_token_ids=prompt,
    )
