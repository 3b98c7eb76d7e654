"""Is training healthy? Pure judgements over the rows that the overview shows.

Each check answers one question a researcher would ask first, in one sentence with its numbers. A
check says nothing while there is too little to judge by; none of them looks at the database.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import fmean, median
from typing import Any, Literal

Rows = Sequence[Mapping[str, Any]]
Level = Literal["good", "watch", "bad"]

WINDOW = 20
"""Updates that stand for "now", and for "the beginning"."""
RECENT = timedelta(hours=1)
"""Errors older than this are history; a run without an update for so long was stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The answer to one check."""

    level: Level
    label: str
    """Two or three words."""
    detail: str
    """The numbers behind it, and what to do where something should be done."""


def findings(
    *,
    curve: Rows,
    groups: Mapping[str, int],
    events: Rows,
    last_update_at: datetime | None,
    now: datetime,
) -> list[Finding]:
    """All checks that have enough rows to say something."""
    checks = [
        _progress(curve, groups=groups, last_update_at=last_update_at, now=now),
        _learning(curve),
        _signal(curve),
        _entropy(curve),
        _waste(groups),
        _errors(events, now=now),
    ]
    return [finding for finding in checks if finding is not None]


def _progress(
    curve: Rows, *, groups: Mapping[str, int], last_update_at: datetime | None, now: datetime
) -> Finding:
    if last_update_at is None:
        collected = sum(groups.values())
        return Finding(
            level="watch",
            label="no update yet",
            detail=f"{collected} groups collected; the learner starts when a full batch is ready.",
        )
    silent_s = (now - last_update_at).total_seconds()
    usual_s = median(_values(curve, "step_time_s")[-WINDOW:] or [0.0])
    if silent_s > RECENT.total_seconds():
        return Finding(
            level="watch", label="not training", detail=f"The last update was {ago(silent_s)}."
        )
    if silent_s > max(120.0, 10 * usual_s):
        return Finding(
            level="bad",
            label="no recent update",
            detail=f"The last update was {ago(silent_s)}; see the events below, or "
            "`mentor-serve status`.",
        )
    return Finding(level="good", label="updating", detail=f"The last update was {ago(silent_s)}.")


def _learning(curve: Rows) -> Finding | None:
    rewards = _values(curve, "mean_reward_on_policy")
    if len(rewards) < 2 * WINDOW:
        return None
    first, last = fmean(rewards[:WINDOW]), fmean(rewards[-WINDOW:])
    detail = f"Mean on-policy reward {first:.2f} in the beginning, {last:.2f} now."
    if last > first + 0.02:
        return Finding(level="good", label="reward rising", detail=detail)
    if last < first - 0.05:
        return Finding(level="bad", label="reward falling", detail=detail)
    return Finding(level="watch", label="reward flat", detail=detail)


def _signal(curve: Rows) -> Finding | None:
    shares = _values(curve, "frac_reward_zero_std")[-WINDOW:]
    if not shares:
        return None
    share = fmean(shares)
    detail = f"{share:.0%} of recent groups have equal rewards throughout and teach nothing."
    if share > 0.9:
        return Finding(level="watch", label="little signal", detail=detail)
    return Finding(level="good", label="groups differ", detail=detail)


def _entropy(curve: Rows) -> Finding | None:
    entropies = _values(curve, "entropy")
    if len(entropies) < 2 * WINDOW:
        return None
    first, last = fmean(entropies[:WINDOW]), fmean(entropies[-WINDOW:])
    detail = f"Mean token entropy {first:.2f} nats in the beginning, {last:.2f} now."
    if last < 0.1 * first:
        return Finding(level="watch", label="entropy collapsed", detail=detail)
    return Finding(level="good", label="still exploring", detail=detail)


def _waste(groups: Mapping[str, int]) -> Finding | None:
    total = sum(groups.values())
    if total < WINDOW:
        return None
    stale, failed = groups.get("stale", 0), groups.get("failed", 0)
    detail = f"{stale} of {total} groups went stale, {failed} failed."
    if failed > 0.05 * total or stale > 0.2 * total:
        return Finding(level="watch", label="groups wasted", detail=detail)
    return Finding(level="good", label="little waste", detail=detail)


def _errors(events: Rows, *, now: datetime) -> Finding | None:
    recent = [
        event
        for event in events
        if event["severity"] in {"error", "critical"} and now - event["created_at"] < RECENT
    ]
    if not recent:
        return None
    return Finding(
        level="bad",
        label="errors",
        detail=f"{len(recent)} in the last hour; the latest: {recent[0]['message']}",
    )


def ago(seconds: float) -> str:
    """`12 s ago`, `5 min ago`, `3 h ago`, `2 days ago`."""
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"


def _values(rows: Rows, column: str) -> list[float]:
    return [float(row[column]) for row in rows if row.get(column) is not None]
