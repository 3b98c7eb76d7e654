"""From rows of `ExperimentReader` to the frames that the experiments page draws. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from mentor_dashboard.means import Rows, mean_over_runs
from mentor_dashboard.series import Series
from mentor_serve.store.experiment_stats import GREEDY, WORD_SHARES

MAX_WORDS = 10
"""Words that fit under one chart."""
LAST = 5
"""Points of a curve whose mean stands for the end of a run."""
_SHARE = (0.0, 1.0)
_CHOSEN_BY = (":validation", ":curve")
"""Ends of the names of a comparison's problems that something was chosen by."""


def curve_suites(curves: Rows) -> list[str]:
    """Suites of which there are curves, the one with the most points first.

    A suite that no run was evaluated on twice is left out, unless there are no others.
    """
    steps: dict[str, set[int]] = {}
    for row in curves:
        steps.setdefault(row["suite"], set()).add(row["step"])
    several = [suite for suite, found in steps.items() if len(found) > 1]
    return sorted(several or steps, key=lambda suite: (-len(steps[suite]), suite))


def measured_suites(measures: Rows, series: Sequence[Series]) -> list[str]:
    """Suites that the series can be compared by, `in_domain` first.

    Those that at least two series have, with sampled responses, without a comparison's validation
    problems; each of these conditions counts only while it leaves any.
    """
    owners: dict[str, set[str]] = {}
    labels = _labels(series)
    for row in measures:
        owners.setdefault(row["suite"], set()).add(labels[row["run_id"]])
    sampled = {row["suite"] for row in measures if row["metric"] == "pass_at_k"}
    found = set(owners)
    found = {suite for suite in found if len(owners[suite]) > 1} or found
    found = found & sampled or found
    found = {suite for suite in found if not suite.endswith(_CHOSEN_BY)} or found
    return sorted(found, key=lambda suite: (not suite.startswith("in_domain"), suite))


def suite_label(suite: str) -> str:
    """Without what a comparison adds: `in_domain:test` is "in_domain"."""
    for end in _CHOSEN_BY:
        if suite.endswith(end):
            return f"{suite.removesuffix(end)} (validation)"
    return suite.removesuffix(":test")


def greedy_curve(curves: Rows, *, suite: str, series: Sequence[Series]) -> pd.DataFrame:
    """Greedy accuracy by step."""
    rows = [row for row in curves if row["suite"] == suite]
    return mean_over_runs(rows, series=series, value="value", by=["step"], limits=_SHARE)


def words(measures: Rows, *, suite: str, series: Sequence[Series]) -> pd.DataFrame:
    """Share of responses by `word`: the most frequent MAX_WORDS that anybody says, by frequency.

    Words of sampled responses where there are any, else of greedy ones.
    """
    rows: list[dict[str, Any]] = []
    for prefix in WORD_SHARES:
        rows = rows or [
            {**row, "word": row["metric"].removeprefix(prefix)}
            for row in measures
            if row["suite"] == suite and row["metric"].startswith(prefix)
        ]
    frame = mean_over_runs(rows, series=series, value="value", by=["word"], limits=_SHARE)
    most = frame.groupby("word")["value"].max().sort_values(ascending=False, kind="stable")
    shown = [word for word, share in most.items() if share > 0][:MAX_WORDS]
    frame = frame[frame["word"].isin(shown)]
    return frame.sort_values("word", key=lambda column: column.map(shown.index), kind="stable")


def temperatures(measures: Rows, *, suite: str) -> str:
    """How the responses of a suite were drawn, in words."""
    rows = [row for row in measures if row["suite"] == suite]
    found = sorted({row["temperature"] for row in rows if row["metric"].startswith(WORD_SHARES[0])})
    return "temperature " + ", ".join(f"{one:g}" for one in found) if found else "greedy"


def pass_bars(
    measures: Rows, *, suites: Iterable[str], series: Sequence[Series]
) -> tuple[pd.DataFrame, set[int]]:
    """pass@k by `suite` (its label) at the largest k that all series have, and those ks."""
    ks = {suite: _largest_common_k(measures, suite, series) for suite in suites}
    ks = {suite: k for suite, k in ks.items() if k is not None}
    differ = len(set(ks.values())) > 1
    rows = [
        {**row, "suite": suite_label(suite) + (f" (k = {k})" if differ else "")}
        for suite, k in ks.items()
        for row in measures
        if (row["suite"], row["metric"], row["k"]) == (suite, "pass_at_k", k)
    ]
    frame = mean_over_runs(rows, series=series, value="value", by=["suite"], limits=_SHARE)
    order = list(dict.fromkeys(row["suite"] for row in rows))
    frame = frame.sort_values("suite", key=lambda column: column.map(order.index), kind="stable")
    return frame, {k for k in ks.values() if k is not None}


def pass_curve(measures: Rows, *, suite: str, series: Sequence[Series]) -> pd.DataFrame:
    """pass@k by `k`."""
    rows = [row for row in measures if (row["suite"], row["metric"]) == (suite, "pass_at_k")]
    return mean_over_runs(rows, series=series, value="value", by=["k"], limits=_SHARE)


def table(measures: Rows, updates: Rows, *, suite: str, series: Sequence[Series]) -> pd.DataFrame:
    """One row a series, numbers are means over its runs; accuracy is of the given suite."""
    of_suite = [row for row in measures if row["suite"] == suite]
    k = _largest_common_k(measures, suite, series)
    avg_ks = {row["k"] for row in of_suite if row["metric"] == "avg_at_k"}
    ends = _ends(updates)
    columns = {
        "greedy accuracy": _means(of_suite, series, metric=GREEDY),
        f"avg@{avg_ks.pop() if len(avg_ks) == 1 else 'k'}": _means(
            of_suite, series, metric="avg_at_k"
        ),
        f"pass@{k or 'k'}": _means(
            [row for row in of_suite if row["k"] == k], series, metric="pass_at_k"
        ),
        "entropy (nats)": _by_label(mean_over_runs(ends, series=series, value="entropy")),
        "s an update": _by_label(mean_over_runs(ends, series=series, value="seconds")),
    }
    steps = {row["run_id"]: row["step"] for row in ends}
    return pd.DataFrame(
        [
            {
                "series": one.label,
                "runs": one.num_runs,
                "updates": max((steps.get(run_id, 0) for run_id in one.run_ids), default=0),
                **{name: values.get(one.label) for name, values in columns.items()},
            }
            for one in series
        ]
    )


def _largest_common_k(measures: Rows, suite: str, series: Sequence[Series]) -> int | None:
    """The largest k of pass@k that all series with the suite have; any series' where none is."""
    labels = _labels(series)
    ks: dict[str, set[int]] = {}
    for row in measures:
        if row["suite"] == suite and row["metric"] == "pass_at_k":
            ks.setdefault(labels[row["run_id"]], set()).add(row["k"])
    if not ks:
        return None
    return max(set.intersection(*ks.values()) or set.union(*ks.values()))


def _labels(series: Sequence[Series]) -> dict[str, str]:
    return {run_id: one.label for one in series for run_id in one.run_ids}


def _ends(updates: Rows) -> list[dict[str, Any]]:
    """By run: step and entropy at its end, and the median seconds from one update to the next."""
    found = []
    frame = pd.DataFrame(list(updates))
    if frame.empty:
        return []
    for run_id, of_run in frame.groupby("run_id"):
        seconds = of_run["step_time_s"] + of_run["wait_time_s"].fillna(0.0)
        found.append(
            {
                "run_id": run_id,
                "step": int(of_run["step"].max()),
                "entropy": of_run["entropy"].tail(LAST).mean(),
                # A median: an evaluation between two updates counts as waiting.
                "seconds": seconds.median(),
            }
        )
    return found


def _means(rows: Rows, series: Sequence[Series], *, metric: str) -> dict[str, float]:
    chosen = [row for row in rows if row["metric"] == metric]
    return _by_label(mean_over_runs(chosen, series=series, value="value"))


def _by_label(frame: pd.DataFrame) -> dict[str, float]:
    return dict(zip(frame["series"], frame["value"], strict=True))
