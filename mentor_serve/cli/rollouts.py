"""`mentor-serve rollouts`."""

from __future__ import annotations

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
    overrides_of,
    print_json,
)
from mentor_serve.errors import ConfigError

app = typer.Typer(help="Stored rollouts and the updates made of them.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep `replay` a subcommand although it is the only one."""


@app.command()
def replay(
    identifier: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Of a trajectory or a group.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(min=1, help="Replay this update instead of rollouts.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Values agree within this times max(1, |stored|). Default by type, see "
            "docs/evaluation.md.",
        ),
    ] = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compute stored numbers again from kept weights and compare; exit code 1 where they differ.

    Of rollouts: log-probabilities, entropies and weights of every token. Of an update: its loss and
    its other numbers. Decided by the settings of the run's last start; --set goes before them.
    """
    if (identifier is None) == (step is None):
        raise ConfigError("expected either the id of a trajectory or group, or --step N")
    with libraries_on_stderr():
        from mentor_serve.reports import replay as reports

        settings = reports.replay_settings(config or [], overrides_of(assignments))
        report = reports.replay(settings, identifier, step=step, tolerance=tolerance)
    document = report.as_dict()
    if as_json:
        print_json(document)
    else:
        _print(document)
    if not report.is_equal:
        raise typer.Exit(EXIT_FAILED)


def _print(document: dict[str, Any]) -> None:
    versions = ", ".join(map(str, document["versions"]))
    out.print(f"{document['subject']}, weights of version {versions}", highlight=False)
    out.print(_fields_table(document["fields"]))
    for name, numbers in document["derived"].items():
        shown = ", ".join(f"{label} {value:.6g}" for label, value in numbers.items())
        out.print(f"{name}: {shown}", highlight=False, markup=False, soft_wrap=True)
    for reason, count in document["skipped"].items():
        out.print(f"No verdict on {count}: {reason}.", highlight=False, soft_wrap=True)
    out.print(_verdict(document), highlight=False, markup=False, soft_wrap=True)


def _fields_table(fields: list[dict[str, Any]]) -> Table:
    is_by_token = any("stored" not in field for field in fields)
    names = ("compared", "different", "no verdict") if is_by_token else ("stored", "recomputed")
    table = Table(box=None, padding=(0, 2))
    table.add_column("field", no_wrap=True)
    for name in (*names, "largest gap" if is_by_token else "gap"):
        table.add_column(name, justify="right", no_wrap=True)
    for field in fields:
        gap = f"{field['max_distance']:.2g}" if field["num_compared"] else "-"
        if is_by_token:
            cells = [f"{field[f'num_{key}']:,}" for key in ("compared", "different", "skipped")]
        else:
            cells = [_shown(field["stored"]), _shown(field["recomputed"])]
        table.add_row(field["field"], *cells, gap, style="red" if field["num_different"] else None)
    return table


def _verdict(document: dict[str, Any]) -> str:
    first = document["first_difference"]
    if first is None:
        if document["is_equal"]:
            return f"All agree within {document['tolerance']:g}."
        return "Nothing could be compared."
    where = "" if first["trajectory_id"] is None else f" of {first['trajectory_id']}"
    where += "" if first["position"] is None else f", token {first['position']}"
    by = "" if first["distance"] is None else f", {first['distance']:.3g} apart"
    return (
        f"First difference: {first['field']}{where}: stored {_shown(first['stored'])}, recomputed "
        f"{_shown(first['recomputed'])} with version {first['version']}{by}."
    )


def _shown(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.9g}"
