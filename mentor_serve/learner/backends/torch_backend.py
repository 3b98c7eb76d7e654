"""One process, one device: float32 parameters and AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mentor_serve.learner.backends.files import (
    load_moments,
    load_training_state,
    save_training_state,
)
from mentor_serve.learner.batch import TrainingBatch
from mentor_serve.learner.config import TrainingOptions, UpdateConfig
from mentor_serve.learner.logprobs import ResponseScorer
from mentor_serve.learner.sharding import plan_update
from mentor_serve.learner.step import LocalDriver, UpdateMetrics, run_share, summarise
from mentor_serve.learner.trainable import Trainable


class TorchBackend:
    """`TrainingBackend` on plain torch."""

    def __init__(self, options: TrainingOptions | None = None) -> None:
        self._options = options or TrainingOptions()
        self._trainable: Trainable | None = None
        self._optimizer: torch.optim.AdamW | None = None

    def build(self, model: PreTrainedModel) -> None:
        """Take over `model`; its parameters become float32 on this backend's device."""
        self._trainable = Trainable(model, self._options)
        self._optimizer = self._new_optimizer()

    @property
    def trainable(self) -> Trainable:
        """The model being trained."""
        if self._trainable is None:
            raise RuntimeError("expected a built backend; call build(model) first")
        return self._trainable

    @property
    def model(self) -> PreTrainedModel:
        """Configuration and file layout."""
        return self.trainable.skeleton

    @property
    def optimizer(self) -> torch.optim.AdamW:
        """AdamW over all trained parameters."""
        if self._optimizer is None:
            raise RuntimeError("expected a built backend; call build(model) first")
        return self._optimizer

    def step(self, batch: TrainingBatch, config: UpdateConfig) -> UpdateMetrics:
        """One update in place."""
        learning_rate = self._options.learning_rate * config.learning_rate_scale
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = learning_rate
        model = self.trainable.model
        (share,) = plan_update(batch, config, world_size=1)
        scorer = ResponseScorer(
            model, temperature=config.temperature, autocast=self._options.autocast
        )
        driver = LocalDriver(self.optimizer, max_grad_norm=config.max_grad_norm)
        sums = run_share(scorer, share, config, device=model.device, driver=driver)
        driver.zero_grad()
        return summarise(sums, learning_rate=learning_rate)

    def full_state(self) -> dict[str, Tensor]:
        """Independent CPU copy of the weights, tied ones once."""
        return self.trainable.published(self.trainable.raw_tensors())

    def load_weights(self, state_dict: Mapping[str, Tensor]) -> None:
        """Replace the weights; the optimiser starts afresh.

        Raises:
            WeightsError: names or shapes that are not the model's.
        """
        self.trainable.load_published(state_dict)
        self._optimizer = self._new_optimizer()

    def save(self, directory: Path) -> None:
        """Weights as safetensors, optimiser state as a torch file that holds tensors only."""
        save_training_state(directory, self.trainable, self.optimizer)

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote.

        Raises:
            WeightsError: another backend's checkpoint, or another model's.
        """
        load_training_state(directory, self.trainable, self.optimizer)

    def load_optimizer(self, directory: Path) -> None:
        """Restore the moments; learning rate and weight decay stay this backend's own."""
        load_moments(directory, self.optimizer)

    def close(self) -> None:
        """Drop model and optimiser."""
        self._trainable = None
        self._optimizer = None

    def _new_optimizer(self) -> torch.optim.AdamW:
        options = self._options
        return torch.optim.AdamW(
            self.trainable.parameters, lr=options.learning_rate, weight_decay=options.weight_decay
        )
