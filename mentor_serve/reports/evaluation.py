"""What `mentor-serve eval` does: finds the weights, evaluates, stores, and words the result."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from mentor_serve.actors.evaluation import Progress, evaluate_model, evaluation_record
from mentor_serve.actors.runtime import open_store, prepare_state, verified_snapshot
from mentor_serve.errors import ConfigError
from mentor_serve.evaluation import GREEDY_PREFIX, EvaluationPlan, Measure, SuiteReport
from mentor_serve.settings import Settings
from mentor_serve.store import TrajectoryStore
from mentor_serve.store.evaluations import POLICY
from mentor_serve.store.records import VersionRecord

PREFIX = "policy@"


def run_evaluation(
    settings: Settings,
    model: str,
    plan: EvaluationPlan,
    *,
    on_progress: Progress | None = None,
) -> tuple[SuiteReport, dict[str, Any]]:
    """Evaluate on held-out tasks in this process and store every number in one transaction.

    Returns the report, and the same as plain JSON values.

    Args:
        settings: where the run is, and what its tasks are.
        model: `live`, `latest`, `policy@VERSION`, `expert`, or anything `policy.model` may be.
        plan: what to measure.
        on_progress: called with (responses judged, responses).

    Raises:
        ConfigError: no such version, or no such model.
        WeightsError: the version is not kept, or its file is damaged.
    """
    prepare_state(settings)
    with open_store(settings) as store:
        run_id = store.find_run(settings.run_name)
        if run_id is None:
            # A new run; one that exists keeps the settings of its last start.
            config = settings.model_dump(mode="json")
            run_id = store.open_run(settings.run_name, config, announce=False)
        version = find_version(store, run_id, model)
        if version is not None:
            name, path = POLICY, str(verified_snapshot(settings, version))
        else:
            name = path = _other_model(settings, model)
        device = settings.policy.device
        report = asyncio.run(
            evaluate_model(settings, path, plan, device=device, on_progress=on_progress)
        )
        number = None if version is None else version.version
        evaluation_id = store.add_evaluation(
            run_id, evaluation_record(report, policy_version=number, model=name)
        )
    document = {
        "evaluation_id": evaluation_id,
        "model": name,
        "policy_version": number,
        **report.as_dict(),
    }
    return report, document


def find_version(store: TrajectoryStore, run_id: str, model: str) -> VersionRecord | None:
    """The version that `live`, `latest` or `policy@N` names; None for any other model.

    `live` and `latest` of a run that has no version yet are the initial policy: None as well.

    Raises:
        ConfigError: the run has no version N.
    """
    if model == "live":
        return store.live_version(run_id)
    if model == "latest":
        return store.latest_version(run_id)
    if not model.startswith(PREFIX):
        return None
    number = model.removeprefix(PREFIX)
    version = store.version(run_id, int(number)) if number.isdecimal() else None
    if version is None:
        raise ConfigError(
            f"{model}: expected a version of this run; see `mentor-serve weights list`"
        )
    return version


def _other_model(settings: Settings, model: str) -> str:
    if model in {"live", "latest"}:
        return settings.policy.model
    if model != "expert":
        return model
    if settings.expert.model == "none":
        raise ConfigError("expert: expected a model in expert.model, got 'none'")
    return settings.expert.model


def evaluation_rows(report: SuiteReport) -> list[tuple[str, str, str]]:
    """Label, value and 95 % interval of every number, for people; words that never occur left out.

    Solved shares first, greedy before sampled.
    """
    rows = []
    for part, measure in report.measured:
        if measure.metric.endswith("mean_reward") or _is_absent_word(measure):
            continue
        how = "greedy" if part.temperature == 0 else f"temperature {part.temperature:g}"
        label = measure.label.removeprefix(GREEDY_PREFIX)
        rows.append((f"{label} ({how})", _shown(measure, measure.value), _range(measure)))
    return rows


def _is_absent_word(measure: Measure) -> bool:
    return ":" in measure.metric and measure.value == 0


def _range(measure: Measure) -> str:
    return f"{_shown(measure, measure.low)} to {_shown(measure, measure.high)}"


def _shown(measure: Measure, value: float) -> str:
    if measure.metric.endswith("mean_entropy"):
        return f"{value:.3f} nats"
    if measure.metric.endswith("mean_tokens"):
        return f"{value:.1f} tokens"
    return f"{value:.1%}"


def model_label(document: dict[str, Any]) -> str:
    """Which weights an evaluation is of."""
    version = document["policy_version"]
    return Path(document["model"]).name if version is None else f"policy@{version}"
