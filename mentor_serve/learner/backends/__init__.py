"""What computes an update. Import the backend you need from its own module."""

from __future__ import annotations

from mentor_serve.learner.backends.base import TrainingBackend

__all__ = ["TrainingBackend"]
