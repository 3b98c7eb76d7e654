"""Line charts as plain SVG, so that figures in the documentation need no plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 50, 60
_COLORS = ("#1f6feb", "#d1570a", "#2da44e", "#8250df")
_MOST_TICKS = 8

Points = Sequence[tuple[float, float]]


def line_chart(series: Mapping[str, Points], *, title: str, x_label: str, y_label: str) -> str:
    """An SVG document with one line a series; both axes start at 0.

    Raises:
        ValueError: no points, or none beyond 0 on an axis.
    """
    points = [point for line in series.values() for point in line]
    most_x = max((x for x, _ in points), default=0.0)
    most_y = max((y for _, y in points), default=0.0)
    if most_x <= 0 or most_y <= 0:
        raise ValueError(f"chart: expected points beyond 0 on both axes, got {len(points)} points")
    ticks_x, ticks_y = _ticks(most_x), _ticks(most_y)
    frame = _Frame(ticks_x[-1], ticks_y[-1])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="13" fill="#24292f">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="24" font-size="16">{escape(title)}</text>',
        *(_horizontal(frame, tick) for tick in ticks_y),
        *(_vertical(frame, tick) for tick in ticks_x),
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{_HEIGHT - 14}" '
        f'text-anchor="middle">{escape(x_label)}</text>',
        f'<text transform="translate(18 {(_TOP + _HEIGHT - _BOTTOM) / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>',
    ]
    for number, (name, line) in enumerate(series.items()):
        parts += _line(frame, name, line, number)
    return "\n".join([*parts, "</svg>", ""])


class _Frame:
    """Maps values to places."""

    def __init__(self, most_x: float, most_y: float) -> None:
        self._most_x, self._most_y = most_x, most_y

    def x(self, value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * value / self._most_x

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * value / self._most_y


def _ticks(most: float) -> list[float]:
    """0 and multiples of a power of two times a power of ten, the last one at least `most`."""
    step = 10.0 ** math.floor(math.log10(most / _MOST_TICKS))
    while most / step > _MOST_TICKS:
        step *= 2
    return [step * i for i in range(math.ceil(most / step - 1e-9) + 1)]


def _horizontal(frame: _Frame, tick: float) -> str:
    y = frame.y(tick)
    return (
        f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}" stroke="#d8dee4"/>'
        f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
    )


def _vertical(frame: _Frame, tick: float) -> str:
    return (
        f'<text x="{frame.x(tick):.1f}" y="{_HEIGHT - _BOTTOM + 20}" '
        f'text-anchor="middle">{tick:g}</text>'
    )


def _line(frame: _Frame, name: str, line: Points, number: int) -> list[str]:
    color = _COLORS[number % len(_COLORS)]
    places = [(frame.x(x), frame.y(y)) for x, y in line]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    height = _TOP + 16 + 20 * number
    return [
        f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>',
        *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in places),
        f'<line x1="{_LEFT + 16}" y1="{height - 4}" x2="{_LEFT + 40}" y2="{height - 4}" '
        f'stroke="{color}" stroke-width="2"/>',
        f'<text x="{_LEFT + 48}" y="{height}">{escape(name)}</text>',
    ]
