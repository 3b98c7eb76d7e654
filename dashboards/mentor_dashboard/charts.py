"""Altair charts of the dashboard: frames in, charts out, no I/O and no Streamlit.

Every chart has a title that says what is plotted, axes with units, and a tooltip. Series keep the
colours of `palette`. Text, grid and background come from Streamlit's theme, so charts read in
light and in dark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import pandas as pd

from mentor_dashboard import palette
from mentor_serve.types import TokenSource

HEIGHT = 270
"""Pixels of a standard panel, title and legend included."""
POINTS_BELOW = 40
"""Series shorter than this also show their points: a line of one point is invisible."""
SMOOTH_FROM = 60
"""Series at least this long get a rolling mean over their noisy values."""

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A column and how to print it."""

    column: str
    title: str
    """With the unit where there is one."""
    format: str = ".3~g"
    """A d3 number format."""
    domain: tuple[float, float] | None = None
    zero: bool = False
    log: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A column drawn as one line."""

    column: str
    label: str
    colour: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Columns of an interval around a line."""

    low: str
    high: str
    colour: str


STEP = Axis(column="step", title="update (step)", format="d")
VERSION = Axis(column="policy_version", title="policy version", format="d")


def lines(
    rows: Rows,
    *,
    title: str,
    x: Axis,
    y: Axis,
    series: Sequence[Series],
    smooth: bool = False,
    height: int = HEIGHT,
) -> alt.Chart | None:
    """Lines over `x`, one per series; None where there is no value to draw.

    With `smooth`, long series are drawn as their rolling mean over a faint line of raw values.
    """
    frame = _long(rows, x=x, series=series)
    if frame.empty:
        return None
    window = _window(frame) if smooth else 1
    subtitle = f"bold: rolling mean of {window} points" if window > 1 else None
    frame["smoothed"] = frame.groupby("series", sort=False)["value"].transform(
        lambda values: values.rolling(window, min_periods=1).mean()
    )
    base = alt.Chart(frame).encode(x=_x(x), color=_colour(series))
    line_y = _y(y, column="smoothed")
    layers = []
    if window > 1:
        layers.append(base.mark_line(strokeWidth=1, opacity=0.3).encode(y=_y(y, column="value")))
    layers.append(
        base.mark_line(
            strokeWidth=2, point={"size": 25} if len(frame) < POINTS_BELOW else False
        ).encode(y=line_y)
    )
    layers.append(_hover(base, x=x, y=y))
    return titled(alt.layer(*layers), title=title, subtitle=subtitle, height=height)


def line_with_band(
    rows: Rows,
    *,
    title: str,
    subtitle: str,
    x: Axis,
    y: Axis,
    band: Band,
) -> alt.Chart | None:
    """One line of `y` in the middle of a shaded interval."""
    frame = pd.DataFrame(list(rows))
    if frame.empty or frame[y.column].isna().all():
        return None
    frame = frame.dropna(subset=[y.column])
    base = alt.Chart(frame).encode(x=_x(x))
    colour = band.colour
    area = base.mark_area(opacity=0.2, color=colour).encode(
        y=_y(y, column=band.low), y2=alt.Y2(f"{band.high}:Q")
    )
    line = base.mark_line(
        strokeWidth=2,
        color=colour,
        point={"size": 25, "color": colour} if len(frame) < POINTS_BELOW else False,
    ).encode(y=_y(y, column=y.column))
    hover = base.mark_circle(size=120, opacity=0, color=colour).encode(
        y=_y(y, column=y.column),
        tooltip=[
            alt.Tooltip(f"{x.column}:Q", title=x.title, format=x.format),
            alt.Tooltip(f"{y.column}:Q", title=y.title, format=y.format),
            alt.Tooltip(f"{band.low}:Q", title="low", format=y.format),
            alt.Tooltip(f"{band.high}:Q", title="high", format=y.format),
            alt.Tooltip("num_trajectories:Q", title="rollouts", format=",d"),
        ],
    )
    return titled(alt.layer(area, line, hover), title=title, subtitle=subtitle, height=HEIGHT)


def bars(
    rows: Rows,
    *,
    title: str,
    subtitle: str | None = None,
    category: Axis,
    value: Axis,
    colours: Mapping[str, str] | None = None,
) -> alt.Chart | None:
    """Horizontal bars in the order of the rows, each with its number at its end."""
    frame = pd.DataFrame(list(rows))
    if frame.empty:
        return None
    names = [str(name) for name in frame[category.column]]
    frame[category.column] = names
    known = colours or dict.fromkeys(names, palette.POLICY)
    base = alt.Chart(frame).encode(
        y=alt.Y(f"{category.column}:N", sort=names, title=category.title),
        x=alt.X(
            f"{value.column}:Q",
            title=value.title,
            axis=alt.Axis(format=value.format, tickMinStep=1, tickCount=5),
        ),
        tooltip=[
            alt.Tooltip(f"{category.column}:N", title=category.title),
            alt.Tooltip(f"{value.column}:Q", title=value.title, format=value.format),
        ],
    )
    tint = alt.Color(
        f"{category.column}:N",
        legend=None,
        scale=alt.Scale(domain=names, range=[known.get(name, palette.NEUTRAL) for name in names]),
    )
    numbers = base.mark_text(align="left", dx=4, color=palette.NEUTRAL).encode(
        text=alt.Text(f"{value.column}:Q", format=value.format)
    )
    layers = alt.layer(base.mark_bar(cornerRadius=2).encode(color=tint), numbers)
    return titled(layers, title=title, subtitle=subtitle, height=HEIGHT)


def throughput(rows: Rows) -> alt.Chart | None:
    """Bars of `num_groups` by `minute`; None where every minute is empty."""
    frame = pd.DataFrame(list(rows))
    if frame.empty or not frame["num_groups"].any():
        return None
    chart = (
        alt.Chart(frame)
        .mark_bar(color=palette.POLICY)
        .encode(
            x=alt.X(
                "utcyearmonthdatehoursminutes(minute):T",
                title="minute (UTC)",
                axis=alt.Axis(format="%H:%M", grid=False),
            ),
            y=alt.Y("num_groups:Q", title="groups", axis=alt.Axis(format="d", tickMinStep=1)),
            tooltip=[
                alt.Tooltip("utchoursminutes(minute):T", title="minute (UTC)", format="%H:%M"),
                alt.Tooltip("num_groups:Q", title="groups", format="d"),
            ],
        )
    )
    return titled(chart, title="Groups collected per minute", subtitle=None, height=HEIGHT)


def token_entropies(rows: Rows, *, gamma: float | None) -> alt.Chart | None:
    """Entropy of each token of one response, coloured by who decided it, with gamma as a rule.

    `rows` have `position`, `entropy`, `weight`, `source` (a label) and `token`.
    """
    frame = pd.DataFrame(list(rows))
    if frame.empty:
        return None
    labels = [palette.SOURCE_LABELS[source] for source in TokenSource]
    colours = [palette.SOURCE_COLOURS[source] for source in TokenSource]
    frame["left"], frame["right"] = frame["position"] - 0.4, frame["position"] + 0.4
    frame["bottom"] = 0.0  # bars of two x ends need two y ends
    bars_layer = (
        alt.Chart(frame)
        .mark_bar()
        .encode(
            x=alt.X(
                "left:Q",
                title="token position",
                scale=alt.Scale(domain=[-0.5, len(frame) - 0.5], nice=False),
                axis=alt.Axis(format="d", tickMinStep=1, grid=False),
            ),
            x2="right:Q",
            y=alt.Y("entropy:Q", title="entropy (nats)", axis=alt.Axis(tickCount=5)),
            y2="bottom:Q",
            color=alt.Color(
                "source:N",
                title=None,
                scale=alt.Scale(domain=labels, range=colours),
                legend=alt.Legend(orient="top", offset=4),
            ),
            tooltip=[
                alt.Tooltip("token:N"),
                alt.Tooltip("position:Q", format="d"),
                alt.Tooltip("entropy:Q", title="entropy (nats)", format=".3f"),
                alt.Tooltip("weight:Q", format=".3f"),
                alt.Tooltip("source:N"),
            ],
        )
    )
    layers: list[Any] = [bars_layer]
    highest = float(frame["entropy"].max())
    if gamma is not None and 0 < gamma <= 3 * highest:
        rule = alt.Chart(pd.DataFrame({"gamma": [gamma]})).mark_rule(
            strokeDash=[5, 4], color=palette.NEUTRAL
        )
        layers.append(
            rule.encode(
                y="gamma:Q", tooltip=alt.Tooltip("gamma:Q", title="gamma (nats)", format=".3f")
            )
        )
    subtitle = "dashed: gamma, where the expert is always consulted" if len(layers) > 1 else None
    return titled(
        alt.layer(*layers), title="Entropy along the response", subtitle=subtitle, height=220
    )


def _long(rows: Rows, *, x: Axis, series: Sequence[Series]) -> pd.DataFrame:
    """Rows of `x`, `series` (label) and `value`, without missing values."""
    frame = pd.DataFrame(list(rows))
    if frame.empty:
        return frame
    labels = {entry.column: entry.label for entry in series}
    columns = [column for column in labels if column in frame]
    long = frame.melt(id_vars=[x.column], value_vars=columns, var_name="series", value_name="value")
    long["series"] = long["series"].map(labels)
    long["value"] = pd.to_numeric(long["value"])
    return long.dropna(subset=["value"]).reset_index(drop=True)


def _window(frame: pd.DataFrame) -> int:
    longest = int(frame["series"].value_counts().max())
    return max(1, longest // 20) if longest >= SMOOTH_FROM else 1


def _x(axis: Axis) -> alt.X:
    return alt.X(
        f"{axis.column}:Q",
        title=axis.title,
        scale=alt.Scale(zero=False, nice=False),
        axis=alt.Axis(format=axis.format, tickMinStep=1, grid=False),
    )


def _y(axis: Axis, *, column: str) -> alt.Y:
    scale: dict[str, Any] = {"type": "log"} if axis.log else {"zero": axis.zero}
    if axis.domain is not None:
        scale = {"domain": list(axis.domain), "clamp": True}
    return alt.Y(
        f"{column}:Q",
        title=axis.title,
        scale=alt.Scale(**scale),
        axis=alt.Axis(format=axis.format, tickCount=5),
    )


def _colour(series: Sequence[Series]) -> alt.Color:
    legend = (
        alt.Legend(orient="top", symbolType="stroke", symbolOpacity=1, offset=4)
        if len(series) > 1
        else None
    )
    return alt.Color(
        "series:N",
        title=None,
        scale=alt.Scale(
            domain=[entry.label for entry in series], range=[entry.colour for entry in series]
        ),
        legend=legend,
    )


def _hover(base: alt.Chart, *, x: Axis, y: Axis) -> alt.Chart:
    """Invisible circles that carry the tooltip; larger than the line, so easy to hit."""
    return base.mark_circle(size=120, opacity=0).encode(
        y=_y(y, column="smoothed"),
        tooltip=[
            alt.Tooltip("series:N", title=" "),
            alt.Tooltip(f"{x.column}:Q", title=x.title, format=x.format),
            alt.Tooltip("value:Q", title=y.title, format=y.format),
        ],
    )


def titled(chart: Any, *, title: str, subtitle: str | None, height: int) -> alt.Chart:
    """The chart under its title, in the padding that all panels have."""
    params: dict[str, Any] = {"text": title, "anchor": "start", "fontSize": 15, "offset": 8}
    if subtitle:
        params |= {"subtitle": subtitle, "subtitleColor": palette.NEUTRAL}
    return chart.properties(
        title=alt.TitleParams(**params),
        height=height,
        # Streamlit's theme spends a third of a small chart on white space.
        padding={"left": 2, "right": 6, "top": 2, "bottom": 6},
    ).configure_axis(titlePadding=8, labelPadding=4)
