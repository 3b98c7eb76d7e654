"""Data-parallel learners of RLlib: `LearnerGroup` with 0, 1 or more learners.

With 0 the learner lives in the caller's process and needs no Ray cluster. With more, RLlib starts
the actors, their process group and `DistributedDataParallel`; a learner that dies is not restarted
by RLlib, so the group is watched here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from mentor_serve.learner.backends.actor_group import ActorGroup, reserve, starting
from mentor_serve.learner.backends.files import require_training_state
from mentor_serve.learner.backends.options import ModelBlueprint, RankOptions
from mentor_serve.learner.backends.ranked import RankedBackend, RankGroup
from mentor_serve.learner.backends.rllib_learner import (
    BLUEPRINT,
    NUM_THREADS,
    OPTIONS,
    CausalLMModule,
    GrpoTorchLearner,
)
from mentor_serve.learner.config import TrainingOptions

# RLlib wants the spaces of an environment; a language model has none that mean anything.
_NO_SPACE: gym.Space[Any] = gym.spaces.Discrete(1)


class RllibBackend(RankedBackend):
    """`TrainingBackend` on RLlib's learners."""

    def __init__(
        self, options: TrainingOptions | None = None, ranks: RankOptions | None = None
    ) -> None:
        super().__init__(options, ranks or RankOptions())

    def start(self, blueprint: ModelBlueprint) -> RankGroup:
        """Start the learners, with random weights."""
        config = self._config()
        spec = RLModuleSpec(
            module_class=CausalLMModule,
            observation_space=_NO_SPACE,
            action_space=_NO_SPACE,
            model_config={
                BLUEPRINT: blueprint,
                OPTIONS: self.options,
                NUM_THREADS: self.ranks.num_threads,
            },
        )
        if self.ranks.num_learners == 0:
            return _LocalGroup(LearnerGroup(config=config, module_spec=spec))
        bundles = reserve(self.ranks)
        with starting(bundles, timeout_s=self.ranks.start_timeout_s):
            group = LearnerGroup(config=config, module_spec=spec, placement_group=bundles)
        # LearnerGroup's own calls wait for every learner, for ever where one hangs.
        return ActorGroup(
            group._workers, call_timeout_s=self.ranks.call_timeout_s, end=group.shutdown
        )

    def check_checkpoint(self, directory: Path) -> None:
        """Look for the files of learners that hold the whole model.

        Raises:
            WeightsError: they are not there.
        """
        require_training_state(directory)

    def _config(self) -> Any:
        ranks = self.ranks
        is_local_gpu = ranks.num_learners == 0 and self.options.device.startswith("cuda")
        return (
            AlgorithmConfig()
            .framework(
                "torch",
                # Buffers are constants (rotary frequencies); sending them would cost a collective
                # operation a forward pass.
                torch_ddp_kwargs={"forward_sync_buffers": False},
                # RLlib would step with NaN replaced by 0; the driver leaves such steps out.
                torch_skip_nan_gradients=True,
            )
            .learners(
                learner_class=GrpoTorchLearner,
                num_learners=ranks.num_learners,
                num_cpus_per_learner=ranks.num_cpus,
                num_gpus_per_learner=1 if is_local_gpu else ranks.num_gpus,
                num_aggregator_actors_per_learner=1,  # no connector: batches come ready made
            )
        )


class _LocalGroup:
    """`RankGroup` of the one learner in this process."""

    def __init__(self, group: LearnerGroup) -> None:
        self._group = group

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call the learner."""
        results = self._group.foreach_learner(lambda learner: getattr(learner, method)(*arguments))
        return [result.get() for result in results]

    def scatter(self, method: str, values: Sequence[Any], *arguments: Any) -> list[Any]:
        """Call the learner with the one value there is."""
        (value,) = values
        return self.call(method, value, *arguments)

    def close(self) -> None:
        """Free the learner."""
        self._group.shutdown()

    def kill(self) -> None:
        """The same: it shares this process."""
        self.close()
