"""Every preset can be asked for what it says."""

from __future__ import annotations

import pytest

from mentor_serve.actors.workload import task_source
from mentor_serve.experiments.arms import arm_named
from mentor_serve.experiments.measurement import split_problems
from mentor_serve.experiments.presets import PRESETS
from mentor_serve.reports.comparison import main_plans, sweep_plans
from mentor_serve.reports.trials import Bench
from mentor_serve.rollout.tasks.reasoning_gym import is_held_out
from mentor_serve.settings import load_settings


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_suites_have_problems_that_training_never_sees(preset):
    settings = load_settings([], {})
    for suite in preset.suites:
        split = split_problems(
            suite, lambda seed: task_source(settings, seed=seed), num_validation=6, num_test=6
        )
        texts = [task.prompt for tasks in split.values() for task in tasks]
        assert len(set(texts)) == 12, suite.name
        assert all(is_held_out(text) for text in texts)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_plans_are_unique_and_their_settings_valid(preset, tmp_path):
    plans = sweep_plans(preset) + main_plans(preset, {"mentor": 1e-4})
    assert len({plan.key for plan in plans}) == len(plans)
    bench = Bench(preset=preset, home=tmp_path, base={})
    for plan in plans:
        settings = bench.settings(plan)
        assert settings.run_name == plan.key
        if plan.arm in ("base", "expert"):
            continue
        assert settings.tasks.seed == plan.seed
        assert settings.guidance.method == arm_named(plan.arm).settings["guidance.method"]
    assert not set(preset.seeds) & set(preset.sweep_seeds)
    assert set(preset.ablation_seeds) <= set(preset.seeds)


def test_an_arm_that_is_unknown_is_named():
    with pytest.raises(KeyError, match="mentro"):
        arm_named("mentro")
