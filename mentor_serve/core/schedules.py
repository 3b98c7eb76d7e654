"""Schedules over updates: alpha of the paper (section 3.2), and the learning rate's."""

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


def learning_rate_scale(step: int, *, decay_steps: int, final_ratio: float) -> float:
    """Factor on the learning rate: a cosine from 1 at step 0 to `final_ratio` from the end on.

    `decay_steps` 0 keeps 1 for ever, as in the paper. Worked value: step 50 of 100 with a ratio of
    0.1 gives 0.55.

    Raises:
        ValueError: `decay_steps` or `step` negative, or a ratio outside (0, 1].
    """
    if decay_steps < 0:
        raise ValueError(f"decay_steps: expected a number >= 0, got {decay_steps}")
    if not 0.0 < final_ratio <= 1.0:
        raise ValueError(f"final_ratio: expected a number in (0, 1], got {final_ratio}")
    if decay_steps == 0:
        return 1.0
    return final_ratio + cosine_alpha(step, decay_steps, initial=1.0 - final_ratio)
