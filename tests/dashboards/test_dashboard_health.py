"""The overview's judgements, each at the edge where it changes its mind."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from mentor_dashboard.health import Finding, ago, findings

NOW = datetime(2026, 5, 4, 12, tzinfo=UTC)


def labels(**changes: Any) -> list[str]:
    return [finding.label for finding in judge(**changes)]


def judge(
    *,
    curve: list[dict[str, Any]] | None = None,
    groups: dict[str, int] | None = None,
    events: list[dict[str, Any]] | None = None,
    silent_s: float | None = 5.0,
) -> list[Finding]:
    return findings(
        curve=curve or [],
        groups=groups or {},
        events=events or [],
        last_update_at=None if silent_s is None else NOW - timedelta(seconds=silent_s),
        now=NOW,
    )


def curve(column: str, first: float, last: float) -> list[dict[str, Any]]:
    return [{column: first}] * 20 + [{column: last}] * 20


def test_before_the_first_update_it_says_how_much_was_collected() -> None:
    (finding,) = judge(silent_s=None, groups={"ready": 3})
    assert (finding.level, finding.label) == ("watch", "no update yet")
    assert finding.detail.startswith("3 groups")


@pytest.mark.parametrize(
    ("silent_s", "label"),
    [
        (119, "updating"),
        (121, "no recent update"),
        (3599, "no recent update"),
        (3601, "not training"),
    ],
)
def test_silence_is_judged_by_its_length(silent_s: float, label: str) -> None:
    assert labels(silent_s=silent_s) == [label]


def test_slow_updates_may_be_silent_for_longer() -> None:
    slow = [{"step_time_s": 60.0}] * 5
    assert labels(curve=slow, silent_s=599) == ["updating"]
    assert labels(curve=slow, silent_s=601) == ["no recent update"]


@pytest.mark.parametrize(
    ("first", "last", "label"),
    [(0.2, 0.5, "reward rising"), (0.5, 0.5, "reward flat"), (0.5, 0.2, "reward falling")],
)
def test_reward_is_compared_with_the_beginning(first: float, last: float, label: str) -> None:
    assert label in labels(curve=curve("mean_reward_on_policy", first, last))


def test_a_short_run_is_not_judged_on_its_reward() -> None:
    assert labels(curve=curve("mean_reward_on_policy", 0.2, 0.9)[:39]) == ["updating"]


def test_collapsed_entropy_and_missing_signal_are_watched() -> None:
    assert "entropy collapsed" in labels(curve=curve("entropy", 1.0, 0.05))
    assert "still exploring" in labels(curve=curve("entropy", 1.0, 0.5))
    assert "little signal" in labels(curve=[{"frac_reward_zero_std": 0.95}])
    assert "groups differ" in labels(curve=[{"frac_reward_zero_std": 0.5}])


def test_wasted_groups_are_watched() -> None:
    assert "groups wasted" in labels(groups={"consumed": 70, "stale": 30})
    assert "groups wasted" in labels(groups={"consumed": 90, "failed": 10})
    assert "little waste" in labels(groups={"consumed": 90, "stale": 10})


def test_only_recent_errors_count() -> None:
    old = {"severity": "error", "message": "old", "created_at": NOW - timedelta(hours=2)}
    new = {"severity": "error", "message": "disk full", "created_at": NOW}
    warning = {"severity": "warning", "message": "slow", "created_at": NOW}
    assert "errors" not in labels(events=[old, warning])
    assert judge(events=[new, old])[-1].detail == "1 in the last hour; the latest: disk full"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0 s ago"),
        (119, "119 s ago"),
        (120, "2 min ago"),
        (7200, "2 h ago"),
        (200_000, "2 days ago"),
    ],
)
def test_ages_read_well(seconds: float, text: str) -> None:
    assert ago(seconds) == text
