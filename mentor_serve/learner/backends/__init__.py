"""What computes an update. `build_backend` makes one by name and imports nothing else."""

from __future__ import annotations

from mentor_serve.learner.backends.base import TrainingBackend
from mentor_serve.learner.backends.factory import build_backend
from mentor_serve.learner.backends.options import BackendName, RankOptions

__all__ = ["BackendName", "RankOptions", "TrainingBackend", "build_backend"]
