"""Charts: what is drawn from which rows, and when there is nothing to draw."""

from __future__ import annotations

from typing import Any

import pytest

from mentor_dashboard import charts, palette
from mentor_dashboard.pages.overview import (
    evaluation_points,
    evaluation_series,
    pass_rate_edges,
    response_lengths,
)

Y = charts.Axis(column="value", title="value (units)")
SERIES = [
    charts.Series(column="a", label="first", colour=palette.POLICY),
    charts.Series(column="b", label="second", colour=palette.EXPERT),
]


def draw(rows: list[dict[str, Any]], *, smooth: bool = False) -> dict[str, Any] | None:
    chart = charts.lines(rows, title="Title", x=charts.STEP, y=Y, series=SERIES, smooth=smooth)
    return None if chart is None else chart.to_dict()


def values(spec: dict[str, Any]) -> list[dict[str, Any]]:
    (rows,) = spec["datasets"].values()
    return rows


@pytest.mark.parametrize("rows", [[], [{"step": 1, "a": None, "b": None}]])
def test_nothing_to_draw_is_none(rows: list[dict[str, Any]]) -> None:
    assert draw(rows) is None


def test_missing_values_leave_gaps_and_no_zeros() -> None:
    spec = draw([{"step": 1, "a": 0.5, "b": None}, {"step": 2, "a": None, "b": 0.25}])
    assert spec is not None
    drawn = {(row["step"], row["series"]): row["value"] for row in values(spec)}
    assert drawn == {(1, "first"): 0.5, (2, "second"): 0.25}


def test_series_keep_their_colours_and_axes_their_units() -> None:
    spec = draw([{"step": 1, "a": 0.5, "b": 0.1}])
    assert spec is not None
    encoding = spec["layer"][0]["encoding"]
    assert encoding["color"]["scale"] == {
        "domain": ["first", "second"],
        "range": [palette.POLICY, palette.EXPERT],
    }
    assert encoding["y"]["title"] == "value (units)"
    assert encoding["x"]["title"] == "update (step)"
    assert spec["title"]["text"] == "Title"


def test_long_noisy_series_are_smoothed_over_their_raw_values() -> None:
    rows = [{"step": step, "a": float(step % 2), "b": 0.0} for step in range(80)]
    spec = draw(rows, smooth=True)
    assert spec is not None
    assert len(spec["layer"]) == 3
    assert "rolling mean of 4" in spec["title"]["subtitle"]
    last = [row for row in values(spec) if row["series"] == "first"][-1]
    assert (last["value"], last["smoothed"]) == (1.0, 0.5)


def test_short_series_are_not_smoothed() -> None:
    spec = draw([{"step": step, "a": float(step), "b": 0.0} for step in range(10)], smooth=True)
    assert spec is not None
    assert all(row["smoothed"] == row["value"] for row in values(spec))


def test_quiet_minutes_are_no_chart() -> None:
    assert charts.throughput([{"minute": "2026-01-01T00:00:00Z", "num_groups": 0}]) is None


def test_gamma_is_drawn_only_where_it_fits_the_scale() -> None:
    rows = [{"position": 0, "entropy": 1.0, "weight": 0.1, "source": "policy", "token": "a"}]
    near, far = (charts.token_entropies(rows, gamma=gamma) for gamma in (1.5, 999.0))
    assert near is not None
    assert far is not None
    assert (len(near.to_dict()["layer"]), len(far.to_dict()["layer"])) == (2, 1)


def scored(version: int, passed: int, num: int = 10) -> dict[str, Any]:
    return {"policy_version": version, "num_scored": num, "num_passed": passed}


def test_the_pass_rate_now_is_pooled_and_compared_with_the_first() -> None:
    rows = [scored(version, 1) for version in range(5)] + [scored(5 + v, 8) for v in range(5)]
    assert pass_rate_edges(rows) == (pytest.approx(0.1), pytest.approx(0.8))
    assert pass_rate_edges(rows[:9]) == (None, pytest.approx((1 + 4 * 8) / 50))
    assert pass_rate_edges([scored(0, 0, num=0)]) == (None, None)


def test_response_lengths_align_by_version() -> None:
    on_policy = [{"policy_version": 1, "mean_response_tokens": 10.0}]
    mixed = [
        {"policy_version": 1, "mean_response_tokens": 20.0},
        {"policy_version": 0, "mean_response_tokens": 30.0},
    ]
    assert response_lengths(on_policy, mixed=mixed) == [
        {"policy_version": 0, "mixed": 30.0},
        {"policy_version": 1, "on_policy": 10.0, "mixed": 20.0},
    ]


def test_evaluations_become_one_series_for_each_suite_and_metric() -> None:
    rows = [
        {"policy_version": 4, "suite": "s", "metric": "avg_at_k", "k": 8, "value": 0.5},
        {"policy_version": 2, "suite": "s", "metric": "avg_at_k", "k": 8, "value": 0.1},
        {"policy_version": 4, "suite": "s", "metric": "greedy", "k": None, "value": 0.6},
    ]
    assert [entry.label for entry in evaluation_series(rows)] == ["s: avg@8", "s: greedy"]
    assert evaluation_points(rows) == [
        {"policy_version": 2, "s: avg@8": 0.1},
        {"policy_version": 4, "s: avg@8": 0.5, "s: greedy": 0.6},
    ]
