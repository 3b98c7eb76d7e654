"""`mentor-serve config`: the resolved configuration."""

from __future__ import annotations

import json
from typing import Any

import typer

from mentor_serve.cli.options import (
    ConfigOption,
    JsonOption,
    SetOption,
    print_json,
    settings_from,
)

app = typer.Typer(help="The resolved configuration.", no_args_is_help=True)


@app.command("show")
def config_show(
    config: ConfigOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print every setting as it resolves from defaults, files, environment and flags.

    The text form is TOML that `--config` reads back; secrets are hidden in both.
    """
    tree = settings_from(config, assignments).model_dump(mode="json")
    if as_json:
        print_json(tree)
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
