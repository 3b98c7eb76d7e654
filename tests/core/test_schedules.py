from __future__ import annotations

import pytest

from mentor_serve.core.schedules import learning_rate_scale


def test_learning_rate_falls_by_a_cosine_to_its_final_ratio() -> None:
    # 0.1 + 0.9 * (1 + cos(pi * s / 100)) / 2: s = 0 gives 1, s = 50 gives 0.1 + 0.45, s = 100 0.1.
    values = [learning_rate_scale(s, decay_steps=100, final_ratio=0.1) for s in (0, 50, 100, 999)]
    assert values == pytest.approx([1.0, 0.55, 0.1, 0.1])


def test_without_decay_steps_the_learning_rate_stays() -> None:
    assert learning_rate_scale(10_000, decay_steps=0, final_ratio=0.1) == 1.0


@pytest.mark.parametrize(("steps", "ratio"), [(-1, 0.1), (10, 0.0), (10, 1.5)])
def test_schedules_that_make_no_sense_are_refused(steps: int, ratio: float) -> None:
    with pytest.raises(ValueError, match="expected a number"):
        learning_rate_scale(0, decay_steps=steps, final_ratio=ratio)
