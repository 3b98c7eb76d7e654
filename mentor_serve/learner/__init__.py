"""Mixed-policy GRPO: leased groups in, new policy versions out. See docs/training.md."""

from __future__ import annotations

from mentor_serve.learner.backends.base import TrainingBackend
from mentor_serve.learner.backends.torch_backend import TorchBackend
from mentor_serve.learner.batch import TrainingBatch, build_batch
from mentor_serve.learner.config import (
    AdvantageConfig,
    LearnerConfig,
    LoraOptions,
    TrainingOptions,
    UpdateConfig,
)
from mentor_serve.learner.loop import Learner
from mentor_serve.learner.records import LearnerPhase, LearnerStatus
from mentor_serve.learner.step import UpdateMetrics, mixed_grpo_update

__all__ = [
    "AdvantageConfig",
    "Learner",
    "LearnerConfig",
    "LearnerPhase",
    "LearnerStatus",
    "LoraOptions",
    "TorchBackend",
    "TrainingBackend",
    "TrainingBatch",
    "TrainingOptions",
    "UpdateConfig",
    "UpdateMetrics",
    "build_batch",
    "mixed_grpo_update",
]
