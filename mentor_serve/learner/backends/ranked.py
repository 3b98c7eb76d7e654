"""A backend whose model is held by one or more ranks.

The caller's process keeps the architecture alone. It cuts an update into shares, sends each rank
its own and adds up what comes back. What a rank does is up to the framework; what it is asked is
always the same six calls (`Rank`).

A group in which anything failed is given up as a whole: the other ranks may wait for ever in a
collective operation that the failed one left. `load` and `load_weights` start a new group.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from mentor_serve.errors import LearnerWorkerLost
from mentor_serve.learner.backends.options import ModelBlueprint, RankOptions
from mentor_serve.learner.batch import TrainingBatch
from mentor_serve.learner.config import TrainingOptions, UpdateConfig
from mentor_serve.learner.sharding import RankShare, plan_update
from mentor_serve.learner.step import MiniBatchSums, UpdateMetrics, summarise
from mentor_serve.learner.trainable import check_weights, skeleton_of

_log = logging.getLogger(__name__)


class Rank(Protocol):
    """What every rank of a group answers, all ranks the same call at the same time."""

    def load_published(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take these weights, with fresh adapters and moments."""

    def train_on(self, share: RankShare, config: UpdateConfig) -> list[MiniBatchSums]:
        """Make one update together with the other ranks."""

    def published(self) -> dict[str, Tensor] | None:
        """All weights on the CPU under published names; None on all ranks but the first."""

    def save(self, directory: str) -> None:
        """Write this rank's part of a checkpoint."""

    def load(self, directory: str) -> None:
        """Restore it."""

    def load_optimizer(self, directory: str) -> None:
        """Restore the moments alone."""


class RankGroup(Protocol):
    """Ranks that are called together."""

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call every rank with the same arguments; the results in the order of ranks."""

    def scatter(self, method: str, values: Sequence[Any], *arguments: Any) -> list[Any]:
        """Call every rank with its own value, then the same arguments."""

    def close(self) -> None:
        """End the ranks."""

    def kill(self) -> None:
        """End the ranks at once, whatever state they are in."""


class RankedBackend(ABC):
    """`TrainingBackend` over a `RankGroup`."""

    def __init__(self, options: TrainingOptions | None, ranks: RankOptions) -> None:
        self.options = options or TrainingOptions()
        self.ranks = ranks
        self.world_size = max(1, ranks.num_learners)
        self._skeleton: PreTrainedModel | None = None
        self._blueprint: ModelBlueprint | None = None
        self._group: RankGroup | None = None

    @abstractmethod
    def start(self, blueprint: ModelBlueprint) -> RankGroup:
        """Start ranks that hold an untrained model."""

    def build(self, model: PreTrainedModel) -> None:
        """Start the ranks with `model`'s weights; the model itself is not kept."""
        blueprint = ModelBlueprint.of(model)
        if blueprint != self._blueprint:
            self.close()
        self._blueprint, self._skeleton = blueprint, skeleton_of(model)
        self._restart_if_lost()
        self._call("load_published", dict(model.state_dict()))

    @property
    def model(self) -> PreTrainedModel:
        """Configuration and file layout, without weights."""
        if self._skeleton is None:
            raise RuntimeError("expected a built backend; call build(model) first")
        return self._skeleton

    def step(self, batch: TrainingBatch, config: UpdateConfig) -> UpdateMetrics:
        """Make one update.

        Raises:
            LearnerWorkerLost: a rank died or hung, now or before; `load` starts new ranks.
        """
        shares = plan_update(batch, config, world_size=self.world_size)
        parts = self._guarded(lambda group: group.scatter("train_on", shares, config))
        sums = [MiniBatchSums.joined(mini_batch) for mini_batch in zip(*parts, strict=True)]
        rate = self.options.learning_rate * config.learning_rate_scale
        return summarise(sums, learning_rate=rate)

    def full_state(self) -> dict[str, Tensor]:
        """Independent CPU copy of the weights, tied ones once."""
        state: dict[str, Tensor] = self._call("published")[0]
        return state

    def load_weights(self, state_dict: Mapping[str, Tensor]) -> None:
        """Replace the weights; the optimiser starts afresh.

        Raises:
            WeightsError: names or shapes that are not the model's; nothing was changed.
        """
        tied = set(self.model.all_tied_weights_keys)
        # Checked here: an error inside the ranks would cost their lives.
        check_weights(
            {name: item for name, item in self.model.state_dict().items() if name not in tied},
            {name: item for name, item in state_dict.items() if name not in tied},
        )
        self._restart_if_lost()
        self._call("load_published", dict(state_dict))

    def save(self, directory: Path) -> None:
        """Every rank writes its part into `directory`, which all must be able to reach."""
        self._call("save", str(directory.resolve()))

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote, in new ranks where the old ones are gone.

        Raises:
            WeightsError: another backend's checkpoint, or one of other ranks.
        """
        self.check_checkpoint(directory)
        self._restart_if_lost()
        self._call("load", str(directory.resolve()))

    def load_optimizer(self, directory: Path) -> None:
        """Restore the moments; learning rate and weight decay stay this backend's own."""
        self.check_checkpoint(directory)
        self._call("load_optimizer", str(directory.resolve()))

    def close(self) -> None:
        """End the ranks and forget the model."""
        group, self._group = self._group, None
        self._blueprint = self._skeleton = None
        if group is not None:
            group.close()

    @abstractmethod
    def check_checkpoint(self, directory: Path) -> None:
        """Look whether ranks like these wrote `directory`, before any of them tries to read it.

        Raises:
            WeightsError: they did not.
        """

    def _restart_if_lost(self) -> None:
        if self._group is None:
            if self._blueprint is None:
                raise RuntimeError("expected a built backend; call build(model) first")
            self._group = self.start(self._blueprint)

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        return self._guarded(lambda group: group.call(method, *arguments))

    def _guarded(self, call: _Call) -> list[Any]:
        """Run a call on the group, and give the group up where it fails."""
        group = self._group
        if group is None:
            if self._skeleton is None:
                raise RuntimeError("expected a built backend; call build(model) first")
            raise LearnerWorkerLost(
                "expected running ranks, but they were given up after an error; "
                "load a checkpoint to start new ones"
            )
        try:
            return call(group)
        except BaseException:
            self._group = None
            _log.warning("the %d ranks of the learner are given up", self.world_size)
            group.kill()
            raise


class _Call(Protocol):
    def __call__(self, group: RankGroup, /) -> list[Any]: ...
