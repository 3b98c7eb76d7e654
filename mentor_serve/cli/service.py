"""Starting the service, looking at it, and at the machine it is to run on."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from mentor_serve.cli.options import (
    EXIT_FAILED,
    ConfigOption,
    JsonOption,
    SetOption,
    libraries_on_stderr,
    out,
    print_json,
    print_table,
    settings_from,
)


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
    settings = settings_from(config, assignments)
    gateway = {k: v for k, v in {"host": host, "port": port}.items() if v is not None}
    if gateway:
        settings = settings.model_copy(
            update={"gateway": settings.gateway.model_copy(update=gateway)}
        )
    from mentor_serve.actors.foreground import run_in_foreground

    run_in_foreground(settings, with_dashboard=dashboard)


def status(
    config: ConfigOption = None, assignments: SetOption = None, as_json: JsonOption = False
) -> None:
    """Show the run: step, versions, pass rates, queue, and whether the service answers."""
    from mentor_serve.reports.status import run_status, status_rows

    with libraries_on_stderr():
        report = run_status(settings_from(config, assignments))
    if as_json:
        print_json(report)
    else:
        print_table(status_rows(report), title="mentor-serve status")


def doctor(
    config: ConfigOption = None, assignments: SetOption = None, as_json: JsonOption = False
) -> None:
    """Check this machine and configuration: versions, models, database, ports, memory, disk."""
    from mentor_serve.doctor import run_checks

    with libraries_on_stderr():
        checks = run_checks(settings_from(config, assignments))
    if as_json:
        print_json([check.as_dict() for check in checks])
    else:
        table = Table(box=None, padding=(0, 2), show_header=False)
        marks = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[red]fail[/]"}
        for check in checks:
            table.add_row(marks[check.status], check.name, check.detail)
        out.print(table)
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(EXIT_FAILED)
