"""The paper's figures from the results of a comparison: SVG, with the data beside it as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mentor_serve.errors import ConfigError
from mentor_serve.experiments.names import METHOD_COLOURS
from mentor_serve.experiments.presets import IN_DOMAIN
from mentor_serve.experiments.tables import arms_in_order, label_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FIGURE_3_ARMS = ("on_policy", "luffy", "mentor")
_NEVER = {"value": 0.0, "low": 0.0, "high": 0.0}
_RARE = 0.005
"""A word that nobody says in so many responses is not drawn."""
_CURVES = (
    ("validation_step", "validation", "greedy accuracy, validation"),
    ("step", "entropy", "token entropy of rollouts (nats)"),
    ("step", "mean_response_tokens", "response length (tokens)"),
    ("step", "mean_reward_on_policy", "reward of on-policy rollouts"),
)


def write_figures(results: dict[str, Any], directory: Path) -> list[Path]:
    """Write every figure; returns the pictures.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ConfigError(
            "figures need matplotlib: install mentor-serve[figures], or leave --figures out"
        ) from error
    directory.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, tuple[Callable[[dict[str, Any]], Figure], dict[str, Any]]] = {
        "figure-2-curves": (_draw_curves, results["curves"]),
        "figure-3-words": (_draw_words, _words(results)),
        "figure-4-pass": (_draw_bars, _bars(results)),
        "pass-at-k": (_draw_pass_at_k, results["accuracy"][IN_DOMAIN.name]),
    }
    written = []
    # Text stays text, and the same results give the same file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mentor-serve", "font.size": 9}):
        for name, (draw, data) in drawn.items():
            path = directory / f"{name}.svg"
            draw(data).savefig(path, bbox_inches="tight", metadata={"Date": None})
            path.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", "utf-8")
            written.append(path)
    return written


def _figure(num_columns: int, *, width: float = 3.0, height: float = 2.6) -> tuple[Figure, Any]:
    # Not pyplot: that keeps figures in a global state and may look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * num_columns, height), layout="constrained")
    axes = figure.subplots(1, num_columns, squeeze=False)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _draw_curves(curves: dict[str, Any]) -> Figure:
    figure, axes = _figure(len(_CURVES))
    for one, (step_name, name, title) in zip(axes, _CURVES, strict=True):
        for arm in arms_in_order(list(curves)):
            points = [
                (step, row["value"], row["low"], row["high"])
                for step, row in zip(curves[arm][step_name], curves[arm][name], strict=True)
                if row is not None
            ]
            steps, values, lows, highs = zip(*points, strict=True)
            one.plot(steps, values, color=METHOD_COLOURS[arm], label=label_of(arm), linewidth=1.2)
            one.fill_between(steps, lows, highs, color=METHOD_COLOURS[arm], alpha=0.15, linewidth=0)
        one.set_title(title, fontsize=9)
        one.set_xlabel("updates")
    _legend_outside(figure, axes[0], "outside upper left")
    return figure


def _legend_outside(
    figure: Figure, axis: Any, place: Literal["outside upper left", "outside right center"]
) -> None:
    """A legend that hides no line: a row above, or a column at the right."""
    handles, labels = axis.get_legend_handles_labels()
    ncols = len(labels) if "upper" in place else 1
    figure.legend(handles, labels, loc=place, ncols=ncols, frameon=False, fontsize=8)


def _words(results: dict[str, Any]) -> dict[str, Any]:
    """By word, then arm: share of the last training rollouts; of the first ones for `base`.

    At temperature 1, where rare words show. QuestA's are left out: its prompts have hints.
    """
    words = results["words"]
    arms = [arm for arm in _FIGURE_3_ARMS if arm in words]
    nothing = {"first": _NEVER, "last": _NEVER}
    shares = {
        word: {
            "base": words[arms[0]].get(word, nothing)["first"],
            **{arm: words[arm].get(word, nothing)["last"] for arm in arms},
        }
        for word in sorted({word for arm in arms for word in words[arm]})
    }
    return {
        word: by_arm
        for word, by_arm in shares.items()
        if any(row["value"] >= _RARE for row in by_arm.values())
    }


def _draw_words(words: dict[str, Any]) -> Figure:
    figure, (axis,) = _figure(1, width=6.5)
    _bar_groups(axis, words, list(words))
    axis.set_ylabel("training rollouts with the word (%)")
    return figure


def _bars(results: dict[str, Any]) -> dict[str, Any]:
    """pass@k at the largest k by suite, then arm."""
    accuracy = results["accuracy"]
    *_, largest = next(iter(accuracy[IN_DOMAIN.name].values()))
    return {
        results["suites"][suite]: {arm: by_measure[largest] for arm, by_measure in by_arm.items()}
        for suite, by_arm in accuracy.items()
    }


def _draw_bars(bars: dict[str, Any]) -> Figure:
    figure, (axis,) = _figure(1, width=8.0)
    _bar_groups(axis, bars, [label.replace(": ", ":\n") for label in bars])
    axis.set_ylabel("solved by one of all samples (%)")
    return figure


def _bar_groups(axis: Any, groups: dict[str, Any], labels: list[str]) -> None:
    arms = arms_in_order(list(next(iter(groups.values()), {})))
    width = 0.8 / max(1, len(arms))
    for index, arm in enumerate(arms):
        rows = [group[arm] for group in groups.values()]
        places = [number - 0.4 + (index + 0.5) * width for number in range(len(rows))]
        heights = [100 * row["value"] for row in rows]
        errors = [
            [max(0.0, 100 * (row["value"] - row["low"])) for row in rows],
            [max(0.0, 100 * (row["high"] - row["value"])) for row in rows],
        ]
        axis.bar(places, heights, width, color=METHOD_COLOURS[arm], label=label_of(arm))
        axis.errorbar(places, heights, errors, fmt="none", ecolor="black", elinewidth=0.7)
    axis.set_xticks(range(len(labels)), labels)
    axis.legend(frameon=False, fontsize=8, ncols=len(arms), loc="lower left", bbox_to_anchor=(0, 1))


def _draw_pass_at_k(accuracy: dict[str, Any]) -> Figure:
    figure, (axis,) = _figure(1, width=5.0)
    for arm in arms_in_order(list(accuracy)):
        rows = {
            int(name.removeprefix("pass@")): row
            for name, row in accuracy[arm].items()
            if name.removeprefix("pass@").isdecimal()
        }
        values = [100 * row["value"] for row in rows.values()]
        axis.plot(list(rows), values, color=METHOD_COLOURS[arm], label=label_of(arm), marker=".")
        axis.fill_between(
            list(rows),
            [100 * row["low"] for row in rows.values()],
            [100 * row["high"] for row in rows.values()],
            color=METHOD_COLOURS[arm],
            alpha=0.15,
            linewidth=0,
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(rows), [str(k) for k in rows])
    axis.set_xlabel("k")
    axis.set_ylabel("pass@k, in domain (%)")
    _legend_outside(figure, axis, "outside right center")
    return figure
