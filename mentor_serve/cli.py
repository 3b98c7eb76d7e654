"""The `mentor-serve` command. Thin: it parses, calls the layers below, prints, and sets exit codes.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration. Errors are one line; `--debug` shows
the traceback. `--json` prints one JSON document on standard output.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mentor_serve import __version__
from mentor_serve.errors import ConfigError, MentorError
from mentor_serve.settings import Settings, load_settings

# Nothing here phones home; set before anything imports ray.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

EXIT_FAILED = 1
EXIT_USAGE = 2

app = typer.Typer(
    name="mentor-serve",
    help="A language model that gets better while it serves (MENTOR on Ray Serve).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
db_app = typer.Typer(help="The trajectory store's schema and health.", no_args_is_help=True)
config_app = typer.Typer(help="The resolved configuration.", no_args_is_help=True)
app.add_typer(db_app, name="db")
app.add_typer(config_app, name="config")

ConfigOption = Annotated[
    list[Path] | None,
    typer.Option("--config", "-c", help="TOML file; repeat it to merge several, later ones win."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="A setting, for instance learner.learning_rate=3e-5."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]

out = Console()


def main() -> None:
    """Run the command line; turns our errors into one line and an exit code."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app(standalone_mode=True)
    except ConfigError as error:
        _fail(error, EXIT_USAGE, debug=debug)
    except MentorError as error:
        _fail(error, EXIT_FAILED, debug=debug)


def _fail(error: MentorError, code: int, *, debug: bool) -> None:
    if debug:
        raise error
    # No markup: messages hold paths and brackets. No wrapping: one error is one line.
    Console(stderr=True).print(
        f"mentor-serve: {error}", style="red", highlight=False, markup=False, soft_wrap=True
    )
    sys.exit(code)


def _settings(config: list[Path] | None, assignments: list[str] | None) -> Settings:
    overrides: dict[str, Any] = {}
    for assignment in assignments or []:
        key, separator, value = assignment.partition("=")
        if not separator:
            raise ConfigError(f"--set {assignment}: expected SECTION.KEY=VALUE")
        overrides[key.strip()] = value.strip()
    return load_settings(config or [], overrides)


def _print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=2, default=str))


def _print_table(rows: dict[str, Any], *, title: str) -> None:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name.replace("_", " "), str(value))
    out.print(table)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


@app.command()
def up(
    config: ConfigOption = None,
    assignments: SetOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="HTTP port.")] = None,
    dashboard: Annotated[bool, typer.Option(help="Start the dashboard as well.")] = True,
) -> None:
    """Start everything in the foreground: migrations, service, dashboard. Ctrl-C drains and stops.

    Started again on the same state directory (MENTOR_SERVE_HOME, default ./.mentor) it goes on at
    the step and version where it stopped.
    """
    settings = _settings(config, assignments)
    gateway = {k: v for k, v in {"host": host, "port": port}.items() if v is not None}
    if gateway:
        settings = settings.model_copy(
            update={"gateway": settings.gateway.model_copy(update=gateway)}
        )
    from mentor_serve.actors.foreground import run_in_foreground

    run_in_foreground(settings, with_dashboard=dashboard)


@app.command()
def status(
    config: ConfigOption = None, assignments: SetOption = None, as_json: JsonOption = False
) -> None:
    """Show the run: step, versions, pass rates, queue, and whether the service answers."""
    from mentor_serve.reports import run_status, status_rows

    report = run_status(_settings(config, assignments))
    if as_json:
        _print_json(report)
    else:
        _print_table(status_rows(report), title="mentor-serve status")


@app.command(name="eval")
def evaluate(
    model: Annotated[
        str, typer.Argument(help="`live`, `policy@VERSION`, `expert`, or a model directory.")
    ] = "live",
    num_problems: Annotated[int, typer.Option(min=1, help="Held-out problems.")] = 200,
    num_samples: Annotated[
        int, typer.Option(min=1, help="Samples a problem; 1 is greedy pass@1.")
    ] = 8,
    temperature: Annotated[float, typer.Option(min=0.0)] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    config: ConfigOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a policy on held-out tasks: avg@k, pass@k, entropy, length; stored in `evaluations`.

    Runs in this process, beside a running service or without one.
    """
    from mentor_serve.reports import evaluation_rows, run_evaluation

    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("evaluating", total=num_problems)
        report = run_evaluation(
            _settings(config, assignments),
            model,
            num_problems=num_problems,
            num_samples=num_samples,
            temperature=temperature,
            seed=seed,
            on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    if as_json:
        _print_json(report)
    else:
        _print_table(evaluation_rows(report), title="Evaluation")


@db_app.command("upgrade")
def db_upgrade(
    config: ConfigOption = None, assignments: SetOption = None, as_json: JsonOption = False
) -> None:
    """Bring the database to the schema of this version (migrations, under a lock)."""
    from mentor_serve.store import schema_state, upgrade

    settings = _settings(config, assignments)
    settings.home.mkdir(parents=True, exist_ok=True)
    upgrade(settings.database_url)
    state = schema_state(settings.database_url)
    if as_json:
        _print_json({"revision": state.current, "head": state.head, "status": state.status})
    else:
        typer.echo(f"database is at revision {state.current}")


@db_app.command("check")
def db_check(
    config: ConfigOption = None, assignments: SetOption = None, as_json: JsonOption = False
) -> None:
    """Check the schema version, integrity, orphans and counts; exit code 1 if something is off."""
    from mentor_serve.store import database_check

    report = database_check(_settings(config, assignments).database_url)
    if as_json:
        _print_json(report)
    else:
        _print_table(report, title="Database check")
    if not report["ok"]:
        raise typer.Exit(EXIT_FAILED)


@config_app.command("show")
def config_show(
    config: ConfigOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print every setting as it resolves from defaults, files, environment and flags.

    The text form is TOML that `--config` reads back; secrets are hidden in both.
    """
    tree = _settings(config, assignments).model_dump(mode="json")
    if as_json:
        _print_json(tree)
        return
    for key, value in tree.items():
        if not isinstance(value, dict):
            typer.echo(_toml_line(key, value))
    for section, values in tree.items():
        if isinstance(values, dict):
            typer.echo(f"\n[{section}]")
            for key, value in values.items():
                typer.echo(_toml_line(key, value))


def _toml_line(key: str, value: Any) -> str:
    return f"# {key} is not set" if value is None else f"{key} = {_toml_value(value)}"


def _toml_value(value: Any) -> str:
    """A JSON-like value as TOML; the two agree on everything but tables."""
    if isinstance(value, dict):
        inner = ", ".join(f"{json.dumps(k)} = {_toml_value(v)}" for k, v in value.items())
        return f"{{{inner}}}"
    if isinstance(value, list):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    return json.dumps(value)


@app.command()
def doctor(
    config: ConfigOption = None, assignments: SetOption = None, as_json: JsonOption = False
) -> None:
    """Check this machine and configuration: versions, models, database, ports, memory, disk."""
    from mentor_serve.doctor import run_checks

    checks = run_checks(_settings(config, assignments))
    if as_json:
        _print_json([check.as_dict() for check in checks])
    else:
        table = Table(box=None, padding=(0, 2), show_header=False)
        marks = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[red]fail[/]"}
        for check in checks:
            table.add_row(marks[check.status], check.name, check.detail)
        out.print(table)
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(EXIT_FAILED)


if __name__ == "__main__":
    main()
