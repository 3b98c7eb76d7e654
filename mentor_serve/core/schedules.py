"""The annealing of alpha, the weight of mixed rollouts (paper, section 3.2)."""

from __future__ import annotations

import math


def cosine_alpha(step: int, total_steps: int, initial: float = 1.0) -> float:
    """`initial * (1 + cos(pi * step / total_steps)) / 2`: `initial` at step 0, 0 from the end on.

    Worked value: step 60 of 120 gives 0.5. Exactly 0.0 at and after `total_steps`, where mixed
    rollouts stop.

    Raises:
        ValueError: `total_steps` below 1 or `step` negative.
    """
    if total_steps < 1:
        raise ValueError(f"total_steps: expected at least 1, got {total_steps}")
    if step < 0:
        raise ValueError(f"step: expected a number >= 0, got {step}")
    if step >= total_steps:
        return 0.0
    return initial * 0.5 * (1.0 + math.cos(math.pi * step / total_steps))
