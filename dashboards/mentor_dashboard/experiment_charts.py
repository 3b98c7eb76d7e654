"""Altair charts that compare series of runs: frames of `means` in, charts out, no Streamlit.

The frames have `series`, `value`, `low`, `high` and `num_runs`. None of these charts has a legend:
a page draws one for all of them (see `legend`), because a dozen series would fill each with names.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from mentor_dashboard import palette
from mentor_dashboard.charts import HEIGHT, POINTS_BELOW, Axis, titled
from mentor_dashboard.series import Series

MAX_BANDS = 8
"""Intervals of more series than this lie over each other until nothing shows: lines alone then."""
_BAND = 0.15
"""Opacity of an interval."""
_LABEL_LIMIT = 130
"""Pixels of a suite's name under its bars."""


def legend(series: Sequence[Series]) -> str:
    """HTML: a swatch, the label and the number of runs of every series."""
    entries = "".join(
        '<span style="display:inline-flex;align-items:center;gap:0.4rem">'
        f'<span style="width:0.8rem;height:0.8rem;border-radius:2px;background:{one.colour}">'
        f"</span>{html.escape(one.label)}"
        f'<span style="opacity:0.65">{_runs(one.num_runs)}</span></span>'
        for one in series
    )
    return (
        '<div class="mentor-legend" style="display:flex;flex-wrap:wrap;gap:0.3rem 1.2rem;'
        f'font-size:0.9rem">{entries}</div>'
    )


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"


def curves(
    frame: pd.DataFrame,
    *,
    title: str,
    x: Axis,
    y: Axis,
    series: Sequence[Series],
    height: int = HEIGHT,
) -> alt.Chart | None:
    """A line for each series in its shaded interval; None where there is no value to draw.

    Intervals of more than MAX_BANDS series are left to the tooltips.
    """
    if frame.empty:
        return None
    several = frame[(frame["num_runs"] > 1) & (frame["series"].nunique() <= MAX_BANDS)]
    colour = _colour(series)
    base = alt.Chart(frame).encode(x=_x(x, frame), color=colour)
    scale = alt.Scale(domain=_domain(frame, several, y), nice=not y.domain, clamp=True)

    def height_of(column: str) -> alt.Y:
        axis = alt.Axis(format=y.format, tickCount=5)
        return alt.Y(f"{column}:Q", title=y.title, scale=scale, axis=axis)

    layers = []
    if not several.empty:
        band = alt.Chart(several).mark_area(opacity=_BAND)
        layers.append(band.encode(x=_x(x, frame), color=colour, y=height_of("low"), y2="high:Q"))
    is_short = frame[x.column].nunique() < POINTS_BELOW
    layers.append(
        base.mark_line(strokeWidth=2, point={"size": 25} if is_short else False).encode(
            y=height_of("value")
        )
    )
    layers.append(
        base.mark_circle(size=120, opacity=0).encode(
            y=height_of("value"),
            tooltip=[alt.Tooltip(f"{x.column}:Q", title=x.title, format=x.format), *_tooltip(y)],
        )
    )
    return titled(alt.layer(*layers), title=title, subtitle=None, height=height)


def grouped_bars(
    frame: pd.DataFrame,
    *,
    title: str,
    subtitle: str | None = None,
    category: Axis,
    y: Axis,
    series: Sequence[Series],
    is_root: bool = False,
    height: int = HEIGHT,
) -> alt.Chart | None:
    """Groups of bars, one group for each category in the order of the rows, one bar a series.

    With `is_root` the axis is a square root: small shares show beside large ones.
    """
    if frame.empty:
        return None
    categories = list(dict.fromkeys(frame[category.column]))
    drawn = [one.label for one in series if one.label in set(frame["series"])]
    # Domains in so many words: bars and rules are of different rows, and have to meet.
    place = {
        "x": alt.X(
            f"{category.column}:N",
            title=category.title or None,
            axis=alt.Axis(labelAngle=0, labelLimit=_LABEL_LIMIT, labelOverlap=False),
            scale=alt.Scale(domain=categories, paddingInner=0.25, paddingOuter=0.1),
        ),
        "xOffset": alt.XOffset("series:N", scale=alt.Scale(domain=drawn, paddingInner=0.12)),
    }
    scale = alt.Scale(type="sqrt" if is_root else "linear", domainMin=0, nice=not y.domain)
    if y.domain is not None:
        scale = alt.Scale(type="sqrt" if is_root else "linear", domain=list(y.domain))
    height_of = alt.Y(
        "value:Q", title=y.title, scale=scale, axis=alt.Axis(format=y.format, tickCount=5)
    )
    bars = (
        alt.Chart(frame)
        # Of Streamlit's theme bars are narrower, and Vega-Lite then moves them out of their groups.
        .mark_bar(width=alt.RelativeBandSize(band=1), cornerRadiusTopLeft=2, cornerRadiusTopRight=2)
        .encode(
            **place,
            y=height_of,
            color=_colour(series),
            tooltip=[alt.Tooltip(f"{category.column}:N", title=category.title), *_tooltip(y)],
        )
    )
    layers: list[Any] = [bars]
    several = frame[frame["num_runs"] > 1]
    if not several.empty:
        errors = alt.Chart(several).mark_rule(strokeWidth=1.5, color=palette.NEUTRAL)
        layers.append(errors.encode(**place, y=alt.Y("low:Q", title=y.title), y2="high:Q"))
    return titled(alt.layer(*layers), title=title, subtitle=subtitle, height=height)


def _colour(series: Sequence[Series]) -> alt.Color:
    labels, colours = [one.label for one in series], [one.colour for one in series]
    return alt.Color("series:N", scale=alt.Scale(domain=labels, range=colours), legend=None)


def _x(axis: Axis, frame: pd.DataFrame) -> alt.X:
    ticks: dict[str, Any] = {"tickMinStep": 1}
    scale = alt.Scale(zero=False, nice=False)
    if axis.log:
        # Powers of two, each with its label.
        ticks = {"values": sorted({int(value) for value in frame[axis.column]})}
        scale = alt.Scale(type="log", base=2, nice=False)
    return alt.X(
        f"{axis.column}:Q",
        title=axis.title,
        scale=scale,
        axis=alt.Axis(format=axis.format, grid=False, **ticks),
    )


def _domain(frame: pd.DataFrame, intervals: pd.DataFrame, axis: Axis) -> list[float]:
    """Where the lines are, with room for intervals, but not for those of two runs that differ.

    Their t is 12.7: an axis that held them would show nothing else.
    """
    if axis.domain is not None:
        return list(axis.domain)
    least, most = float(frame["value"].min()), float(frame["value"].max())
    room = (most - least) / 2 or abs(most) / 10 or 1.0
    low, high = least, most
    if not intervals.empty:
        low = min(least, max(least - room, float(intervals["low"].min())))
        high = max(most, min(most + room, float(intervals["high"].max())))
    if low == high:
        low, high = low - room, high + room
    return [min(low, 0.0) if axis.zero else low, high]


def _tooltip(y: Axis) -> list[alt.Tooltip]:
    return [
        alt.Tooltip("series:N", title=" "),
        alt.Tooltip("value:Q", title=y.title, format=y.format),
        alt.Tooltip("low:Q", title="low", format=y.format),
        alt.Tooltip("high:Q", title="high", format=y.format),
        alt.Tooltip("num_runs:Q", title="runs", format="d"),
    ]
