"""DeepSpeed's ZeRO stages 0 to 3 on ranks that are Ray actors, one GPU or one CPU process each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from mentor_serve.errors import ConfigError, WeightsError
from mentor_serve.learner.backends.actor_group import ActorGroup, gather, reserve, starting
from mentor_serve.learner.backends.deepspeed_rank import DeepSpeedRank
from mentor_serve.learner.backends.files import require
from mentor_serve.learner.backends.options import ModelBlueprint, RankOptions
from mentor_serve.learner.backends.ranked import RankedBackend, RankGroup
from mentor_serve.learner.config import TrainingOptions

_LAYOUT = "deepspeed.json"
"""In a checkpoint: the ranks that wrote it. ZeRO's files fit the same number of ranks alone."""


class DeepSpeedBackend(RankedBackend):
    """`TrainingBackend` on DeepSpeed."""

    def __init__(
        self, options: TrainingOptions | None = None, ranks: RankOptions | None = None
    ) -> None:
        super().__init__(options, ranks or RankOptions(num_learners=1))
        if self.ranks.num_learners < 1:
            raise ConfigError(
                "learner.num_learners: expected at least 1 with the deepspeed backend, whose ranks "
                f"are processes of their own; got {self.ranks.num_learners}"
            )

    def start(self, blueprint: ModelBlueprint) -> RankGroup:
        """Start the ranks and let them meet."""
        ranks = self.ranks
        bundles = reserve(ranks)
        with starting(bundles, timeout_s=ranks.start_timeout_s):
            actors = [self._actor(rank, blueprint, bundles) for rank in range(self.world_size)]
            self._meet(actors)
        return ActorGroup(
            actors,
            call_timeout_s=ranks.call_timeout_s,
            # The actors end with the placement that they run in.
            end=lambda: remove_placement_group(bundles),
        )

    def save(self, directory: Path) -> None:
        """Every rank writes its files into `directory`, which all must be able to reach."""
        super().save(directory)
        (directory / _LAYOUT).write_text(json.dumps(self._layout) + "\n", encoding="utf-8")

    def check_checkpoint(self, directory: Path) -> None:
        """Look for DeepSpeed's files, of this number of ranks and this stage.

        Raises:
            WeightsError: they are not there.
        """
        require(directory, _LAYOUT)
        found = json.loads((directory / _LAYOUT).read_text(encoding="utf-8"))
        if found != self._layout:
            raise WeightsError(
                f"expected a checkpoint of {self._layout} in {directory}, found one of {found}; "
                "set learner.num_learners and zero_stage back, or remove the run's checkpoints to "
                "go on from the snapshot of its newest version"
            )

    @property
    def _layout(self) -> dict[str, int]:
        return {"num_learners": self.world_size, "zero_stage": self.ranks.zero_stage}

    def _actor(self, rank: int, blueprint: ModelBlueprint, bundles: PlacementGroup) -> Any:
        ranks = self.ranks
        return (
            ray.remote(DeepSpeedRank)
            .options(
                num_cpus=ranks.num_cpus,
                num_gpus=ranks.num_gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=bundles, placement_group_bundle_index=rank
                ),
            )
            .remote(rank, blueprint=blueprint, options=self.options, ranks=ranks)
        )

    def _meet(self, actors: list[Any]) -> None:
        timeout_s = self.ranks.start_timeout_s
        nodes = gather(
            [item.address.remote() for item in actors], timeout_s=timeout_s, what="start"
        )
        # Ranks of one machine need not be reachable from others.
        host = "127.0.0.1" if len(set(nodes)) == 1 else nodes[0]
        (port,) = gather([actors[0].open_store.remote(host)], timeout_s=timeout_s, what="start")
        refs = [item.join.remote(host, port) for item in actors]
        gather(refs, timeout_s=timeout_s, what="start")
