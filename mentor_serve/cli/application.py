"""Puts the commands together and turns our errors into one line and an exit code."""

from __future__ import annotations

import os
import sys

import typer
from rich.console import Console

from mentor_serve import __version__
from mentor_serve.cli import (
    comparison,
    configuration,
    database,
    evaluation,
    rollouts,
    service,
    weights,
)
from mentor_serve.cli.options import EXIT_FAILED, EXIT_USAGE
from mentor_serve.errors import ConfigError, MentorError

# Nothing here phones home; set before anything imports ray.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

app = typer.Typer(
    name="mentor-serve",
    help="A language model that gets better while it serves (MENTOR on Ray Serve).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


app.command()(service.up)
app.command()(service.status)
app.command(name="eval")(evaluation.evaluate)
app.command()(comparison.compare)
app.command()(weights.export)
app.add_typer(weights.app, name="weights")
app.add_typer(rollouts.app, name="rollouts")
app.add_typer(database.app, name="db")
app.add_typer(configuration.app, name="config")
app.command()(service.doctor)


def main() -> None:
    """Run the command line."""
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
