"""Small comparisons for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mentor_serve.experiments.presets import IN_DOMAIN, Preset
from mentor_serve.experiments.trial import TrialPlan
from mentor_serve.experiments.trial_log import TrialLog
from mentor_serve.reports.trials import Bench


def tiny_preset(**changes: Any) -> Preset:
    """Three updates of two prompts."""
    values: dict[str, Any] = {
        "name": "tiny",
        "num_updates": 3,
        "prompts_per_update": 2,
        "seeds": (0,),
        "learning_rates": (1e-3,),
        "sweep_seeds": (),
        "ablation_seeds": (),
        "evaluate_every": 3,
        "num_validation": 4,
        "num_test": 4,
        "num_samples": 2,
        "suites": (IN_DOMAIN,),
        "validation_samples": 2,
        "settings": {"rollout.max_new_tokens": 48},
    }
    return Preset(**(values | changes))


def bench_in(home: Path, **changes: Any) -> Bench:
    """A comparison of that preset in a directory."""
    return Bench(preset=tiny_preset(**changes), home=home, base={}, keep_trajectories=True)


def plan_of(arm: str, **changes: Any) -> TrialPlan:
    """A main trial with a learning rate that moves the weights."""
    return TrialPlan(**({"stage": "main", "arm": arm, "learning_rate": 1e-3} | changes))


def measured(bench: Bench, plan: TrialPlan) -> dict[str, list[dict[str, Any]]]:
    """What a trial's log says, without times and ids."""
    log = TrialLog(bench.log_path(plan))
    noisy = {"collect_s", "update_s", "step_time_s", "wait_time_s", "expert_tokens", "expert_calls"}
    return {
        kind: [
            {name: value for name, value in entry.items() if name not in noisy}
            for entry in log.entries(kind)
        ]
        for kind in ("update", "evaluation", "done")
    }
