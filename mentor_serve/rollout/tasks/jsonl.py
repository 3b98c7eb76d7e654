"""Tasks from a JSON Lines file: one object a line, read whole when the source is built.

Columns: see `columns.task_from_row`. A malformed line is a `ConfigError` with file and line number;
nothing is skipped but empty lines.
"""

from __future__ import annotations

import json
from pathlib import Path

from mentor_serve.errors import ConfigError
from mentor_serve.rollout.tasks.columns import task_from_row
from mentor_serve.types import Task


def read_jsonl(path: str | Path, *, split: str = "train") -> list[Task]:
    """Return the tasks of a file, in its order.

    Raises:
        ConfigError: the file is missing, empty, not UTF-8, or a line is not a task.
    """
    file = Path(path).expanduser()
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ConfigError(f"cannot read tasks from {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"cannot read tasks from {file}: expected UTF-8 text ({error})"
        ) from error
    source = f"jsonl:{file.name}"
    tasks = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where}: expected one JSON object a line, {error}") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{where}: expected a JSON object, got {line.strip()!r:.80}")
        tasks.append(task_from_row(row, source=source, where=where, split=split))
    if not tasks:
        raise ConfigError(f"{file} holds no tasks; expected one JSON object a line")
    return tasks
