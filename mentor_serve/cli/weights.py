"""`mentor-serve weights` and `mentor-serve export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

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
    settings_from,
)

app = typer.Typer(help="Versions of the policy's weights.", no_args_is_help=True)


class ExportType(StrEnum):
    """What exported weights are stored as."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@app.command("list")
def list_versions(
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the files with their SHA-256.")
    ] = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show every version, newest first; with --verify, exit code 1 if a kept one is damaged."""
    with libraries_on_stderr():
        from mentor_serve.reports.weights import list_weights

        rows = list_weights(settings_from(config, assignments), verify=verify)
    if as_json:
        print_json(rows)
    else:
        out.print(_versions_table(rows))
    if any(row["problem"] for row in rows):
        for row in rows:
            if row["problem"] and not as_json:
                out.print(row["problem"], style="red", markup=False)
        raise typer.Exit(EXIT_FAILED)


def _versions_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2))
    for name in ("version", "step", "parent", "age", "size"):
        table.add_column(name, justify="right")
    table.add_column("sha256")
    table.add_column("")
    for row in rows:
        parent = row["parent_version"]
        marks = ["live"] if row["is_live"] else []
        marks += [] if row["is_kept"] else ["not kept"]
        if row["verified"] is not None:
            marks.append("verified" if row["verified"] else "[red]damaged[/]")
        table.add_row(
            str(row["version"]),
            str(row["step"]),
            "-" if parent is None else str(parent),
            _age(row["age_s"]),
            "-" if row["num_bytes"] is None else _size(row["num_bytes"]),
            "-" if row["sha256"] is None else row["sha256"][:12],
            ", ".join(marks),
        )
    return table


def _age(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _size(num_bytes: int) -> str:
    for unit, length in (("GB", 10**9), ("MB", 10**6)):
        if num_bytes >= length:
            return f"{num_bytes / length:.1f} {unit}"
    return f"{num_bytes / 1000:.0f} kB"


@app.command()
def rollback(
    version: Annotated[int, typer.Argument(min=0, help="A version that is kept.")],
    config: ConfigOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make the weights of an older version the newest version; nothing of the history is lost.

    Goes through the service where one runs, else works on its files. Groups that newer versions
    sampled are given up, the optimiser starts afresh.
    """
    with libraries_on_stderr():
        from mentor_serve.reports.weights import roll_back

        record = roll_back(settings_from(config, assignments), version)
    if as_json:
        print_json(record)
        return
    how = "the service takes it over" if record["through"] == "service" else "no service runs"
    out.print(f"version {record['version']} has the weights of version {version}; {how}")


def export(
    version: Annotated[str, typer.Argument(help="A version that is kept, or `latest`.")],
    to: Annotated[Path, typer.Option("--to", help="Directory to make.")],
    dtype: Annotated[ExportType, typer.Option(help="Of the weights.")] = ExportType.FLOAT32,
    config: ConfigOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a version as a plain Hugging Face directory, with model card and checksums."""
    with libraries_on_stderr():
        from mentor_serve.reports.weights import export_version

        settings = settings_from(config, assignments)
        report = export_version(settings, version, to, dtype=dtype.value)
    if as_json:
        print_json(report)
        return
    out.print(
        f"version {report['version']} (step {report['step']}, {report['dtype']}, "
        f"{_size(report['num_bytes'])}) is in {report['path']}",
        soft_wrap=True,
        highlight=False,
    )
