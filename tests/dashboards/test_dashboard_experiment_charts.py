"""Charts that compare series, and the frames that they are drawn from."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from mentor_dashboard import experiment_charts, experiment_frames
from mentor_dashboard.charts import STEP, Axis
from mentor_dashboard.series import Series, group

SHARE = Axis(column="value", title="share")


def series_of(*names: str) -> list[Series]:
    """Series of runs whose ids are their names."""
    return group([{"id": name, "name": name} for name in names])


def frame_of(series: list[Series], column: str, places: list[Any], **changes: Any) -> pd.DataFrame:
    rows = [
        {"series": one.label, column: place, "value": 0.5, "low": 0.4, "high": 0.7, "num_runs": 2}
        | changes
        for one in series
        for place in places
    ]
    return pd.DataFrame(rows)


def draw_curves(frame: pd.DataFrame, series: list[Series], **options: Any) -> dict[str, Any]:
    options = {"x": STEP, "y": SHARE} | options
    chart = experiment_charts.curves(frame, title="Title", series=series, **options)
    assert chart is not None
    return chart.to_dict()


def marks(spec: dict[str, Any]) -> list[str]:
    return [layer["mark"]["type"] for layer in spec["layer"]]


def test_nothing_to_compare_is_none() -> None:
    empty = pd.DataFrame(columns=["series", "step", "value", "low", "high", "num_runs"])
    series = series_of("a")
    assert experiment_charts.curves(empty, title="", x=STEP, y=SHARE, series=series) is None
    bars = experiment_charts.grouped_bars(empty, title="", category=STEP, y=SHARE, series=series)
    assert bars is None


def test_curves_have_bands_in_the_colours_of_their_series() -> None:
    series = series_of("main-luffy-seed0", "main-mentor-seed0")
    spec = draw_curves(frame_of(series, "step", [1, 2]), series)
    assert marks(spec) == ["area", "line", "circle"]
    for layer in spec["layer"]:
        assert layer["encoding"]["color"]["scale"] == {
            "domain": ["LUFFY", "MENTOR"],
            "range": ["#dd8452", "#c44e52"],
        }
        assert layer["encoding"]["color"]["legend"] is None
    assert [tip["title"] for tip in spec["layer"][2]["encoding"]["tooltip"]] == [
        "update (step)",
        " ",
        "share",
        "low",
        "high",
        "runs",
    ]


def test_single_runs_have_no_band() -> None:
    series = series_of("a")
    frame = frame_of(series, "step", [1, 2], low=None, high=None, num_runs=1)
    assert marks(draw_curves(frame, series)) == ["line", "circle"]


@pytest.mark.parametrize("extra", [0, 1])
def test_more_bands_than_eyes_can_tell_apart_are_left_out(extra: int) -> None:
    names = [f"run-{number}" for number in range(experiment_charts.MAX_BANDS + extra)]
    series = series_of(*names)
    drawn = marks(draw_curves(frame_of(series, "step", [1]), series))
    assert ("area" in drawn) == (extra == 0)


@pytest.mark.parametrize(
    ("changes", "zero", "expected"),
    [
        # Lines from 0.4 to 0.6; intervals get half as much again on either side.
        ({"low": 0.35, "high": 0.65}, False, [0.35, 0.65]),
        ({"low": -9.0, "high": 9.0}, False, [0.3, 0.7]),
        ({"low": 0.35, "high": 9.0}, True, [0.0, 0.7]),
        ({"low": None, "high": None, "num_runs": 1}, False, [0.4, 0.6]),
    ],
)
def test_axes_are_as_wide_as_lines_need(
    changes: dict[str, Any], zero: bool, expected: list[float]
) -> None:
    series = series_of("a")
    frame = frame_of(series, "step", [1, 2], **changes)
    frame["value"] = [0.4, 0.6]
    spec = draw_curves(frame, series, y=Axis(column="value", title="share", zero=zero))
    scale = spec["layer"][0]["encoding"]["y"]["scale"]
    assert scale["domain"] == pytest.approx(expected)
    assert scale["clamp"]


def test_k_is_drawn_in_powers_of_two() -> None:
    series = series_of("a")
    k = Axis(column="k", title="k", format="d", log=True)
    x = draw_curves(frame_of(series, "k", [1, 2, 8]), series, x=k)["layer"][0]["encoding"]["x"]
    assert (x["scale"]["type"], x["scale"]["base"], x["axis"]["values"]) == ("log", 2, [1, 2, 8])


def test_bars_are_grouped_in_the_order_of_rows_and_series() -> None:
    series = series_of("main-mentor-seed0", "main-base-seed0", "main-luffy-seed0")
    frame = frame_of(series, "word", ["wait", "check"])
    frame = frame[frame["series"] != "LUFFY"]
    chart = experiment_charts.grouped_bars(
        frame,
        title="Words",
        category=Axis(column="word", title=""),
        y=SHARE,
        series=series,
        is_root=True,
    )
    assert chart is not None
    spec = chart.to_dict()
    assert marks(spec) == ["bar", "rule"]
    for layer in spec["layer"]:
        assert layer["encoding"]["x"]["scale"]["domain"] == ["wait", "check"]
        assert layer["encoding"]["xOffset"]["scale"]["domain"] == ["base", "MENTOR"]
    assert spec["layer"][0]["encoding"]["y"]["scale"]["type"] == "sqrt"


def test_the_legend_counts_runs_and_escapes_names() -> None:
    html = experiment_charts.legend(series_of("<b>-seed0", "<b>-seed1", "main-mentor-seed0"))
    assert "&lt;b&gt;" in html
    assert "<b>" not in html
    assert html.index("MENTOR") < html.index("1 run<")
    assert "2 runs" in html
    assert "background:#c44e52" in html


def measured(run_id: str, suite: str, metric: str, value: float, k: int | None = None) -> Any:
    return {
        "run_id": run_id,
        "suite": suite,
        "metric": metric,
        "k": k,
        "value": value,
        "num_problems": 10,
        "num_samples": 8,
        "temperature": 0.6,
    }


def test_the_curve_is_of_the_problems_with_the_most_points() -> None:
    def at(suite: str, step: int) -> dict[str, Any]:
        return {"run_id": "a", "suite": suite, "step": step, "value": 0.5}

    once, twice = [at("once", 3)], [at("twice", 1), at("twice", 2)]
    thrice = [at("thrice", step) for step in range(3)]
    assert experiment_frames.curve_suites([*once, *twice, *thrice]) == ["thrice", "twice"]
    assert experiment_frames.curve_suites(once) == ["once"]
    assert experiment_frames.curve_suites([]) == []


def test_series_are_compared_by_problems_that_they_share() -> None:
    series = series_of("a", "b")
    rows = [
        measured(run_id, suite, "pass_at_k", 0.5, 8)
        for suite in ("z:test", "in_domain:test", "in_domain:validation")
        for run_id in ("a", "b")
    ]
    rows += [measured("a", "alone:test", "pass_at_k", 0.5, 8)]
    rows += [measured(run_id, "in_domain:curve", "greedy_pass_at_k", 0.5, 1) for run_id in "ab"]
    assert experiment_frames.measured_suites(rows, series) == ["in_domain:test", "z:test"]
    validation = [row for row in rows if row["suite"].startswith("in_domain:v")]
    greedy = [row for row in rows if row["suite"] == "in_domain:curve"]
    assert experiment_frames.measured_suites(validation + greedy, series) == [
        "in_domain:validation"
    ]
    assert experiment_frames.measured_suites(greedy, series) == ["in_domain:curve"]
    assert experiment_frames.measured_suites(rows[-3:-2], series) == ["alone:test"]


@pytest.mark.parametrize(
    ("suite", "label"),
    [
        ("in_domain:test", "in_domain"),
        ("in_domain:curve", "in_domain (validation)"),
        ("reasoning_gym:chain_sum", "reasoning_gym:chain_sum"),
    ],
)
def test_suites_are_named_for_people(suite: str, label: str) -> None:
    assert experiment_frames.suite_label(suite) == label


def test_words_are_those_that_anybody_says_most_frequent_first() -> None:
    series = series_of("a", "b")
    rows = [
        measured("a", "s", "word_share:wait", 0.1),
        measured("b", "s", "word_share:wait", 0.0),
        measured("a", "s", "word_share:check", 0.05),
        measured("b", "s", "word_share:check", 0.3),
        measured("a", "s", "word_share:since", 0.0),
        measured("b", "other", "word_share:since", 0.4),
        measured("a", "s", "greedy_word_share:then", 0.9),
    ]
    frame = experiment_frames.words(rows, suite="s", series=series)
    assert list(zip(frame["word"], frame["series"], frame["value"], strict=True)) == [
        ("check", "a", 0.05),
        ("check", "b", 0.3),
        ("wait", "a", 0.1),
        ("wait", "b", 0.0),
    ]
    assert experiment_frames.temperatures(rows, suite="s") == "temperature 0.6"
    greedy = experiment_frames.words(rows[-1:], suite="s", series=series)
    assert list(greedy["word"]) == ["then"]
    assert experiment_frames.temperatures(rows[-1:], suite="s") == "greedy"
    assert experiment_frames.words([], suite="s", series=series).empty


def test_only_so_many_words_are_shown() -> None:
    rows = [measured("a", "s", f"word_share:w{n}", (n + 1) / 100) for n in range(30)]
    frame = experiment_frames.words(rows, suite="s", series=series_of("a"))
    assert list(frame["word"])[:2] == ["w29", "w28"]
    assert len(frame) == experiment_frames.MAX_WORDS


def test_pass_at_k_is_compared_at_the_largest_k_in_common() -> None:
    series = series_of("a", "b")
    rows = [measured("a", "s", "pass_at_k", 0.1 * k, k) for k in (1, 4, 8)]
    rows += [measured("b", "s", "pass_at_k", 0.2 * k, k) for k in (1, 4)]
    frame, ks = experiment_frames.pass_bars(rows, suites=["s"], series=series)
    assert ks == {4}
    assert dict(zip(frame["series"], frame["value"], strict=True)) == {"a": 0.4, "b": 0.8}
    rows += [measured("b", "t:test", "pass_at_k", 0.5, 2)]
    frame, ks = experiment_frames.pass_bars(rows, suites=["t:test", "s"], series=series)
    assert ks == {2, 4}
    assert list(frame["suite"]) == ["t (k = 2)", "s (k = 4)", "s (k = 4)"]
    curve = experiment_frames.pass_curve(rows, suite="s", series=series)
    assert list(curve[curve["series"] == "a"]["k"]) == [1, 4, 8]


def test_the_table_has_means_over_runs_and_what_an_update_usually_takes() -> None:
    series = series_of("a-seed0", "a-seed1", "b")
    measures = [
        measured("a-seed0", "s", "greedy_pass_at_k", 0.5, 1),
        measured("a-seed1", "s", "greedy_pass_at_k", 0.7, 1),
        measured("a-seed0", "s", "avg_at_k", 0.4, 8),
        measured("b", "s", "pass_at_k", 0.9, 8),
        measured("b", "other", "greedy_pass_at_k", 0.1, 1),
    ]
    updates = [
        {
            "run_id": "a-seed0",
            "step": step,
            "entropy": entropy,
            "step_time_s": 1.0,
            # An evaluation before the first update.
            "wait_time_s": 100.0 if step == 1 else 0.5,
        }
        for step, entropy in enumerate([9.0, 0.1, 0.2, 0.3, 0.4, 0.5], start=1)
    ]
    frame = experiment_frames.table(measures, updates, suite="s", series=series)
    a, b = frame.astype(object).where(frame.notna(), None).to_dict("records")
    assert a["greedy accuracy"] == pytest.approx(0.6)
    assert (a["runs"], a["updates"], a["avg@8"], a["pass@8"]) == (2, 6, 0.4, None)
    assert (a["entropy (nats)"], a["s an update"]) == (pytest.approx(0.3), 1.5)
    assert (b["runs"], b["updates"], b["greedy accuracy"], b["pass@8"]) == (1, 0, None, 0.9)
    assert experiment_frames.table([], [], suite="", series=series)["runs"].tolist() == [2, 1]
