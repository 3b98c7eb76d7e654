"""From the logs of trials to the numbers of a comparison. Plain data in, plain data out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mentor_serve.evaluation.passk import pass_at_k
from mentor_serve.experiments.arms import MENTOR
from mentor_serve.experiments.measurement import VALIDATION
from mentor_serve.experiments.presets import IN_DOMAIN, Preset
from mentor_serve.experiments.statistics import Matrix, estimate, paired
from mentor_serve.experiments.trial_log import TrialLog

GREEDY = "pass@1 (greedy)"
_THRESHOLDS = (0.6, 0.7, 0.8)
_LAST = 5
"""Updates whose mean stands for the beginning or the end of a run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRecord:
    """What a complete trial measured."""

    stage: str
    arm: str
    seed: int
    learning_rate: float | None
    updates: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]

    def evaluation(self, suite: str, split: str) -> dict[str, Any]:
        """The last evaluation of a suite.

        Raises:
            KeyError: it was not measured.
        """
        entry: dict[str, Any]
        for entry in reversed(self.evaluations):
            if (entry["suite"], entry["split"]) == (suite, split):
                return entry
        raise KeyError(f"{self.stage} {self.arm}, seed {self.seed}: {suite} {split}")


def read_trials(directory: Path) -> list[TrialRecord]:
    """Every complete trial of a comparison, by stage, arm and seed."""
    found = []
    for path in sorted(directory.glob("*.jsonl")):
        log = TrialLog(path)
        if not log.is_complete:
            continue
        (plan,) = log.entries("plan")
        found.append(
            TrialRecord(
                stage=plan["stage"],
                arm=plan["arm"],
                seed=plan["seed"],
                learning_rate=plan["learning_rate"],
                updates=log.entries("update"),
                evaluations=log.entries("evaluation"),
            )
        )
    return sorted(found, key=lambda one: (one.stage, one.arm, one.learning_rate or 0, one.seed))


def best_learning_rates(trials: Iterable[TrialRecord], preset: Preset) -> dict[str, float]:
    """For each method the rate with the best mean accuracy on the validation problems.

    Of equals the smaller one. Without a sweep all use the preset's first rate.
    """
    scores: dict[str, dict[float, list[float]]] = {}
    for trial in trials:
        if trial.stage == "sweep" and trial.learning_rate is not None:
            reached = trial.evaluation(IN_DOMAIN.name, VALIDATION)["accuracy_by_problem"]
            by_rate = scores.setdefault(trial.arm, {})
            by_rate.setdefault(trial.learning_rate, []).append(float(np.mean(reached)))
    return {
        method: max(
            sorted(scores.get(method, {preset.learning_rates[0]: [0.0]}).items()),
            key=lambda item: float(np.mean(item[1])),
        )[0]
        for method in preset.methods
    }


def summarise(trials: Sequence[TrialRecord], preset: Preset) -> dict[str, Any]:
    """All tables of a comparison as plain JSON values.

    Raises:
        KeyError: a trial that the preset has is missing.
    """
    main = _by_arm(trials, "main")
    return {
        "preset": preset.name,
        "num_updates": preset.num_updates,
        "prompts_per_update": preset.prompts_per_update,
        "seeds": list(preset.seeds),
        "suites": {suite.name: suite.label for suite in preset.suites},
        "sweep": _sweep(trials),
        "learning_rates": best_learning_rates(trials, preset),
        "accuracy": {
            suite.name: {
                arm: {name: asdict(estimate(m)) for name, m in _metrics(runs, suite.name).items()}
                for arm, runs in main.items()
            }
            for suite in preset.suites
        },
        "paired": _paired(main, preset),
        "behaviour": {arm: _behaviour(runs) for arm, runs in main.items()},
        "words": {arm: _words(runs) for arm, runs in main.items() if runs[0].updates},
        "curves": {arm: _curves(runs) for arm, runs in main.items() if runs[0].updates},
        "costs": {arm: _costs(runs) for arm, runs in main.items() if runs[0].updates},
        "ablations": _ablations(trials, preset),
    }


def _by_arm(trials: Iterable[TrialRecord], stage: str) -> dict[str, list[TrialRecord]]:
    found: dict[str, list[TrialRecord]] = {}
    for trial in trials:
        if trial.stage == stage:
            found.setdefault(trial.arm, []).append(trial)
    return found


def _sweep(trials: Iterable[TrialRecord]) -> list[dict[str, Any]]:
    return [
        {
            "method": trial.arm,
            "learning_rate": trial.learning_rate,
            "seed": trial.seed,
            "validation": float(
                np.mean(trial.evaluation(IN_DOMAIN.name, VALIDATION)["accuracy_by_problem"])
            ),
        }
        for trial in trials
        if trial.stage == "sweep"
    ]


def _metrics(runs: Sequence[TrialRecord], suite: str) -> dict[str, Matrix]:
    """[S, P] by name: greedy pass@1, avg@n and pass@k."""
    entries = [run.evaluation(suite, "test") for run in runs]
    num_samples = entries[0]["num_samples"]
    correct_SP = np.array([entry["num_correct_by_problem"] for entry in entries])
    metrics = {
        GREEDY: np.array([entry["greedy_by_problem"] for entry in entries]),
        f"avg@{num_samples}": np.array([entry["accuracy_by_problem"] for entry in entries]),
    }
    for k in (2**power for power in range(num_samples.bit_length())):
        table = np.array([pass_at_k(num_samples, c, k) for c in range(num_samples + 1)])
        metrics[f"pass@{k}"] = table[correct_SP]
    return metrics


def _paired(main: dict[str, list[TrialRecord]], preset: Preset) -> list[dict[str, Any]]:
    """MENTOR minus each other method, by suite and measure."""
    rows = []
    for suite in preset.suites:
        ours = _metrics(main[MENTOR.name], suite.name)
        for method in preset.methods:
            if method == MENTOR.name:
                continue
            theirs = _metrics(main[method], suite.name)
            for name in (GREEDY, f"avg@{preset.num_samples}", f"pass@{preset.num_samples}"):
                ours_estimate, theirs_estimate = estimate(ours[name]), estimate(theirs[name])
                rows.append(
                    {
                        "suite": suite.name,
                        "baseline": method,
                        "measure": name,
                        **asdict(paired(ours[name], theirs[name])),
                        "intervals_overlap": ours_estimate.overlaps(theirs_estimate),
                    }
                )
    return rows


def _over_seeds(values: Sequence[float]) -> dict[str, Any]:
    return asdict(estimate([[value] for value in values]))


def _behaviour(runs: Sequence[TrialRecord]) -> dict[str, Any]:
    """Entropy, length and words on the in-domain test problems, at the evaluation's temperature."""
    measured = [run.evaluation(IN_DOMAIN.name, "test")["measures"] for run in runs]
    names = ["mean_entropy", "mean_tokens", "truncated_share", "mean_format"]
    words = [name for name in measured[0] if name.startswith("word_share:")]
    return {name: _over_seeds([one[name] for one in measured]) for name in (*names, *words)}


def _words(runs: Sequence[TrialRecord]) -> dict[str, Any]:
    """Share of on-policy training rollouts (temperature 1) with a word, at both ends of a run."""

    def share(entries: Sequence[dict[str, Any]], word: str) -> float:
        return float(np.mean([entry["words_on_policy"].get(word, 0.0) for entry in entries]))

    words = sorted({word for run in runs for one in run.updates for word in one["words_on_policy"]})
    return {
        word: {
            "first": _over_seeds([share(run.updates[:_LAST], word) for run in runs]),
            "last": _over_seeds([share(run.updates[-_LAST:], word) for run in runs]),
        }
        for word in words
    }


def _curves(runs: Sequence[TrialRecord]) -> dict[str, Any]:
    """By update, of the training rollouts; accuracy on the validation problems."""
    steps = [entry["step"] for entry in runs[0].updates]
    curves: dict[str, Any] = {"step": steps}
    for name in ("entropy", "mean_response_tokens", "mean_reward_on_policy", "mean_reward_mixed"):
        curves[name] = _curve([[entry[name] for entry in run.updates] for run in runs])
    points = [[entry for entry in run.evaluations if entry["split"] == "curve"] for run in runs]
    curves["validation_step"] = [entry["step"] for entry in points[0]]
    curves["validation"] = _curve(
        [[float(np.mean(entry["greedy_by_problem"])) for entry in of_run] for of_run in points]
    )
    return curves


def _curve(values_ST: Sequence[Sequence[float | None]]) -> list[dict[str, float] | None]:
    """Mean over seeds with its interval at each step; None where a run has no number."""
    rows: list[dict[str, float] | None] = []
    for at_step in zip(*values_ST, strict=True):
        known = [value for value in at_step if value is not None]
        if len(known) < len(at_step):
            rows.append(None)
            continue
        found = estimate([[value] for value in known])
        rows.append({"value": found.value, "low": found.low, "high": found.high})
    return rows


def _costs(runs: Sequence[TrialRecord]) -> dict[str, Any]:
    """What an update costs, and seconds of training to reach a validation accuracy."""

    def total(run: TrialRecord, name: str) -> float:
        return float(sum(entry[name] for entry in run.updates))

    def seconds(run: TrialRecord) -> float:
        return total(run, "collect_s") + total(run, "update_s")

    costs = {
        "rollouts_per_s": [total(run, "num_rollouts") / total(run, "collect_s") for run in runs],
        "expert_tokens_per_token": [
            total(run, "expert_tokens") / total(run, "policy_tokens") for run in runs
        ],
        "collect_s": [total(run, "collect_s") / len(run.updates) for run in runs],
        "update_s": [total(run, "update_s") / len(run.updates) for run in runs],
        "train_s": [seconds(run) for run in runs],
    }
    reached = {
        f"{threshold:g}": [_seconds_to(run, threshold) for run in runs] for threshold in _THRESHOLDS
    }
    return {
        **{name: _over_seeds(values) for name, values in costs.items()},
        "mean_weight": _over_updates(runs, "mean_weight"),
        "gated_share": _over_updates(runs, "gated_share"),
        "seconds_to_validation": reached,
    }


def _seconds_to(run: TrialRecord, threshold: float) -> float | None:
    """Training time up to the first evaluation at or above `threshold`."""
    for entry in run.evaluations:
        if entry["split"] == "curve" and np.mean(entry["greedy_by_problem"]) >= threshold:
            before = [one for one in run.updates if one["step"] <= entry["step"]]
            return round(float(sum(one["collect_s"] + one["update_s"] for one in before)), 1)
    return None


def _ablations(trials: Sequence[TrialRecord], preset: Preset) -> dict[str, Any]:
    """Each ablation beside MENTOR's runs of the same seeds."""
    rows = {}
    same = [
        run
        for run in _by_arm(trials, "main").get(MENTOR.name, [])
        if run.seed in preset.ablation_seeds
    ]
    for arm, runs in {MENTOR.name: same, **_by_arm(trials, "ablation")}.items():
        if not runs:
            continue
        ours, theirs = (_metrics(of_arm, IN_DOMAIN.name) for of_arm in (runs, same))
        rows[arm] = {
            "accuracy": {name: asdict(estimate(matrix)) for name, matrix in ours.items()},
            "difference": {
                name: asdict(paired(ours[name], theirs[name]))
                for name in (GREEDY, f"avg@{preset.num_samples}", f"pass@{preset.num_samples}")
            },
            "mean_weight": _over_updates(runs, "mean_weight"),
            "gated_share": _over_updates(runs, "gated_share"),
            "intervention_rate": _over_updates(runs, "intervention_rate"),
            "entropy_at_end": _over_seeds(
                [float(np.mean([one["entropy"] for one in run.updates[-_LAST:]])) for run in runs]
            ),
            "expert_tokens_per_token": _costs(runs)["expert_tokens_per_token"],
        }
    return rows


def _over_updates(runs: Sequence[TrialRecord], name: str) -> dict[str, Any] | None:
    """Mean over all updates of a run that have the number, then over seeds; None: none has it."""
    known = [[entry[name] for entry in run.updates if entry[name] is not None] for run in runs]
    return _over_seeds([float(np.mean(of_run)) for of_run in known]) if all(known) else None
