"""`mentor-serve compare`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markdown import Markdown

from mentor_serve.cli.options import (
    ConfigOption,
    JsonOption,
    SetOption,
    out,
    overrides_of,
    print_json,
    progress_bar,
)
from mentor_serve.errors import ConfigError

if TYPE_CHECKING:
    from mentor_serve.experiments.presets import Preset


def compare(  # noqa: PLR0913, PLR0917 - one parameter an option
    preset: Annotated[
        str, typer.Option(help="`smoke`, `laptop` (docs/results.md) or `pretrained`.")
    ] = "smoke",
    directory: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Where it lives and is resumed; default: .mentor/compare/PRESET."
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Trials side by side; default: one a core.")
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="How many seeds of the methods; default: the preset's."),
    ] = None,
    updates: Annotated[
        int | None, typer.Option(min=1, help="Updates of a trial; default: the preset's.")
    ] = None,
    ablations: Annotated[bool, typer.Option(help="Also run MENTOR's ablations.")] = True,
    figures: Annotated[
        Path | None, typer.Option(help="Also draw the paper's figures into this directory.")
    ] = None,
    keep_trajectories: Annotated[
        bool, typer.Option(help="Keep every rollout in the database, not the results alone.")
    ] = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare MENTOR with on-policy RL, LUFFY and QuestA under equal budgets, from nothing.

    Every method trains from the same start on the same problems with as many rollouts and updates;
    a learning rate for each is chosen on validation problems, and everything is measured on others.
    No service is needed. Stop it at any time: the same command goes on. Runs, updates and
    evaluations are in the directory's database, the numbers in results.json, tables in results.md.
    """
    with progress_bar("comparing: updates") as on_progress:
        from mentor_serve.experiments.figures import write_figures
        from mentor_serve.experiments.presets import PRESETS
        from mentor_serve.reports.comparison import compare as run
        from mentor_serve.reports.trials import Bench

        if preset not in PRESETS:
            raise ConfigError(f"--preset {preset}: expected one of {', '.join(sorted(PRESETS))}")
        chosen = _changed(PRESETS[preset], seeds=seeds, updates=updates, has_ablations=ablations)
        bench = Bench(
            preset=chosen,
            home=(directory or Path(".mentor") / "compare" / preset).resolve(),
            base=overrides_of(assignments),
            config_files=tuple(config or ()),
            keep_trajectories=keep_trajectories,
        )
        results = run(bench, jobs=jobs or os.cpu_count() or 1, on_progress=on_progress)
        pictures = write_figures(results, figures) if figures is not None else []
    if as_json:
        print_json(results)
        return
    out.print(Markdown((bench.home / "results.md").read_text(encoding="utf-8")))
    out.print(f"results: {bench.home / 'results.json'}")
    for picture in pictures:
        out.print(f"figure: {picture}")


def _changed(
    preset: Preset, *, seeds: int | None, updates: int | None, has_ablations: bool
) -> Preset:
    """The preset with what the options say."""
    if seeds is not None:
        left = tuple(one for one in preset.ablation_seeds if one < seeds)
        preset = dataclasses.replace(preset, seeds=tuple(range(seeds)), ablation_seeds=left)
    if updates is not None:
        preset = dataclasses.replace(preset, num_updates=updates)
    return preset if has_ablations else dataclasses.replace(preset, ablations=())
