"""Which runs are one series, what it is called, and how its runs are averaged."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from mentor_dashboard import palette
from mentor_dashboard.means import mean_over_runs
from mentor_dashboard.series import (
    RECENT,
    Series,
    group,
    parse,
    selections,
)
from mentor_serve.experiments.arms import ABLATIONS, METHODS
from mentor_serve.experiments.names import ABLATION_LABELS, METHOD_COLOURS, METHOD_LABELS
from mentor_serve.experiments.tables import label_of
from mentor_serve.experiments.trial import TrialPlan

DASHBOARDS = Path(__file__).resolve().parents[2] / "dashboards"


def runs(*names: str) -> list[dict[str, Any]]:
    return [{"id": f"id-{name}", "name": name} for name in names]


def labels(found: list[Series]) -> list[str]:
    return [series.label for series in found]


def test_every_arm_of_the_comparison_has_a_label_and_every_method_a_colour() -> None:
    assert [arm.name for arm in ABLATIONS] == list(ABLATION_LABELS)
    assert ["base", *(arm.name for arm in METHODS), "expert"] == list(METHOD_LABELS)
    assert {name: label_of(name) for name in METHOD_LABELS} == METHOD_LABELS
    assert set(METHOD_LABELS) == set(METHOD_COLOURS)


def test_the_page_needs_neither_torch_nor_matplotlib() -> None:
    """They take seconds to load, and a dashboard may be installed without them."""
    code = (
        "import sys; import mentor_dashboard.pages.experiments; "
        "print({'torch', 'ray', 'matplotlib', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=DASHBOARDS,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("stage", ["main", "ablation", "sweep"])
@pytest.mark.parametrize("arm", [*METHOD_LABELS, *ABLATION_LABELS])
def test_names_of_trials_are_taken_apart(stage: str, arm: str) -> None:
    plan = TrialPlan(stage=stage, arm=arm, seed=12, learning_rate=5e-5)
    trial = parse(plan.key)
    assert (trial.stage, trial.arm, trial.seed) == (stage, arm, 12)
    assert trial.learning_rate == (5e-5 if stage == "sweep" else None)
    assert plan.key == f"{trial.series}-seed12"


@pytest.mark.parametrize("name", ["default", "main-mentor", "main-unknown", "my main-luffy"])
def test_other_names_are_no_part_of_a_comparison(name: str) -> None:
    assert parse(name).series == name
    assert parse(f"{name}-seed3").series == name
    assert parse(name).stage is None


def test_runs_that_differ_in_their_seed_are_one_series() -> None:
    found = group(
        runs(
            "main-expert-seed0",
            "main-mentor-seed1",
            "other",
            "main-base-seed0",
            "main-mentor-seed0",
            "mine-seed2",
            "mine-seed1",
            "ablation-quantile_80-seed0",
            "main-luffy-seed0",
        )
    )
    assert labels(found) == ["base", "LUFFY", "MENTOR", "p = 0.8", "mine", "other", "expert"]
    assert [series.num_runs for series in found] == [1, 1, 2, 1, 2, 1, 1]
    assert found[2].run_ids == ("id-main-mentor-seed0", "id-main-mentor-seed1")


def test_every_series_has_a_colour_of_its_own() -> None:
    names = [f"main-{arm}-seed0" for arm in METHOD_LABELS]
    names += [f"ablation-{arm}-seed0" for arm in ABLATION_LABELS]
    found = group(runs(*names))
    colours = {series.trial.arm: series.colour for series in found}
    assert {arm: colours[arm] for arm in METHOD_LABELS} == METHOD_COLOURS
    assert len(set(colours.values())) == len(found)


def test_learning_rates_are_shades_of_their_method_in_order() -> None:
    rates = ("0.0001", "0.0004", "5e-05")
    found = group(runs(*(f"sweep-luffy-lr{rate}-seed100" for rate in rates)))
    assert labels(found) == ["LUFFY, lr 5e-05", "LUFFY, lr 0.0001", "LUFFY, lr 0.0004"]
    assert [series.colour for series in found] == palette.shades(METHOD_COLOURS["luffy"], 3)


def test_shades_go_from_light_to_dark() -> None:
    assert palette.shades("#808080", 1) == ["#808080"]
    light, middle, dark = (int(shade[1:3], 16) for shade in palette.shades("#808080", 3))
    assert light > middle > dark


def test_other_runs_have_their_methods_colour_once() -> None:
    methods = {"id-a": "luffy", "id-b": "luffy", "id-c": "mentor"}
    found = group(runs("a", "b", "c", "d"), methods=methods)
    assert [series.colour for series in found] == [
        METHOD_COLOURS["luffy"],
        palette.OTHER_COLOURS[0],
        METHOD_COLOURS["mentor"],
        palette.OTHER_COLOURS[1],
    ]


def test_a_label_that_two_series_claim_is_replaced_by_their_names() -> None:
    found = group(runs("MENTOR", "main-mentor-seed0"))
    assert sorted(labels(found)) == ["MENTOR", "main-mentor"]


def test_a_comparisons_methods_come_first() -> None:
    names = [
        "ablation-quantile_80-seed0",
        "main-mentor-seed1",
        "main-mentor-seed0",
        "main-base-seed0",
        "sweep-mentor-lr0.0001-seed100",
        "default",
    ]
    found = selections(names)
    assert list(found) == ["Methods", "Ablations", "Learning rates", "Most recent"]
    assert found["Methods"] == ["main-base-seed0", "main-mentor-seed0", "main-mentor-seed1"]
    # Variants beside what they are variants of, of the same seeds.
    assert found["Ablations"] == ["ablation-quantile_80-seed0", "main-mentor-seed0"]
    assert found["Learning rates"] == ["sweep-mentor-lr0.0001-seed100"]


def test_without_a_comparison_the_newest_runs_are_shown() -> None:
    names = [f"run-{index}" for index in range(20)]
    assert selections(names) == {"Most recent": names[:RECENT]}


def test_means_have_the_interval_of_student() -> None:
    series = group(runs("a-seed0", "a-seed1", "a-seed2", "b"))
    rows = [
        {"run_id": f"id-a-seed{seed}", "step": 1, "x": x} for seed, x in enumerate([0.2, 0.3, 0.7])
    ]
    rows += [
        {"run_id": "id-b", "step": 1, "x": 0.5},
        {"run_id": "id-b", "step": 2, "x": None},
        {"run_id": "nobody's", "step": 1, "x": 0.9},
    ]
    first, second = mean_over_runs(rows, series=series, value="x", by=["step"]).to_dict("records")
    low, high = stats.t.interval(0.95, 2, 0.4, stats.sem([0.2, 0.3, 0.7]))
    assert (first["series"], first["step"], first["num_runs"]) == ("a", 1, 3)
    assert (first["value"], first["low"], first["high"]) == pytest.approx((0.4, low, high))
    assert (second["series"], second["value"], second["num_runs"]) == ("b", 0.5, 1)
    assert math.isnan(second["low"])
    assert math.isnan(second["high"])


def test_intervals_stay_within_what_is_possible() -> None:
    series = group(runs("a-seed0", "a-seed1"))
    rows = [{"run_id": "id-a-seed0", "x": 0.4}, {"run_id": "id-a-seed1", "x": 0.6}]
    (row,) = mean_over_runs(rows, series=series, value="x", limits=(0.0, 1.0)).to_dict("records")
    assert (row["value"], row["low"], row["high"]) == (0.5, 0.0, 1.0)


def test_no_rows_are_no_means() -> None:
    assert mean_over_runs([], series=group(runs("a")), value="x", by=["step"]).empty
