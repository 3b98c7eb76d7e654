"""Which columns the statistics read, and how sums from SQL become the rates that people read.

Pure functions over rows; the queries themselves are in `stats`.
"""

from __future__ import annotations

from decimal import Decimal
from math import sqrt
from typing import Any

Row = dict[str, Any]

_Z_95 = 1.96

AVERAGED = (
    "mean_reward_on_policy",
    "mean_reward_mixed",
    "mean_accuracy_on_policy",
    "mean_accuracy_mixed",
    "frac_reward_zero_std",
    "loss",
    "grad_norm",
    "entropy",
    "clip_fraction_low",
    "clip_fraction_high",
    "mismatch_kl",
    "learning_rate",
    "alpha",
    "gamma",
    "mean_weight",
    "gated_share",
    "intervention_rate",
    "mean_response_tokens",
    "truncated_share",
    "staleness_mean",
    "num_groups",
    "num_tokens",
    "step_time_s",
    "wait_time_s",
)
"""Columns of `updates` of which a bucket shows the mean."""
LISTED = (
    "id",
    "kind",
    "status",
    "reward",
    "accuracy",
    "format_score",
    "num_tokens",
    "num_gated",
    "num_interventions",
    "mean_entropy",
    "mean_weight",
    "min_policy_version",
    "max_policy_version",
    "stop_reason",
    "created_at",
)
"""Columns of `trajectories` in lists."""
VERSION_SUMS = (
    "num_trajectories",
    "num_scored",
    "num_passed",
    "reward_sum",
    "num_tokens",
    "num_gated",
    "num_interventions",
    "weight_sum",
    "entropy_sum",
    "num_entropy_tokens",
)
"""Columns of `version_stats` that a bucket of versions adds up."""
HIGHEST = ("step", "policy_version", "created_at", "staleness_max")
"""Columns of `updates` of which a bucket shows the highest value."""


def wilson_interval(num_passed: int, num_trials: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927); (0, 1) without trials."""
    if num_trials == 0:
        return 0.0, 1.0
    share, z2 = num_passed / num_trials, _Z_95**2
    centre = share + z2 / (2 * num_trials)
    spread = _Z_95 * sqrt(share * (1 - share) / num_trials + z2 / (4 * num_trials**2))
    scale = 1 + z2 / num_trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def version_row(row: Row) -> Row:
    """Rates from the sums over one bucket of versions; None where nothing was summed."""
    row = {name: plain(value) for name, value in row.items()}
    scored, passed = row["num_scored"], row["num_passed"]
    tokens, gated, replaced = (
        row.pop(name) for name in ("num_tokens", "num_gated", "num_interventions")
    )
    sums = {name: row.pop(name) for name in ("reward_sum", "weight_sum", "entropy_sum")}
    entropy_tokens = row.pop("num_entropy_tokens")
    low, high = wilson_interval(passed, scored) if scored else (None, None)
    return {
        **row,
        "pass_rate": passed / scored if scored else None,
        "pass_rate_low": low,
        "pass_rate_high": high,
        "mean_reward": sums["reward_sum"] / scored if scored else None,
        "mean_response_tokens": tokens / row["num_trajectories"],
        "gated_share": gated / tokens if tokens else None,
        "intervention_rate": replaced / tokens if tokens else None,
        "mean_weight": sums["weight_sum"] / tokens if tokens else None,
        "mean_entropy": sums["entropy_sum"] / entropy_tokens if entropy_tokens else None,
    }


def plain(value: Any) -> Any:
    """PostgreSQL answers sums and means of integers as decimals, which neither add to floats."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return value
