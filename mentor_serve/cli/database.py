"""`mentor-serve db`: the trajectory store's schema and health."""

from __future__ import annotations

import typer

from mentor_serve.cli.options import (
    EXIT_FAILED,
    ConfigOption,
    JsonOption,
    SetOption,
    print_json,
    print_table,
    settings_from,
)

app = typer.Typer(help="The trajectory store's schema and health.", no_args_is_help=True)


@app.command("upgrade")
def db_upgrade(
    config: ConfigOption = None, assignments: SetOption = None, as_json: JsonOption = False
) -> None:
    """Bring the database to the schema of this version (migrations, under a lock)."""
    from mentor_serve.store import schema_state, upgrade

    settings = settings_from(config, assignments)
    settings.home.mkdir(parents=True, exist_ok=True)
    upgrade(settings.database_url)
    state = schema_state(settings.database_url)
    if as_json:
        print_json({"revision": state.current, "head": state.head, "status": state.status})
    else:
        typer.echo(f"database is at revision {state.current}")


@app.command("check")
def db_check(
    config: ConfigOption = None, assignments: SetOption = None, as_json: JsonOption = False
) -> None:
    """Check the schema version, integrity, orphans and counts; exit code 1 if something is off."""
    from mentor_serve.store import database_check

    report = database_check(settings_from(config, assignments).database_url)
    if as_json:
        print_json(report)
    else:
        print_table(report, title="Database check")
    if not report["ok"]:
        raise typer.Exit(EXIT_FAILED)
