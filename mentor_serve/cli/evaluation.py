"""`mentor-serve eval`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from mentor_serve.cli.options import (
    ConfigOption,
    JsonOption,
    SetOption,
    out,
    print_json,
    progress_bar,
    settings_from,
)
from mentor_serve.errors import ConfigError

SuiteOption = Annotated[str | None, typer.Option(help="Name in `evaluations.suite`.")]


def evaluate(  # noqa: PLR0913, PLR0917 - one parameter an option
    model: Annotated[
        str,
        typer.Argument(help="`live`, `latest`, `policy@VERSION`, `expert`, or a model directory."),
    ] = "live",
    version: Annotated[
        str | None, typer.Option("--version", help="A policy version, or `latest`.")
    ] = None,
    num_problems: Annotated[int, typer.Option(min=1, help="Held-out problems.")] = 200,
    num_samples: Annotated[
        int, typer.Option(min=0, help="Sampled responses a problem; 0: greedy alone.")
    ] = 8,
    temperature: Annotated[
        float | None, typer.Option(help="Of sampled responses; default: evaluation.temperature.")
    ] = None,
    greedy: Annotated[bool, typer.Option(help="Also answer each problem once, greedily.")] = True,
    seed: Annotated[
        int | None, typer.Option(help="Of the samples; default: evaluation.seed.")
    ] = None,
    suite: SuiteOption = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a model on held-out tasks and store the numbers in `evaluations`.

    Greedy pass@1, avg@k, unbiased pass@k, entropy, length, cut-off share and word shares, each with
    its 95 % interval. Runs in this process, beside a running service or without one.
    """
    settings = settings_from(config, assignments)
    from mentor_serve.actors.evaluation import evaluation_plan
    from mentor_serve.reports.evaluation import evaluation_rows, model_label, run_evaluation

    given = {"temperature": temperature, "seed": seed, "suite": suite}
    plan = evaluation_plan(
        settings,
        num_problems=num_problems,
        num_samples=num_samples,
        has_greedy=greedy,
        **{name: value for name, value in given.items() if value is not None},
    )
    with progress_bar("evaluating") as on_progress:
        report, document = run_evaluation(
            settings, named_model(model, version), plan, on_progress=on_progress
        )
    if as_json:
        print_json(document)
        return
    title = f"{model_label(document)} on {plan.num_problems} held-out problems of {plan.suite}"
    out.print(_table(evaluation_rows(report), title=title))
    if report.num_unjudged:
        out.print(f"{report.num_unjudged} responses whose verifier failed count as wrong")


def named_model(model: str, version: str | None) -> str:
    """`--version 12` is `policy@12`; together with a model it is a contradiction.

    Raises:
        ConfigError: both are given, or a version that is no number.
    """
    if version is None:
        return model
    if model != "live":
        raise ConfigError(f"expected a model or --version, got both: {model} and {version}")
    if version == "latest":
        return version
    if not version.isdecimal():
        raise ConfigError(f"--version {version}: expected a number or `latest`")
    return f"policy@{version}"


def _table(rows: list[tuple[str, str, str]], **options: Any) -> Table:
    table = Table(box=None, padding=(0, 2), title_justify="left", **options)
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    for row in rows:
        table.add_row(*row)
    return table
