"""`mentor-serve rollouts`."""

from __future__ import annotations

from datetime import UTC, datetime
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
    overrides_of,
    print_json,
    progress_bar,
    settings_from,
)
from mentor_serve.errors import ConfigError
from mentor_serve.types import TrajectoryKind

app = typer.Typer(help="Stored rollouts and the updates made of them.", no_args_is_help=True)


class ExportFormat(StrEnum):
    """What exported rollouts are written as."""

    PARQUET = "parquet"
    JSONL = "jsonl"


class Status(StrEnum):
    """Whether a trajectory could be sampled and scored."""

    OK = "ok"
    FAILED = "failed"


@app.command()
def export(  # noqa: PLR0913, PLR0917 - one parameter an option
    to: Annotated[
        Path, typer.Option("--out", help="File to make; one that is there is replaced at the end.")
    ],
    file_format: Annotated[
        ExportFormat | None,
        typer.Option("--format", help="Default: by the ending of --out.", show_default=False),
    ] = None,
    run: Annotated[str | None, typer.Option("--run", help="Name; default: run_name.")] = None,
    kind: Annotated[
        list[TrajectoryKind] | None, typer.Option(help="Repeat it for several; default: all.")
    ] = None,
    min_version: Annotated[
        int | None, typer.Option(min=0, help="Oldest policy version of a response's tokens.")
    ] = None,
    max_version: Annotated[
        int | None, typer.Option(min=0, help="The same, at most; this one included.")
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Stored then or later: 2026-01-31 or 2026-01-31T12:00Z."),
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="TIME", help="Stored before; UTC where it has no zone.")
    ] = None,
    passed: Annotated[
        bool | None,
        typer.Option(
            "--passed/--failed",
            help="Accuracy 1, or below; default: both, and what was not scored.",
            show_default=False,
        ),
    ] = None,
    status: Annotated[
        Status | None, typer.Option(help="`ok`: sampled and scored; default: failed ones too.")
    ] = None,
    with_tokens: Annotated[
        bool,
        typer.Option("--with-tokens/--no-tokens", help="Ids, log-probabilities, entropies, ..."),
    ] = True,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Most rows; the oldest go first.")
    ] = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write stored rollouts to a Parquet or JSONL file, one row a response, oldest first.

    Each row has prompt, answer, completion, reward, what guided its group (policy_version, alpha,
    gamma), the step that trained on it, its interventions, and its tokens. Safe beside a running
    service; memory stays the same however many rows there are. The file appears when it is whole.

    mentor-serve rollouts export --out solved.parquet --kind mixed --passed

    docs/export.md has the columns and recipes for pandas, polars, datasets and torch.
    """
    settings = settings_from(config, assignments)
    if run is not None:
        settings = settings.model_copy(update={"run_name": run})
    with progress_bar("exporting") as on_progress:
        from mentor_serve.reports.rollouts import export_rollouts
        from mentor_serve.store import TrajectoryFilter

        selection = TrajectoryFilter(
            kinds=tuple(kind or ()),
            status=status,
            min_version=min_version,
            max_version=max_version,
            since=_time("--since", since),
            until=_time("--until", until),
            is_passed=passed,
        )
        report = export_rollouts(
            settings,
            to,
            selection=selection,
            file_format=None if file_format is None else file_format.value,
            with_tokens=with_tokens,
            limit=limit,
            on_progress=on_progress,
        )
    if as_json:
        print_json(report)
        return
    number = report["num_trajectories"]
    what = f"{number:,} trajectories" if number else "No trajectory fits: an empty table"
    out.print(
        f"{what} of run {report['run_name']} ({report['num_bytes'] / 1e6:.1f} MB) "
        f"{'are' if number else 'is'} in {report['path']}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


def _time(option: str, text: str | None) -> datetime | None:
    """A time of ISO 8601, in UTC where it has no zone.

    Raises:
        ConfigError: it is none.
    """
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(
            f"{option} {text}: expected a time such as 2026-01-31 or 2026-01-31T12:00Z"
        ) from error
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time


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
