"""What the learner needs of whatever holds the trained model and its optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from mentor_serve.learner.batch import TrainingBatch
from mentor_serve.learner.config import UpdateConfig
from mentor_serve.learner.step import UpdateMetrics


class TrainingBackend(Protocol):
    """One trained model with its optimiser. Called from one thread."""

    def build(self, model: PreTrainedModel) -> None:
        """Take over `model` and make a fresh optimiser. Called again, it starts anew."""

    @property
    def model(self) -> PreTrainedModel:
        """The architecture being trained: configuration and file layout, not its weights."""

    def step(self, batch: TrainingBatch, config: UpdateConfig) -> UpdateMetrics:
        """Make one update. After an exception the weights are undefined until `load`."""

    def full_state(self) -> dict[str, Tensor]:
        """A copy of all weights on the CPU, tied ones once; later steps do not change it."""

    def load_weights(self, state_dict: Mapping[str, Tensor]) -> None:
        """Replace the weights and forget the optimiser's moments.

        Raises:
            WeightsError: names or shapes that are not the model's.
        """

    def save(self, directory: Path) -> None:
        """Write weights and optimiser state into an empty directory."""

    def load(self, directory: Path) -> None:
        """Restore exactly what `save` wrote; the next step equals the uninterrupted one."""

    def load_optimizer(self, directory: Path) -> None:
        """Restore the optimiser's moments alone from what `save` wrote."""

    def close(self) -> None:
        """Free what the backend holds."""
