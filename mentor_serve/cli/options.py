"""What the commands share: options, settings from them, and how results are printed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mentor_serve.errors import ConfigError
from mentor_serve.settings import Settings, load_settings

EXIT_FAILED = 1
EXIT_USAGE = 2
PROGRESS_INTERVAL_S = 10.0
"""Between lines of progress where standard error is no terminal."""

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


def overrides_of(assignments: list[str] | None) -> dict[str, Any]:
    """Dotted keys and values of `--set`.

    Raises:
        ConfigError: an assignment without `=`.
    """
    overrides: dict[str, Any] = {}
    for assignment in assignments or []:
        key, separator, value = assignment.partition("=")
        if not separator:
            raise ConfigError(f"--set {assignment}: expected SECTION.KEY=VALUE")
        overrides[key.strip()] = value.strip()
    return overrides


def settings_from(config: list[Path] | None, assignments: list[str] | None) -> Settings:
    """Settings from `--config` and `--set`, the environment and the defaults."""
    return load_settings(config or [], overrides_of(assignments))


def print_json(document: Any) -> None:
    """One JSON document; times and paths as text."""
    typer.echo(json.dumps(document, indent=2, default=str))


def print_table(rows: dict[str, Any], *, title: str) -> None:
    """Labels and values."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name.replace("_", " "), str(value))
    out.print(table)


def libraries_on_stderr() -> redirect_stdout[TextIO]:
    """While this is open, what libraries print goes to standard error.

    Some greet on standard output when they are imported (deepspeed), which would spoil `--json`.
    """
    return redirect_stdout(sys.stderr)


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Progress on standard error; call what it yields with (done, total).

    A bar on a terminal; elsewhere a line every `PROGRESS_INTERVAL_S`. Includes
    `libraries_on_stderr`.
    """
    console = Console(stderr=True)
    lines = _progress_lines(label)
    with (
        libraries_on_stderr(),
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        bar = progress.add_task(label, total=None)
        yield (
            (lambda done, total: progress.update(bar, completed=done, total=total))
            if console.is_terminal
            else lines
        )


def _progress_lines(label: str) -> Callable[[int, int], None]:
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PROGRESS_INTERVAL_S:
            last = now
            typer.echo(f"{label}: {done:,} of {total:,}", err=True)

    return report
