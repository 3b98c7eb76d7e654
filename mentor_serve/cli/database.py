"""`mentor-serve db`: the trajectory store's schema, health, size and upkeep."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mentor_serve.cli.options import (
    EXIT_FAILED,
    ConfigOption,
    JsonOption,
    SetOption,
    out,
    print_json,
    print_table,
    progress_bar,
    settings_from,
)
from mentor_serve.errors import ConfigError

if TYPE_CHECKING:
    from mentor_serve.store.prune import Pruned, PrunePlan

app = typer.Typer(
    help="The trajectory store's schema, health, size and upkeep.", no_args_is_help=True
)


class What(StrEnum):
    """What `prune` deletes of what is old."""

    TOKENS = "tokens"
    GROUPS = "groups"


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
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out what reads whole tables.")
    ] = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check schema, integrity, references, arrays and counts; exit code 1 if something is off.

    Changes nothing and may run beside the service. Without --quick it reads the whole database.
    """
    from mentor_serve.store import database_check

    url = settings_from(config, assignments).database_url
    with progress_bar("checking") as progress:
        report = database_check(url, quick=quick, progress=progress)
    if as_json:
        print_json(report)
    else:
        _print_check(report)
    if not report["ok"]:
        raise typer.Exit(EXIT_FAILED)


def _print_check(report: dict[str, Any]) -> None:
    schema = report["schema"]
    rows = {
        "database": report["url"],
        "schema": "unknown" if schema is None else f"{schema['current']} ({schema['status']})",
        **{name: f"{number:,} rows" for name, number in report["counts"].items()},
    }
    print_table(rows, title="Quick check" if report["is_quick"] else "Database check")
    for style, name in (("red", "problems"), ("yellow", "warnings"), (None, "notes")):
        for sentence in report[name]:
            _say(f"{name.removesuffix('s')}: {sentence}", style=style)
    _say("sound" if report["ok"] else f"{len(report['problems'])} problems")


@app.command("stats")
def db_stats(
    config: ConfigOption = None, assignments: SetOption = None, as_json: JsonOption = False
) -> None:
    """Show rows and bytes of every table, bytes a trajectory and a token, and the daily growth.

    Changes nothing and may run beside the service, but reads whole tables.
    """
    from mentor_serve.store.size import database_stats

    settings = settings_from(config, assignments)
    with progress_bar("measuring") as progress:
        report = database_stats(
            settings.database_url, spool=settings.home / "spool", progress=progress
        )
    if as_json:
        print_json(report)
    else:
        _print_stats(report)


def _print_stats(report: dict[str, Any]) -> None:
    table = Table(box=None, padding=(0, 2))
    table.add_column("table")
    for name in ("rows", "bytes", "of these indexes"):
        table.add_column(name, justify="right")
    for name, row in report["tables"].items():
        table.add_row(
            name, f"{row['num_rows']:,}", _size(row["num_bytes"]), _size(row["num_index_bytes"])
        )
    out.print(table)
    rollouts, spool, day = report["rollouts"], report["spool"], report["rollouts"]["last_day"]
    groups = [f"{name} {number:,}" for name, number in report["groups"].items() if number]
    rows = {
        "database": f"{_size(report['num_bytes'])}, {report['url']}",
        "free within": _size(report["num_free_bytes"]),
        "write-ahead log": _size(report["num_wal_bytes"]),
        "a trajectory": _bytes(rollouts["bytes_per_trajectory"]),
        "a token's arrays": _bytes(rollouts["array_bytes_per_token"]),
        "a token as stored": _bytes(rollouts["stored_bytes_per_token"]),
        "groups": ", ".join(groups) or "none",
        "pruned groups": f"{sum(run['num_pruned_groups'] for run in report['runs']):,}",
        "oldest, newest": f"{rollouts['oldest_at'] or '-'}, {rollouts['newest_at'] or '-'}",
        "last day": f"{day['num_groups']:,} groups, about {_size(day['num_bytes'])}",
        "spool": f"{spool['num_files']:,} files, {_size(spool['num_bytes'])}",
    }
    print_table(rows, title="")


@app.command("prune")
def db_prune(  # noqa: PLR0913, PLR0917 - one parameter an option
    keep_days: Annotated[
        float | None, typer.Option(min=0.0, help="Keep what is younger than so many days.")
    ] = None,
    keep_versions: Annotated[
        int | None,
        typer.Option(min=0, help="Keep what the newest so many policy versions sampled."),
    ] = None,
    what: Annotated[
        What,
        typer.Option(help="Per-token arrays alone, or whole groups and served responses."),
    ] = What.TOKENS,
    run: Annotated[
        str | None, typer.Option("--run", help="Name of the only run to prune. Default: all.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count, delete nothing.")] = False,
    batch_size: Annotated[
        int, typer.Option(min=1, max=10_000, help="Groups in one transaction.")
    ] = 200,
    vacuum: Annotated[
        bool,
        typer.Option("--vacuum", help="Shrink the SQLite file afterwards; the service must stop."),
    ] = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete what is old and finished; safe beside the service, and to interrupt.

    Old is what is older than --keep-days and of an older version than --keep-versions; at least one
    of the two is needed. Ready and leased groups, demonstrations, tasks, updates, evaluations,
    events and the curves by version stay.
    """
    from mentor_serve.store.prune import Pruned, PrunePlan, prune
    from mentor_serve.store.vacuum import require_alone

    url = settings_from(config, assignments).database_url
    plan = PrunePlan(
        what=what.value,
        keep_days=keep_days,
        keep_versions=keep_versions,
        run=run,
        is_dry=dry_run,
        batch_size=batch_size,
    )
    if vacuum and dry_run:
        raise ConfigError("expected --vacuum or --dry-run, got both: a dry run changes nothing")
    if vacuum:
        require_alone(url)
    done, is_interrupted = Pruned(), False
    try:
        with progress_bar("pruning") as progress:
            prune(url, plan, into=done, progress=progress)
    except KeyboardInterrupt:
        is_interrupted = True
    _finish_prune(url, plan, done, vacuum=vacuum, is_interrupted=is_interrupted, as_json=as_json)
    if is_interrupted:
        raise typer.Exit(EXIT_FAILED)


def _finish_prune(
    url: str,
    plan: PrunePlan,
    done: Pruned,
    *,
    vacuum: bool,
    is_interrupted: bool,
    as_json: bool,
) -> None:
    """Shrink the file where that was asked for, and say what happened."""
    from mentor_serve.store.vacuum import vacuum as shrink

    sizes = shrink(url) if vacuum and not is_interrupted else None
    document = done.as_dict() | {
        "what": plan.what,
        "is_dry": plan.is_dry,
        "is_interrupted": is_interrupted,
        "file_bytes": None if sizes is None else {"before": sizes[0], "after": sizes[1]},
    }
    if as_json:
        print_json(document)
        return
    verb = "would delete" if plan.is_dry else "deleted"
    rows = f"the arrays of {done.num_token_rows:,} responses"
    if plan.what == "groups":
        rows = (
            f"{done.num_groups:,} groups and {done.num_served:,} served responses with "
            f"{done.num_trajectories:,} trajectories, {done.num_interventions:,} interventions and "
            + rows
        )
    _say(f"{verb} {rows}: {_size(done.num_array_bytes)} of arrays")
    if is_interrupted:
        _say("interrupted: what was deleted stays deleted, the same command goes on")
    elif sizes is not None:
        _say(f"the file shrank from {_size(sizes[0])} to {_size(sizes[1])}")
    elif not plan.is_dry and url.startswith("sqlite"):
        _say("the file keeps the room for what comes; --vacuum gives it back")
    elif not plan.is_dry:
        _say("autovacuum makes the room usable again; the files do not shrink by themselves")


@app.command("roles")
def db_roles(
    writer: Annotated[str, typer.Option(help="Role of the service.")] = "mentor_writer",
    reader: Annotated[
        str, typer.Option(help="Role of the dashboard and of analysts.")
    ] = "mentor_reader",
) -> None:
    """Print the SQL that makes a writing and a read-only role on PostgreSQL.

    mentor-serve db roles | psql "$DATABASE_URL"
    """
    from mentor_serve.store.roles import roles_script

    typer.echo(roles_script(writer=writer, reader=reader), nl=False)


def _say(sentence: str, *, style: str | None = None) -> None:
    out.print(sentence, style=style, markup=False, highlight=False, soft_wrap=True)


def _bytes(number: float | None) -> str:
    return "-" if number is None else f"{number:,.1f} bytes"


def _size(num_bytes: int | None) -> str:
    if num_bytes is None:
        return "-"
    for unit, length in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= length:
            return f"{num_bytes / length:.1f} {unit}"
    return f"{num_bytes} bytes"
