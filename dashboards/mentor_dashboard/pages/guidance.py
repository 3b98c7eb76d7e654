"""Guidance: where the expert speaks, how often it is followed, and what it says instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import streamlit as st

from mentor_dashboard import charts, palette
from mentor_dashboard.shell import Run, live_page, panel
from mentor_dashboard.source import read
from mentor_serve.store.stats import RECENT_TRAJECTORIES, StatsReader
from mentor_serve.types import TrajectoryKind

Rows = Sequence[Mapping[str, Any]]

TOP_REPLACEMENTS = 25


def page() -> None:
    """Body of the page."""
    live_page(
        "Guidance",
        _body,
        intro="The expert is asked where the policy is uncertain, and replaces a token only where "
        "it disagrees. gamma is a quantile of the policy's own entropy, so the share that is asked "
        "may stay level while uncertainty falls.",
    )


def _body(run: Run) -> None:
    run_id = run["id"]
    curve = read(StatsReader.training_curve, run_id)
    mixed = read(StatsReader.by_version, run_id, kind=TrajectoryKind.MIXED)
    left, right = st.columns(2)
    with left:
        panel(rates_chart(mixed), empty="Rates: appear with the first mixed rollouts.")
        panel(schedule_chart(curve), empty="Schedule: appears with the first update.")
    with right:
        panel(uncertainty_chart(curve), empty="Entropy and gamma: appear with the first update.")
        panel(weight_chart(mixed), empty="Weight: appears with the first mixed rollouts.")
    _replacements(read(StatsReader.replacements, run_id, limit=TOP_REPLACEMENTS))


def rates_chart(mixed: Rows) -> Any:
    """Gated share and intervention rate of mixed rollouts by version."""
    return charts.lines(
        mixed,
        title="How often the expert is asked, and how often it replaces",
        x=charts.VERSION,
        y=charts.Axis(column="share", title="share of tokens", format=".1%", zero=True),
        series=[
            charts.Series(column="gated_share", label="gated (asked)", colour=palette.GATE),
            charts.Series(column="intervention_rate", label="replaced", colour=palette.EXPERT),
        ],
        smooth=True,
    )


def uncertainty_chart(curve: Rows) -> Any:
    """Mean entropy against gamma; the initial gamma of 999 would flatten everything else."""
    usual = [dict(row) for row in curve]
    for row in usual:
        if row["gamma"] is not None and row["gamma"] >= 100:
            row["gamma"] = None
    return charts.lines(
        usual,
        title="The policy's uncertainty",
        x=charts.STEP,
        y=charts.Axis(column="nats", title="nats", zero=True),
        series=[
            charts.Series(column="gamma", label="gamma (entropy quantile)", colour=palette.NEUTRAL),
            charts.Series(column="entropy", label="mean entropy", colour=palette.ENTROPY),
        ],
        smooth=True,
    )


def weight_chart(mixed: Rows) -> Any:
    """Mean weight w = min(1, H / gamma) of mixed rollouts by version."""
    return charts.lines(
        mixed,
        title="Mean weight of the expert",
        x=charts.VERSION,
        y=charts.Axis(column="mean_weight", title="mean w = min(1, H / gamma)", zero=True),
        series=[charts.Series(column="mean_weight", label="weight", colour=palette.GATE)],
        smooth=True,
    )


def schedule_chart(curve: Rows) -> Any:
    """alpha by step."""
    return charts.lines(
        curve,
        title="How much mixed rollouts count (alpha)",
        x=charts.STEP,
        y=charts.Axis(column="alpha", title="alpha", zero=True),
        series=[charts.Series(column="alpha", label="alpha", colour=palette.EXPERT)],
    )


def _replacements(rows: Rows) -> None:
    st.subheader("What the expert says instead", anchor=False)
    if not rows:
        st.caption("No replacement yet: the expert has agreed, or has not been asked.")
        return
    st.caption(
        f"The most frequent replacements over the newest {RECENT_TRAJECTORIES:,} trajectories "
        "that have any. Quotes show spaces and line breaks."
    )
    frame = pd.DataFrame(
        {
            "the policy proposed": [quoted(row, "proposed") for row in rows],
            "the expert chose": [quoted(row, "chosen") for row in rows],
            "times": [row["num_interventions"] for row in rows],
            "trajectories": [row["num_trajectories"] for row in rows],
            "mean entropy": [row["mean_entropy"] for row in rows],
            "mean weight": [row["mean_weight"] for row in rows],
        }
    )
    st.dataframe(
        frame,
        hide_index=True,
        column_config={
            "times": st.column_config.ProgressColumn(
                format="%d", min_value=0, max_value=int(frame["times"].max()), color="orange"
            ),
            "mean entropy": st.column_config.NumberColumn("mean entropy (nats)", format="%.2f"),
            "mean weight": st.column_config.NumberColumn(format="%.2f"),
        },
    )


def quoted(row: Mapping[str, Any], which: str) -> str:
    """The token's text in quotes, so that ` so` and `so` differ; its id without a text."""
    text = row[f"{which}_text"]
    return f"token {row[f'{which}_token_id']}" if text is None else repr(text)
