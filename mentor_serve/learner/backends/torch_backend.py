"""One process, one device: float32 parameters and AdamW.

Refused: more than one device (that is another backend's business), half-precision parameters (small
updates would be lost in rounding; they are converted).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from mentor_serve.errors import WeightsError
from mentor_serve.learner.batch import TrainingBatch
from mentor_serve.learner.config import UpdateConfig
from mentor_serve.learner.step import UpdateMetrics, mixed_grpo_update

_WEIGHTS = "weights.safetensors"
_OPTIMIZER = "optimizer.pt"
_MASKED_ATTENTION = ("sdpa", "eager")


class TorchBackend:
    """`TrainingBackend` on plain torch."""

    def __init__(
        self,
        *,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.01,
        device: str = "cpu",
    ) -> None:
        self._learning_rate = learning_rate
        self._weight_decay = weight_decay
        self._device = torch.device(device)
        self._model: PreTrainedModel | None = None
        self._optimizer: torch.optim.AdamW | None = None

    def build(self, model: PreTrainedModel) -> None:
        """Take over `model`; its parameters become float32 on this backend's device."""
        model = model.to(device=self._device, dtype=torch.float32)
        if model.config._attn_implementation not in _MASKED_ATTENTION:
            # Packed rows need an attention that takes a mask of its own.
            model.set_attn_implementation("sdpa")
        model.eval()  # dropout would make the ratio of Eq. 9 differ from 1 on fresh data
        model.requires_grad_(True)
        self._model = model
        self._optimizer = self._new_optimizer(model)

    @property
    def model(self) -> PreTrainedModel:
        """The model being trained."""
        if self._model is None:
            raise RuntimeError("expected a built backend; call build(model) first")
        return self._model

    @property
    def optimizer(self) -> torch.optim.AdamW:
        """AdamW over all parameters."""
        if self._optimizer is None:
            raise RuntimeError("expected a built backend; call build(model) first")
        return self._optimizer

    def step(self, batch: TrainingBatch, config: UpdateConfig) -> UpdateMetrics:
        """One update in place."""
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self._learning_rate * config.learning_rate_scale
        return mixed_grpo_update(self.model, batch, config, optimizer=self.optimizer)

    def full_state(self) -> dict[str, Tensor]:
        """Independent CPU copy of the weights, tied ones once."""
        return {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in self._stored_tensors().items()
        }

    def load_weights(self, state_dict: Mapping[str, Tensor]) -> None:
        """Replace the weights; the optimiser starts afresh.

        Raises:
            WeightsError: names or shapes that are not the model's.
        """
        self._copy_weights(state_dict)
        self._optimizer = self._new_optimizer(self.model)

    def save(self, directory: Path) -> None:
        """Weights as safetensors, optimiser state as a torch file that holds tensors only."""
        save_file(self.full_state(), directory / _WEIGHTS, metadata={"format": "pt"})
        torch.save(self.optimizer.state_dict(), directory / _OPTIMIZER)

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote."""
        self._copy_weights(load_file(directory / _WEIGHTS))
        self._optimizer = self._new_optimizer(self.model)
        self.load_optimizer(directory)

    def load_optimizer(self, directory: Path) -> None:
        """Restore the moments; learning rate and weight decay stay this backend's own."""
        state = torch.load(directory / _OPTIMIZER, map_location=self._device, weights_only=True)
        # A changed setting must count after a restart, so only the moments are taken over.
        state["param_groups"] = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(state)

    def close(self) -> None:
        """Drop model and optimiser."""
        self._model = None
        self._optimizer = None

    def _new_optimizer(self, model: PreTrainedModel) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            model.parameters(), lr=self._learning_rate, weight_decay=self._weight_decay
        )

    def _stored_tensors(self) -> dict[str, Tensor]:
        tied = self.model.all_tied_weights_keys
        return {name: item for name, item in self.model.state_dict().items() if name not in tied}

    @torch.no_grad()
    def _copy_weights(self, state_dict: Mapping[str, Tensor]) -> None:
        own = self._stored_tensors()
        tied = self.model.all_tied_weights_keys
        given = {name: item for name, item in state_dict.items() if name not in tied}
        unexpected, missing = sorted(given.keys() - own.keys()), sorted(own.keys() - given.keys())
        if unexpected or missing:
            raise WeightsError(
                f"expected the weights of this policy, but missing are {missing[:3]} and "
                f"unexpected are {unexpected[:3]}; check policy.model"
            )
        for name, tensor in own.items():
            if tensor.shape != given[name].shape:
                raise WeightsError(
                    f"weight {name}: expected shape {tuple(tensor.shape)}, got "
                    f"{tuple(given[name].shape)}; check policy.model"
                )
        for name, tensor in own.items():
            tensor.copy_(given[name])
