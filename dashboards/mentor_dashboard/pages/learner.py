"""Learner: is each update sound, fresh and on time?"""

from __future__ import annotations

from typing import Any

import streamlit as st

from mentor_dashboard import charts, palette
from mentor_dashboard.shell import Run, live_page, panel
from mentor_dashboard.source import read
from mentor_serve.store.stats import StatsReader
from mentor_serve.types import GroupStatus

STALENESS_UPDATES = 100


def page() -> None:
    """Body of the page."""
    live_page(
        "Learner", _body, intro="One point is one update: its loss, its size, its data, its time."
    )


def _body(run: Run) -> None:
    run_id = run["id"]
    curve = read(StatsReader.training_curve, run_id)
    first, second, third = st.columns(3)
    first_empty = "appears with the first update."
    with first:
        panel(_single(curve, "loss", "Loss (Eq. 9)", "loss"), empty=f"Loss: {first_empty}")
        panel(_staleness(run_id), empty=f"Staleness: {first_empty}")
        panel(_step_time(curve), empty=f"Step time: {first_empty}")
    with second:
        panel(
            _single(curve, "grad_norm", "Gradient norm, before clipping", "norm", zero=True),
            empty=f"Gradient norm: {first_empty}",
        )
        panel(_clipping(curve), empty=f"Clip fractions: {first_empty}")
        panel(_queue(run_id), empty="Queue: appears with the first group.")
    with third:
        panel(
            _single(
                curve,
                "frac_reward_zero_std",
                "Groups that teach nothing",
                "share with equal rewards",
                zero=True,
                number_format=".0%",
            ),
            empty=f"Groups without signal: {first_empty}",
        )
        panel(
            _single(
                curve,
                "mismatch_kl",
                "Sampler against learner",
                "KL estimate (nats)",
                number_format=".1e",
            ),
            empty=f"Mismatch: {first_empty}",
        )
        panel(
            _single(
                curve, "num_tokens", "Tokens of an update", "tokens", zero=True, number_format=",d"
            ),
            empty=f"Tokens: {first_empty}",
        )


def _single(
    curve: list[dict[str, Any]],
    column: str,
    title: str,
    unit: str,
    *,
    zero: bool = False,
    number_format: str = ".3~g",
) -> Any:
    return charts.lines(
        curve,
        title=title,
        x=charts.STEP,
        y=charts.Axis(column=column, title=unit, zero=zero, format=number_format),
        series=[charts.Series(column=column, label=unit, colour=palette.NEUTRAL)],
        smooth=True,
    )


def _clipping(curve: list[dict[str, Any]]) -> Any:
    return charts.lines(
        curve,
        title="Tokens whose ratio is clipped",
        x=charts.STEP,
        y=charts.Axis(column="share", title="share of tokens", format=".2~%", zero=True),
        series=[
            charts.Series(column="clip_fraction_high", label="above", colour=palette.EXPERT),
            charts.Series(column="clip_fraction_low", label="below", colour=palette.POLICY),
        ],
        smooth=True,
    )


def _step_time(curve: list[dict[str, Any]]) -> Any:
    return charts.lines(
        curve,
        title="Time of an update",
        x=charts.STEP,
        y=charts.Axis(column="seconds", title="seconds", zero=True),
        series=[
            charts.Series(column="step_time_s", label="computing", colour=palette.POLICY),
            charts.Series(column="wait_time_s", label="waiting for groups", colour=palette.NEUTRAL),
        ],
        smooth=True,
    )


def _staleness(run_id: str) -> Any:
    return charts.bars(
        read(StatsReader.staleness, run_id, num_updates=STALENESS_UPDATES),
        title=f"Age of the data, last {STALENESS_UPDATES} updates",
        category=charts.Axis(column="staleness", title="versions behind"),
        value=charts.Axis(column="num_groups", title="groups", format=",d"),
    )


def _queue(run_id: str) -> Any:
    counts = read(StatsReader.group_counts, run_id)
    if not any(counts.values()):
        return None
    consumed = counts.pop(GroupStatus.CONSUMED.value)
    rows = [{"status": status, "num_groups": count} for status, count in counts.items()]
    return charts.bars(
        rows,
        title="Groups waiting and lost",
        subtitle=f"{consumed:,} more were consumed",
        category=charts.Axis(column="status", title="status"),
        value=charts.Axis(column="num_groups", title="groups", format=",d"),
        colours=palette.STATUS_COLOURS,
    )
