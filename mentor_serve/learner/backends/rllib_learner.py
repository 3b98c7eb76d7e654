"""The policy as RLlib knows it: an `RLModule` around the causal LM, trained by a `TorchLearner`.

An update follows RLlib's own order: `forward_train`, `compute_losses`, the backward pass (through
`DistributedDataParallel` where there are several learners), `postprocess_gradients`,
`apply_gradients`. What differs is the loop around it: the micro-batches of a share differ in shape
and one optimiser step takes many of them, so `train_on` walks the share instead of `update`, whose
batches have rows that may be cut anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from torch import Tensor

from mentor_serve.learner.backends.files import (
    load_moments,
    load_training_state,
    save_training_state,
)
from mentor_serve.learner.backends.options import ModelBlueprint
from mentor_serve.learner.config import TrainingOptions, UpdateConfig
from mentor_serve.learner.logprobs import ResponseScorer
from mentor_serve.learner.packing import MicroBatch
from mentor_serve.learner.sharding import RankShare
from mentor_serve.learner.step import (
    MiniBatchSums,
    Scorer,
    fill_gradients,
    micro_batch_loss,
    run_share,
)
from mentor_serve.learner.trainable import Trainable

BLUEPRINT, OPTIONS, NUM_THREADS = "blueprint", "options", "num_threads"
"""Keys of the module's `model_config`."""
_MICRO_BATCH, _UPDATE, _SUMS, _PROXIMAL = "micro_batch", "update", "sums", "proximal_logprobs"
"""Keys of a batch."""
_LOGPROBS = "logprobs"
"""Key of a forward pass's output: log pi_theta of each target, [N]."""


class CausalLMModule(TorchRLModule):  # type: ignore[misc]
    """Log-probabilities of response tokens under a causal LM."""

    def setup(self) -> None:
        """Build the model that `model_config` describes; its weights come later."""
        blueprint: ModelBlueprint = self.model_config[BLUEPRINT]
        options: TrainingOptions = self.model_config[OPTIONS]
        self.trainable = Trainable(blueprint.build(), options)
        self.causal_lm = self.trainable.model
        self.scorer = ResponseScorer(self.causal_lm, temperature=1.0, autocast=options.autocast)

    def train(self, mode: bool = True) -> CausalLMModule:
        """Leave the model as it was prepared: RLlib asks for training mode before every pass."""
        self.training = mode
        return self

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        del kwargs
        return {_LOGPROBS: self.scorer(batch[_MICRO_BATCH])}


class GrpoTorchLearner(TorchLearner):  # type: ignore[misc]
    """One `Rank`: AdamW on Eq. 9, gradients summed over learners."""

    def build(self) -> None:
        """Bound torch's threads, then build module and optimiser."""
        num_threads = self._module_spec.model_config[NUM_THREADS]
        if num_threads and self.config.num_learners > 0:
            torch.set_num_threads(num_threads)
        super().build()

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """AdamW over what the module trains; `train_on` sets the learning rate."""
        del config
        options: TrainingOptions = self.module[module_id].model_config[OPTIONS]
        parameters = self.module[module_id].trainable.parameters
        self.register_optimizer(
            module_id=module_id,
            optimizer=torch.optim.AdamW(
                parameters, lr=options.learning_rate, weight_decay=options.weight_decay
            ),
            params=parameters,
        )

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: dict[str, Any]
    ) -> Tensor:
        """The micro-batch's part of Eq. 9 (0-d)."""
        del module_id, config
        return micro_batch_loss(
            lambda _: fwd_out[_LOGPROBS],
            batch[_MICRO_BATCH],
            batch[_UPDATE],
            batch[_SUMS],
            proximal_logprobs_N=batch[_PROXIMAL],
        )

    def postprocess_gradients_for_module(
        self, *, module_id: str, config: Any = None, module_gradients_dict: dict[Any, Tensor]
    ) -> dict[Any, Tensor]:
        """Clip to the update's norm, in place; the norm before that is kept for `train_on`."""
        gradients: dict[Any, Tensor] = super().postprocess_gradients_for_module(
            module_id=module_id, config=config, module_gradients_dict=module_gradients_dict
        )
        # torch's own, so that all backends clip alike to the last bit.
        norm = torch.nn.utils.get_total_norm(gradients.values())
        torch.nn.utils.clip_grads_with_norm_(gradients, self._max_grad_norm, norm)
        self._grad_norm = float(norm)
        return gradients

    # The six calls of a rank

    def train_on(self, share: RankShare, config: UpdateConfig) -> list[MiniBatchSums]:
        """Make one update together with the other learners."""
        options: TrainingOptions = self._policy.model_config[OPTIONS]
        for group in self._adamw.param_groups:
            group["lr"] = options.learning_rate * config.learning_rate_scale
        self._policy.scorer.temperature = config.temperature
        self._max_grad_norm = config.max_grad_norm
        driver = _LearnerDriver(self)
        sums = run_share(
            self._score,
            share,
            config,
            device=self._policy.causal_lm.device,
            driver=driver,
            compute_loss=self._loss,
        )
        driver.zero_grad()
        return sums

    def load_published(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take these weights, with fresh adapters and moments."""
        self._policy.trainable.load_published(state_dict)
        self._adamw.state.clear()

    def published(self) -> dict[str, Tensor] | None:
        """All weights on the CPU; None on all learners but the first."""
        if self._learner_index > 0:
            return None
        trainable: Trainable = self._policy.trainable
        return trainable.published(trainable.raw_tensors())

    def save(self, directory: str) -> None:
        """Write the checkpoint, where this is the first learner: all hold the same."""
        if self._learner_index == 0:
            save_training_state(Path(directory), self._policy.trainable, self._adamw)

    def load(self, directory: str) -> None:
        """Restore what `save` wrote."""
        load_training_state(Path(directory), self._policy.trainable, self._adamw)

    def load_optimizer(self, directory: str) -> None:
        """Restore the moments alone."""
        load_moments(Path(directory), self._adamw)

    @property
    def _policy(self) -> CausalLMModule:
        module: CausalLMModule = self.module[DEFAULT_MODULE_ID].unwrapped()
        return module

    @property
    def _adamw(self) -> torch.optim.AdamW:
        optimizer: torch.optim.AdamW = self.get_optimizer()
        return optimizer

    def _score(self, micro_batch: MicroBatch) -> Tensor:
        fwd_out = self.module.forward_train({DEFAULT_MODULE_ID: {_MICRO_BATCH: micro_batch}})
        logprobs_N: Tensor = fwd_out[DEFAULT_MODULE_ID][_LOGPROBS]
        return logprobs_N

    def _loss(
        self,
        scorer: Scorer,
        micro_batch: MicroBatch,
        config: UpdateConfig,
        sums: MiniBatchSums,
        *,
        proximal_logprobs_N: Tensor | None = None,
    ) -> Tensor:
        del scorer  # forward_train, next, is the same
        batch = {
            DEFAULT_MODULE_ID: {
                _MICRO_BATCH: micro_batch,
                _UPDATE: config,
                _SUMS: sums,
                _PROXIMAL: proximal_logprobs_N,
            }
        }
        fwd_out = self.module.forward_train(batch)
        loss: Tensor = self.compute_losses(fwd_out=fwd_out, batch=batch)[DEFAULT_MODULE_ID]
        return loss


class _LearnerDriver:
    """`OptimizerDriver` over the learner's hooks."""

    def __init__(self, learner: GrpoTorchLearner) -> None:
        self._learner = learner
        self._world_size = max(1, learner.config.num_learners)
        self._parameters = learner._policy.trainable.parameters

    def zero_grad(self) -> None:
        """Free all gradients."""
        self._learner._adamw.zero_grad(set_to_none=True)

    @contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        """DDP reduces in the last backward pass of a mini-batch; until then ranks accumulate."""
        module = self._learner.module[DEFAULT_MODULE_ID]
        waits = self._learner.distributed and not is_last
        with module.no_sync() if waits else nullcontext():
            yield

    def backward(self, loss: Tensor) -> None:
        """Accumulate; DDP averages over learners, so that this makes a sum of it."""
        (loss * self._world_size).backward()

    def finish(self) -> float:
        """Clip and step through RLlib's hooks."""
        fill_gradients(self._parameters)
        gradients = self._learner.postprocess_gradients(
            {parameter: parameter.grad for parameter in self._parameters}
        )
        norm = self._learner._grad_norm
        if math.isfinite(norm):
            self._learner.apply_gradients(gradients)
        return norm
