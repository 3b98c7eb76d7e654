"""Means over the runs of a series, with how far chance between runs may have moved them.

Frames in, frames out. The interval is Student's, 95 %, over runs; a single run has none. It says
nothing about the problems that were drawn: intervals that count them as well need the results
problem by problem, which `mentor-serve compare` keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from mentor_dashboard.series import Series

Rows = Sequence[Mapping[str, Any]]

_UPPER = 0.975
"""Quantile that leaves 95 % between itself and its mirror."""


def mean_over_runs(
    rows: Rows,
    *,
    series: Sequence[Series],
    value: str,
    by: Sequence[str] = (),
    limits: tuple[float, float] = (-np.inf, np.inf),
) -> pd.DataFrame:
    """One row for each series and combination of `by`: series, `by`, value, low, high, num_runs.

    `rows` have run_id, `by` and `value`; missing values and runs of no series are left out. `low`
    and `high` are within `limits`, and missing where there is one run. For example two runs with
    0.4 and 0.6 give 0.5 and, as t is 12.7 for one degree of freedom, (0, 1) within those limits.
    """
    columns = ["series", *by, "value", "low", "high", "num_runs"]
    labels = {run_id: one.label for one in series for run_id in one.run_ids}
    frame = pd.DataFrame(list(rows))
    if frame.empty:
        return pd.DataFrame(columns=columns)
    frame["series"] = frame["run_id"].map(labels)
    frame["value"] = pd.to_numeric(frame[value])
    frame = frame.dropna(subset=["series", "value"])
    found = (
        frame.groupby(["series", *by], sort=True)["value"]
        .agg(value="mean", deviation="std", num_runs="count")
        .reset_index()
    )
    num_runs = found["num_runs"].to_numpy()
    half = stdtrit(np.maximum(num_runs - 1, 1), _UPPER) * found["deviation"] / np.sqrt(num_runs)
    found["low"] = (found["value"] - half).clip(lower=limits[0])
    found["high"] = (found["value"] + half).clip(upper=limits[1])
    return found[columns]
