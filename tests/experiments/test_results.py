"""From logs to tables: numbers by hand, and what is left out or missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trial_samples import tiny_preset

from mentor_serve.experiments.figures import write_figures
from mentor_serve.experiments.results import (
    GREEDY,
    best_learning_rates,
    read_trials,
    summarise,
)
from mentor_serve.experiments.tables import all_tables
from mentor_serve.experiments.trial_log import TrialLog

METHODS = ("on_policy", "luffy", "questa", "mentor")
PRESET = tiny_preset(
    num_updates=2,
    seeds=(0, 1),
    sweep_seeds=(9,),
    ablation_seeds=(0,),
    learning_rates=(1e-4, 2e-4),
    ablations=("unselective",),
)


def write_trial(
    directory: Path,
    stage: str,
    arm: str,
    *,
    seed: int = 0,
    rate: float | None = 1e-4,
    correct: tuple[int, ...] = (0, 1, 2, 2),
    seconds: float = 1.0,
    is_complete: bool = True,
) -> None:
    """Two updates and their evaluations; `correct` of two samples for each of four problems."""
    log = TrialLog(directory / f"{stage}-{arm}-{rate}-{seed}.jsonl")
    log.add("plan", {"stage": stage, "arm": arm, "seed": seed, "learning_rate": rate})
    solved = [float(count > 0) for count in correct]
    common: dict[str, Any] = {"suite": "in_domain", "greedy_by_problem": solved, "measures": {}}
    log.add("evaluation", {**common, "split": "curve", "step": 0, "greedy_by_problem": [0.0] * 4})
    for step in (1, 2) if arm not in {"base", "expert"} else ():
        log.add(
            "update",
            {
                "step": step,
                "entropy": 0.1 * step,
                "mean_response_tokens": 20.0,
                "mean_reward_on_policy": 0.5,
                "mean_reward_mixed": None,
                "mean_weight": 0.25 if step == 2 else None,
                "gated_share": 0.3 if arm == "mentor" else None,
                "intervention_rate": 0.1,
                "words_on_policy": {"verify": 0.02 * step},
                "num_rollouts": 24,
                "policy_tokens": 480,
                "expert_tokens": 240,
                "collect_s": seconds,
                "update_s": seconds,
            },
        )
    log.add("evaluation", {**common, "split": "curve", "step": 2})
    sampled = {
        "num_samples": 2,
        "num_correct_by_problem": list(correct),
        "accuracy_by_problem": [count / 2 for count in correct],
        "step": 2,
        "measures": {
            "mean_entropy": 0.05,
            "mean_tokens": 21.0,
            "truncated_share": 0.0,
            "mean_format": 1.0,
            **{f"word_share:{word}": 0.25 for word in ("verify", "check", "okay", "wait")},
        },
    }
    for split in ("validation", "test"):
        log.add("evaluation", {**common, **sampled, "split": split})
    if is_complete:
        log.add("done", {"num_updates": 2})


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for rate, correct in ((1e-4, (0, 0, 2, 2)), (2e-4, (0, 1, 2, 2))):
        for method in METHODS:
            write_trial(tmp_path, "sweep", method, seed=9, rate=rate, correct=correct)
    for seed in (0, 1):
        for method in METHODS[:3]:
            write_trial(tmp_path, "main", method, seed=seed)
        write_trial(tmp_path, "main", "mentor", seed=seed, correct=(1, 1, 2, 2), seconds=2.0)
    for arm in ("base", "expert"):
        write_trial(tmp_path, "main", arm, rate=None)
    write_trial(tmp_path, "ablation", "unselective")
    return tmp_path


def test_numbers_of_a_comparison(directory: Path):
    results = summarise(read_trials(directory), PRESET)
    ours, theirs = (results["accuracy"]["in_domain"][arm] for arm in ("mentor", "luffy"))
    # Correct 1, 1, 2, 2 of two samples: greedy all solved; avg (0.5 + 0.5 + 1 + 1) / 4.
    assert (ours[GREEDY]["value"], ours["avg@2"]["value"], ours["pass@2"]["value"]) == (1, 0.75, 1)
    # 0, 1, 2, 2: greedy 3 of 4, avg 0.625, pass@1 the same, pass@2 0.75.
    assert theirs[GREEDY]["value"] == theirs["pass@2"]["value"] == 0.75
    assert theirs["avg@2"]["value"] == theirs["pass@1"]["value"] == 0.625
    (row,) = (
        row for row in results["paired"] if (row["baseline"], row["measure"]) == ("luffy", "avg@2")
    )
    assert row["difference"]["value"] == 0.125
    assert row["difference"]["by_seed"] == (0.125, 0.125)
    assert row["p_value"] is None  # equal differences

    costs = results["costs"]["mentor"]
    assert costs["gated_share"]["value"] == pytest.approx(0.3)
    assert results["costs"]["luffy"]["gated_share"] is None
    assert costs["rollouts_per_s"]["value"] == 12.0
    assert costs["expert_tokens_per_token"]["value"] == 0.5
    # Reached at the evaluation after update 2: two updates of 2 + 2 seconds.
    assert costs["seconds_to_validation"]["0.8"] == [8.0, 8.0]
    assert results["costs"]["luffy"]["seconds_to_validation"] == {
        "0.6": [4.0, 4.0],
        "0.7": [4.0, 4.0],
        "0.8": [None, None],
    }
    curves = results["curves"]["mentor"]
    assert [row["value"] for row in curves["entropy"]] == [0.1, 0.2]
    assert curves["mean_reward_mixed"] == [None, None]
    assert [row["value"] for row in curves["validation"]] == [0.0, 1.0]
    assert results["ablations"]["unselective"]["mean_weight"]["value"] == 0.25
    assert (
        results["ablations"]["unselective"]["difference"]["avg@2"]["difference"]["value"] == -0.125
    )


def test_the_best_rate_on_validation_problems_is_chosen(directory: Path):
    assert best_learning_rates(read_trials(directory), PRESET) == dict.fromkeys(METHODS, 2e-4)
    assert best_learning_rates([], PRESET) == dict.fromkeys(METHODS, 1e-4)


def test_of_equal_rates_the_smaller_one_is_chosen(tmp_path: Path):
    for rate in (2e-4, 1e-4):
        write_trial(tmp_path, "sweep", "mentor", rate=rate)
    assert best_learning_rates(read_trials(tmp_path), PRESET)["mentor"] == 1e-4


def test_trials_that_are_not_complete_do_not_count(directory: Path):
    write_trial(directory, "main", "mentor", seed=2, correct=(0, 0, 0, 0), is_complete=False)
    results = summarise(read_trials(directory), PRESET)
    assert len(results["accuracy"]["in_domain"]["mentor"][GREEDY]["by_seed"]) == 2


def test_a_missing_method_is_an_error(directory: Path):
    trials = [trial for trial in read_trials(directory) if trial.arm != "luffy"]
    with pytest.raises(KeyError, match="luffy"):
        summarise(trials, PRESET)


def test_tables_and_figures_show_every_arm(directory: Path, tmp_path: Path):
    pytest.importorskip("matplotlib")
    results = json.loads(json.dumps(summarise(read_trials(directory), PRESET)))
    tables = all_tables(results)
    assert list(tables) == [
        "accuracy-greedy",
        "accuracy-avg",
        "accuracy-pass",
        "pass-at-k",
        "paired",
        "behaviour",
        "words",
        "costs",
        "sweep",
        "ablations",
    ]
    for table in tables.values():
        header, _, *rows = table.splitlines()
        assert rows
        assert {row.count("|") for row in rows} == {header.count("|")}
    assert "| MENTOR | 75.0 [" in tables["accuracy-avg"]
    assert "| MENTOR | 62.5 | **75.0** |" not in tables["sweep"]
    assert "| MENTOR | 50.0 | **62.5** |" in tables["sweep"]
    assert "never" in tables["costs"]
    assert (
        "| On-policy RL | 24 [24, 24] | 0.50 [0.50, 0.50] | 0.25 [0.25, 0.25] | - |"
        in (tables["costs"])
    )
    assert "| MENTOR | 3.0 -> 3.0 [3.0, 3.0] |" in tables["words"]

    pictures = write_figures(results, tmp_path / "figures")
    again = write_figures(results, tmp_path / "again")
    for picture, same in zip(pictures, again, strict=True):
        text = picture.read_text(encoding="utf-8")
        assert "MENTOR" in text
        assert text == same.read_text(encoding="utf-8")
        assert json.loads(picture.with_suffix(".json").read_text(encoding="utf-8"))
