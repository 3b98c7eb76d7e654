"""Computes again what a run stored, from its kept weights, and says where the two first differ.

`replay_rollouts` takes trajectories apart token by token, `replay_update` an update's loss and
numbers. Both use the learner's own code and change nothing. See docs/evaluation.md.
"""

from mentor_serve.learner.replay.comparison import (
    DEFAULT_TOLERANCE,
    UPDATE_TOLERANCE,
    Difference,
    FieldComparison,
    ReplayReport,
)
from mentor_serve.learner.replay.rollouts import replay_rollouts
from mentor_serve.learner.replay.updates import replay_update

__all__ = [
    "DEFAULT_TOLERANCE",
    "UPDATE_TOLERANCE",
    "Difference",
    "FieldComparison",
    "ReplayReport",
    "replay_rollouts",
    "replay_update",
]
