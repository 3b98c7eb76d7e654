"""Knobs of the ranks that a backend trains on, and what a rank builds its model from."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

BackendName = Literal["torch", "rllib", "deepspeed"]
ZeroOffload = Literal["none", "optimizer", "parameters"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOptions:
    """How many ranks there are, and what each gets."""

    num_learners: int = 0
    """Ranks with a process of their own; 0: the caller's process (torch and rllib only)."""
    num_cpus: float = 0.5
    """CPUs that Ray books for a rank."""
    num_gpus: int = 0
    """GPUs of a rank: 0 or 1."""
    num_threads: int = 1
    """Threads of torch in a rank; 0 keeps torch's own choice."""
    start_timeout_s: float = 300.0
    """How long placing and starting the ranks may take."""
    call_timeout_s: float = 1800.0
    """How long one call (an update, a checkpoint) may take before the ranks are given up. A rank
    that dies is noticed at once; this is for those that hang."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed: 0 copies everything to each rank; 1 partitions the optimiser's state, 2 gradients
    too, 3 parameters too."""
    zero_offload: ZeroOffload = "none"
    """DeepSpeed: what lies in CPU memory; `parameters` includes the optimiser's state."""
    zero_options: Mapping[str, Any] = field(default_factory=dict)
    """DeepSpeed: further keys of its `zero_optimization` section."""


@dataclass(frozen=True, slots=True)
class ModelBlueprint:
    """An architecture without weights, light enough to travel to every rank."""

    model_class: type[PreTrainedModel]
    config: Any

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelBlueprint:
        """The blueprint of a model."""
        return cls(type(model), copy.deepcopy(model.config))

    def build(self) -> PreTrainedModel:
        """A model with random weights on the CPU; the process's generators stay as they were."""
        with torch.random.fork_rng(devices=[]):
            return self.model_class(copy.deepcopy(self.config))
