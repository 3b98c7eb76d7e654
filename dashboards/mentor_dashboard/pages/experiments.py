"""Experiments: several runs side by side, as in Figures 2 to 4 of the paper."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st

from mentor_dashboard import experiment_charts, experiment_frames, palette
from mentor_dashboard.charts import STEP, Axis
from mentor_dashboard.means import Rows, mean_over_runs
from mentor_dashboard.series import Series, group, parse, selections
from mentor_dashboard.shell import Run, live_selection, panel
from mentor_dashboard.source import read
from mentor_serve.experiments.names import METHOD_COLOURS
from mentor_serve.store.experiment_stats import MAX_RUNS, ExperimentReader

CHOSEN = "runs"
"""Key of the chosen runs, in the session and in the page's address."""
_OFFERED = "runs_offered"
_BAND = (
    "Lines and bars are means over the runs of a series, which differ in nothing but their seed. "
    "The shaded bands and the rules on bars are 95 % t-intervals over those runs: chance between "
    "runs alone, not which problems were drawn. A single run has none, and beyond "
    f"{experiment_charts.MAX_BANDS} series bands are left to the tooltips."
)
_SHARE = (0.0, 1.0)
_FIGURE_2 = (
    (
        "Token entropy of rollouts",
        Axis(column="entropy", title="mean entropy (nats)", zero=True),
        (0.0, math.inf),
    ),
    (
        "Response length",
        Axis(column="mean_response_tokens", title="mean tokens", format=".3~r"),
        (0.0, math.inf),
    ),
    (
        "Reward of on-policy rollouts",
        Axis(column="mean_reward_on_policy", title="reward", format=".2f"),
        _SHARE,
    ),
)
"""Title, column of `updates`, and the values that are possible."""
_PERCENT = ".3~p"


def page() -> None:
    """Body of the page."""
    live_selection(
        "Experiments",
        _body,
        intro="Several runs side by side, as in Figures 2 to 4 of the paper: what the expert "
        "changes, and what a method costs.",
        choose=_choose,
    )


def _choose(runs: list[dict[str, Any]]) -> list[Run]:
    """Widgets that choose the runs; by default a comparison's methods, else what ran last."""
    offered = {
        title: names[:MAX_RUNS]
        for title, names in selections([run["name"] for run in runs]).items()
    }
    default = next(iter(offered.values()))
    state = st.session_state
    if CHOSEN not in state:
        if CHOSEN not in st.query_params:
            state[CHOSEN] = default
    elif state.get(_OFFERED) == state[CHOSEN]:
        # Nobody chose: a comparison that goes on starts more runs.
        state[CHOSEN] = default
    state[_OFFERED] = default
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        for title, names in offered.items():
            st.button(
                title,
                key=f"choose-{title}",
                on_click=state.__setitem__,
                args=(CHOSEN, names),
                type="primary" if state.get(CHOSEN) == names else "secondary",
            )
    chosen = st.multiselect(
        "Runs",
        sorted(run["name"] for run in runs),
        key=CHOSEN,
        bind="query-params",
        max_selections=MAX_RUNS,
        help="Runs whose names differ only in `-seedN` at their ends are one series.",
    )
    return [run for run in runs if run["name"] in chosen]


def _body(runs: Sequence[Run]) -> None:
    if not runs:
        st.info("No run is chosen: choose some above.", icon=":material/checklist:")
        return
    run_ids = tuple(sorted(run["id"] for run in runs))
    others = tuple(sorted(run["id"] for run in runs if parse(run["name"]).stage is None))
    series = group(
        runs,
        methods=read(ExperimentReader.methods, others) if others else {},
        colours=_colours(),
    )
    updates = read(ExperimentReader.update_curves, run_ids)
    measures = read(ExperimentReader.final_measures, run_ids)
    _training(read(ExperimentReader.greedy_curves, run_ids), updates, series)
    st.subheader("Responses and solved problems (Figures 3 and 4)", anchor=False)
    st.html(experiment_charts.legend(series))
    suites = experiment_frames.measured_suites(measures, series)
    suite = _suite(suites)
    left, right = st.columns(2)
    with left:
        _words(measures, suite, series)
    with right:
        _pass_by_k(measures, suite, series)
    _pass_by_suite(measures, suites, series)
    _table(measures, updates, suite, series)
    st.caption(_BAND)


def _colours() -> Mapping[str, str]:
    is_dark = st.context.theme.type == "dark"
    return palette.METHOD_COLOURS_ON_DARK if is_dark else METHOD_COLOURS


def _training(curves: Rows, updates: Rows, series: Sequence[Series]) -> None:
    st.subheader("Training (Figure 2)", anchor=False)
    st.html(experiment_charts.legend(series))
    left, right = st.columns(2)
    with left:
        _greedy(curves, series)
    for (title, y, limits), place in zip(_FIGURE_2, (right, left, right), strict=True):
        frame = mean_over_runs(updates, series=series, value=y.column, by=["step"], limits=limits)
        with place:
            panel(
                experiment_charts.curves(frame, title=title, x=STEP, y=y, series=series),
                empty=f"{title}: appears with the first update of a chosen run.",
            )


def _greedy(curves: Rows, series: Sequence[Series]) -> None:
    suites = experiment_frames.curve_suites(curves)
    suite = suites[0] if suites else ""
    if len(suites) > 1:
        suite = st.selectbox(
            "Problems of the curve",
            suites,
            format_func=experiment_frames.suite_label,
            key="curve",
            bind="query-params",
        )
    panel(
        experiment_charts.curves(
            experiment_frames.greedy_curve(curves, suite=suite, series=series),
            title=f"Greedy accuracy, {experiment_frames.suite_label(suite)}",
            x=STEP,
            y=Axis(column="value", title="problems solved", format=_PERCENT),
            series=series,
        ),
        empty="Greedy accuracy: no evaluation of a version yet. A comparison makes them as it "
        "trains, a service with `learner.eval_every` or `mentor-serve eval`.",
    )


def _suite(suites: Sequence[str]) -> str:
    if len(suites) < 2:
        return next(iter(suites), "")
    chosen = st.segmented_control(
        "Problems of the words, of pass@k over k and of the table",
        suites,
        default=suites[0],
        format_func=experiment_frames.suite_label,
        key="suite",
        bind="query-params",
        required=True,
    )
    return str(chosen or suites[0])


def _words(measures: Rows, suite: str, series: Sequence[Series]) -> None:
    frame = experiment_frames.words(measures, suite=suite, series=series)
    how = experiment_frames.temperatures(measures, suite=suite)
    panel(
        experiment_charts.grouped_bars(
            frame,
            title="Responses with a word (Figure 3)",
            subtitle=f"{experiment_frames.suite_label(suite)}, {how}; the axis is a square root",
            category=Axis(column="word", title=""),
            y=Axis(column="value", title="share of responses", format=_PERCENT),
            series=series,
            is_root=True,
        ),
        empty="Words: no response of an evaluation has one of them."
        if suite
        else "Words: no evaluation yet; `mentor-serve eval` counts them.",
    )


def _pass_by_suite(measures: Rows, suites: Sequence[str], series: Sequence[Series]) -> None:
    frame, ks = experiment_frames.pass_bars(measures, suites=suites, series=series)
    k = ks.pop() if len(ks) == 1 else "k"
    panel(
        experiment_charts.grouped_bars(
            frame,
            title=f"pass@{k} by problems (Figure 4)",
            subtitle="solved by at least one of k responses",
            category=Axis(column="suite", title=""),
            y=Axis(column="value", title=f"pass@{k}", format=_PERCENT, domain=_SHARE),
            series=series,
        ),
        empty="pass@k: no evaluation with several responses to a problem yet; `mentor-serve eval` "
        "makes one.",
    )


def _pass_by_k(measures: Rows, suite: str, series: Sequence[Series]) -> None:
    panel(
        experiment_charts.curves(
            experiment_frames.pass_curve(measures, suite=suite, series=series),
            title=f"pass@k over k, {experiment_frames.suite_label(suite)} (Figure 4)",
            x=Axis(column="k", title="k", format="d", log=True),
            y=Axis(column="value", title="pass@k", format=_PERCENT),
            series=series,
        ),
        empty="pass@k over k: no evaluation with several responses to a problem yet.",
    )


def _table(measures: Rows, updates: Rows, suite: str, series: Sequence[Series]) -> None:
    frame = experiment_frames.table(measures, updates, suite=suite, series=series)
    number = st.column_config.NumberColumn
    solved = [name for name in frame if "@" in name or name == "greedy accuracy"]
    st.dataframe(
        frame,
        hide_index=True,
        height="content",
        column_config={
            "series": st.column_config.TextColumn(width="medium"),
            **{name: number(format="percent") for name in solved},
            "entropy (nats)": number(format="%.3f"),
            "s an update": number(format="%.2f"),
        },
    )
