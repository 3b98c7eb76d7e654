"""Runs that differ in nothing but their seed, as one series with a label and a colour.

A comparison names its runs `main-mentor-seed0`, `ablation-unselective-seed2` or
`sweep-luffy-lr0.0001-seed100`; any other run is known by its name, less a `-seedN` at its end, and
by the guidance method in its settings. Pure functions over names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mentor_dashboard import palette
from mentor_serve.experiments.names import ABLATION_LABELS, METHOD_COLOURS, METHOD_LABELS

Runs = Sequence[Mapping[str, Any]]

RECENT = 8
"""Runs that are shown where the database holds no comparison."""

_SEED = re.compile(r"-seed(\d+)$")
_TRIAL = re.compile(r"(main|sweep|ablation)-(\w+?)(?:-lr([0-9.e+-]+))?$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What the name of a run says."""

    series: str
    """The name without its seed."""
    seed: int | None = None
    stage: str | None = None
    """`main`, `sweep` or `ablation`; None for a run that is no part of a comparison."""
    arm: str | None = None
    learning_rate: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Runs that are drawn as one."""

    name: str
    label: str
    """Unique among those that are drawn together."""
    colour: str
    run_ids: tuple[str, ...]
    trial: Trial = field(repr=False)

    @property
    def num_runs(self) -> int:
        """How many of them are chosen."""
        return len(self.run_ids)


def parse(name: str) -> Trial:
    """Take a run's name apart.

    `sweep-luffy-lr0.0001-seed100` is the series `sweep-luffy-lr0.0001` of arm `luffy`.
    """
    found = _SEED.search(name)
    if found is None:
        return Trial(series=name)
    series, seed = name[: found.start()], int(found[1])
    trial = _TRIAL.fullmatch(series)
    if trial is None or trial[2] not in METHOD_LABELS | ABLATION_LABELS:
        return Trial(series=series, seed=seed)
    rate = trial[3]
    return Trial(
        series=series,
        seed=seed,
        stage=trial[1],
        arm=trial[2],
        learning_rate=None if rate is None else float(rate),
    )


def selections(names: Sequence[str]) -> dict[str, list[str]]:
    """Runs that belong on one picture, by a title; `names` are the most recently active first.

    The first is what a page shows by itself.
    """
    trials = {name: parse(name) for name in names}
    by_stage = {
        stage: [name for name, trial in trials.items() if trial.stage == stage]
        for stage in ("main", "ablation", "sweep")
    }
    seeds = {trials[name].seed for name in by_stage["ablation"]}
    # What the variants are variants of.
    whole = [
        name
        for name in by_stage["main"]
        if trials[name].arm == "mentor" and trials[name].seed in seeds
    ]
    found = {
        "Methods": by_stage["main"],
        "Ablations": [*whole, *by_stage["ablation"]] if by_stage["ablation"] else [],
        "Learning rates": by_stage["sweep"],
        "Most recent": list(names[:RECENT]),
    }
    return {title: sorted(chosen) for title, chosen in found.items() if chosen}


def group(
    runs: Runs,
    *,
    methods: Mapping[str, str] | None = None,
    colours: Mapping[str, str] = METHOD_COLOURS,
) -> list[Series]:
    """The series of some runs (rows with id and name), in the order of their labels in a legend.

    Args:
        runs: what to show.
        methods: `guidance.method` by run id, for runs that are no part of a comparison.
        colours: by method.
    """
    members: dict[str, list[Mapping[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: str(run["name"])):
        members.setdefault(parse(run["name"]).series, []).append(run)
    found = [
        Series(
            name=name,
            label=name,
            colour="",
            run_ids=tuple(run["id"] for run in of_series),
            trial=_known(parse(of_series[0]["name"]), of_series[0]["id"], methods or {}),
        )
        for name, of_series in members.items()
    ]
    found.sort(key=_order)
    return _coloured(_labelled(found), colours)


def _known(trial: Trial, run_id: str, methods: Mapping[str, str]) -> Trial:
    return trial if trial.stage else replace(trial, arm=methods.get(run_id))


def _order(series: Series) -> tuple[Any, ...]:
    """Base, the methods as the paper has them, variants, other runs; the expert last."""
    trial = series.trial
    arms = [name for name in METHOD_LABELS if name != "expert"]
    arms += [*ABLATION_LABELS, "expert"]
    place = arms.index(trial.arm) if trial.arm in arms else len(arms)
    if trial.stage is None:
        return (1, 0, 0.0, series.name)
    return (2 if trial.arm == "expert" else 0, place, trial.learning_rate or 0.0, series.name)


def _labelled(found: Sequence[Series]) -> list[Series]:
    labels = [_label(series) for series in found]
    return [
        replace(series, label=label if labels.count(label) == 1 else series.name)
        for series, label in zip(found, labels, strict=True)
    ]


def _label(series: Series) -> str:
    trial = series.trial
    if trial.stage is None or trial.arm is None:
        return series.name
    label = (METHOD_LABELS | ABLATION_LABELS)[trial.arm]
    return label if trial.learning_rate is None else f"{label}, lr {trial.learning_rate:g}"


def _coloured(found: Sequence[Series], colours: Mapping[str, str]) -> list[Series]:
    """The method's colour for the first series of a method, its shades for learning rates."""
    rates: dict[str, list[str]] = {}
    for series in found:
        arm = series.trial.arm
        if series.trial.stage == "sweep" and arm is not None and arm in colours:
            rates.setdefault(arm, []).append(series.name)
    chosen = {
        name: colour
        for arm, names in rates.items()
        for name, colour in zip(names, palette.shades(colours[arm], len(names)), strict=True)
    }
    taken: set[str] = set()
    for series in found:
        arm = series.trial.arm
        if series.name not in chosen and arm is not None and arm in colours and arm not in taken:
            chosen[series.name] = colours[arm]
            taken.add(arm)
    others = (series.name for series in found if series.name not in chosen)
    for index, name in enumerate(others):
        chosen[name] = palette.OTHER_COLOURS[index % len(palette.OTHER_COLOURS)]
    return [replace(series, colour=chosen[series.name]) for series in found]
