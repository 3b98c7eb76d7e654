"""Overview: is training healthy, and is the policy getting better? Answered above the fold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import pandas as pd
import streamlit as st

from mentor_dashboard import charts, health, palette
from mentor_dashboard.shell import Run, live_page, panel
from mentor_dashboard.source import read
from mentor_serve.store.stats import StatsReader
from mentor_serve.types import TrajectoryKind

Rows = Sequence[Mapping[str, Any]]

VERSION_POINTS = 60
"""Points of the curves by version: each pools enough rollouts for its interval to be narrow."""
EDGE_POINTS = 5
"""Points that stand for "first" and for "now" in the pass rate."""
THROUGHPUT_MINUTES = 60

_BADGES = {
    "good": (":material/check_circle:", "green"),
    "watch": (":material/visibility:", "orange"),
    "bad": (":material/error:", "red"),
}


def page() -> None:
    """Body of the page."""
    live_page(
        "Overview",
        _body,
        intro="Is training healthy, and is the policy getting better while it serves?",
    )


def _body(run: Run) -> None:
    run_id, now = run["id"], datetime.now(UTC)
    curve = read(StatsReader.training_curve, run_id)
    on_policy, mixed = (
        read(StatsReader.by_version, run_id, kind=kind, max_points=VERSION_POINTS)
        for kind in (TrajectoryKind.ON_POLICY, TrajectoryKind.MIXED)
    )
    minute = now.replace(second=0, microsecond=0)
    throughput = read(StatsReader.throughput, run_id, now=minute, minutes=THROUGHPUT_MINUTES)
    events = read(StatsReader.events, run_id)
    _health(run_id, curve=curve, events=events, now=now)
    _numbers(run_id, on_policy=on_policy, mixed=mixed, throughput=throughput)
    _curves(curve, on_policy=on_policy, mixed=mixed)
    _evaluations(read(StatsReader.evaluations, run_id))
    left, right = st.columns([3, 2])
    with left:
        _events(events)
    with right:
        _throughput(throughput)


def _health(run_id: str, *, curve: Rows, events: Rows, now: datetime) -> None:
    latest = read(StatsReader.latest_update, run_id)
    found = health.findings(
        curve=curve,
        groups=read(StatsReader.group_counts, run_id),
        events=events,
        last_update_at=latest["created_at"] if latest else None,
        now=now,
    )
    with st.container(horizontal=True, gap="small"):
        for finding in found:
            icon, colour = _BADGES[finding.level]
            st.badge(finding.label, icon=icon, color=colour, help=finding.detail)
    for finding in found:
        if finding.level == "bad":
            st.error(finding.detail, icon=":material/error:")


def _numbers(run_id: str, *, on_policy: Rows, mixed: Rows, throughput: Rows) -> None:
    latest = read(StatsReader.latest_update, run_id)
    live = read(StatsReader.live_version, run_id)
    first, current = pass_rate_edges(on_policy)
    recent = [row["num_groups"] for row in throughput[-5:]]
    tiles = st.columns(7)
    tiles[0].metric(
        "Step", _count(latest["step"] if latest else None), help="Updates of the learner."
    )
    tiles[1].metric(
        "Live version",
        _count(live["version"] if live else None),
        help="The weights that serve now.",
    )
    tiles[2].metric(
        "Pass rate",
        _percent(current),
        delta=_points(first, current),
        help=f"Share of correct on-policy rollouts at the right end of the curve below (last "
        f"{EDGE_POINTS} points), against its left end.",
    )
    tiles[3].metric(
        "Groups / min",
        f"{sum(recent) / len(recent):.1f}" if recent else "-",
        help="Mean of the last five full minutes.",
    )
    tiles[4].metric(
        "Replaced",
        _percent(mixed[-1]["intervention_rate"] if mixed else None),
        help="Share of tokens of mixed rollouts that the expert replaced, newest version.",
    )
    tiles[5].metric(
        "alpha",
        f"{live['alpha']:.3f}" if live else "-",
        help="Weight of the mixed rollouts' advantages (Eq. 11); falls to 0.",
    )
    tiles[6].metric(
        "gamma (nats)",
        f"{live['gamma']:.3g}" if live else "-",
        help="Entropy from which the expert is always consulted (Eq. 6).",
    )


def _curves(curve: Rows, *, on_policy: Rows, mixed: Rows) -> None:
    left, right = st.columns(2)
    with left:
        panel(
            charts.line_with_band(
                on_policy,
                title="Pass rate of the policy alone",
                subtitle="on-policy rollouts, correct answers; shaded: 95 % interval",
                x=charts.VERSION,
                y=charts.Axis(
                    column="pass_rate", title="pass rate", format=".0%", domain=(0.0, 1.0)
                ),
                band=charts.Band(low="pass_rate_low", high="pass_rate_high", colour=palette.POLICY),
            ),
            empty="Pass rate: appears with the first scored on-policy rollouts.",
        )
        panel(
            charts.lines(
                curve,
                title="Token entropy",
                x=charts.STEP,
                y=charts.Axis(column="entropy", title="mean entropy (nats)", zero=True),
                series=[charts.Series(column="entropy", label="entropy", colour=palette.ENTROPY)],
                smooth=True,
            ),
            empty="Entropy: appears with the first update.",
        )
    with right:
        panel(
            charts.lines(
                curve,
                title="Mean reward of the rollouts trained on",
                x=charts.STEP,
                y=charts.Axis(column="reward", title="reward", format=".2f", domain=(0.0, 1.0)),
                series=REWARDS,
                smooth=True,
            ),
            empty="Reward: appears with the first update.",
        )
        panel(
            charts.lines(
                response_lengths(on_policy, mixed=mixed),
                title="Response length",
                x=charts.VERSION,
                y=charts.Axis(column="tokens", title="mean tokens", format="d", zero=True),
                series=REWARDS_LENGTH,
            ),
            empty="Response length: appears with the first rollouts.",
        )


def _evaluations(rows: Rows) -> None:
    """Nothing until an evaluation was stored: most runs never store one."""
    if not rows:
        return
    series = evaluation_series(rows)
    panel(
        charts.lines(
            evaluation_points(rows),
            title="Evaluations",
            x=charts.VERSION,
            y=charts.Axis(column="value", title="value", format=".2f", zero=True),
            series=series,
        ),
        empty="Evaluations: no value could be computed.",
    )


def evaluation_name(row: Mapping[str, Any]) -> str:
    """`suite: metric@k`, for instance `sums: pass@8`."""
    k = "" if row["k"] is None else f"@{row['k']}"
    return f"{row['suite']}: {row['metric'].removesuffix('_at_k')}{k}"


def evaluation_series(rows: Rows) -> list[charts.Series]:
    """One series for each suite and metric, as many as there are colours."""
    names = sorted({evaluation_name(row) for row in rows})
    return [
        charts.Series(column=name, label=name, colour=colour)
        for name, colour in zip(names, palette.SERIES, strict=False)
    ]


def evaluation_points(rows: Rows) -> list[dict[str, Any]]:
    """One row a version with a column for each series; the newest value of a version wins."""
    points: dict[int, dict[str, Any]] = {}
    for row in rows:
        version = row["policy_version"]
        point = points.setdefault(version, {"policy_version": version})
        point[evaluation_name(row)] = row["value"]
    return [points[version] for version in sorted(points)]


REWARDS = [
    charts.Series(column="mean_reward_on_policy", label="on-policy", colour=palette.POLICY),
    charts.Series(column="mean_reward_mixed", label="mixed with the expert", colour=palette.EXPERT),
]
REWARDS_LENGTH = [
    charts.Series(column="on_policy", label="on-policy", colour=palette.POLICY),
    charts.Series(column="mixed", label="mixed with the expert", colour=palette.EXPERT),
]


def response_lengths(on_policy: Rows, *, mixed: Rows) -> list[dict[str, Any]]:
    """Rows of policy_version with the mean length of either kind."""
    rows: dict[int, dict[str, Any]] = {}
    for column, source in (("on_policy", on_policy), ("mixed", mixed)):
        for row in source:
            version = row["policy_version"]
            rows.setdefault(version, {"policy_version": version})
            rows[version][column] = row["mean_response_tokens"]
    return [rows[version] for version in sorted(rows)]


def pass_rate_edges(on_policy: Rows) -> tuple[float | None, float | None]:
    """Pass rate over the first and the newest EDGE_POINTS rows; no first one if they meet."""
    scored = [row for row in on_policy if row["num_scored"]]
    current = _pooled(scored[-EDGE_POINTS:])
    if len(scored) < 2 * EDGE_POINTS:
        return None, current
    return _pooled(scored[:EDGE_POINTS]), current


def _pooled(rows: Rows) -> float | None:
    scored = sum(row["num_scored"] for row in rows)
    return sum(row["num_passed"] for row in rows) / scored if scored else None


def _events(events: Rows) -> None:
    st.subheader("Events", anchor=False)
    if not events:
        st.caption("Nothing has been reported.")
        return
    frame = pd.DataFrame(
        {
            "time (UTC)": [event["created_at"] for event in events],
            "severity": [event["severity"] for event in events],
            "kind": [event["kind"] for event in events],
            "message": [event["message"] for event in events],
        }
    )
    st.dataframe(
        frame,
        hide_index=True,
        height=min(270, 36 * (len(events) + 1) + 2),
        column_config={
            "time (UTC)": st.column_config.DatetimeColumn(
                format="MMM D, HH:mm:ss", timezone="UTC", width=130
            ),
            "severity": st.column_config.TextColumn(width=80),
            "kind": st.column_config.TextColumn(width=150),
            "message": st.column_config.TextColumn(width="large"),
        },
    )


def _throughput(throughput: Rows) -> None:
    panel(
        charts.throughput(throughput),
        empty="Groups per minute: appears with the first group.",
    )


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _points(first: float | None, current: float | None) -> str | None:
    if first is None or current is None:
        return None
    return f"{(current - first) * 100:+.1f} points"
