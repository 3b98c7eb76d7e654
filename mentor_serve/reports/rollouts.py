"""What `mentor-serve rollouts export` does: finds the run, filters, writes the file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mentor_serve.actors.runtime import open_store
from mentor_serve.errors import ConfigError
from mentor_serve.reports.status import existing_run
from mentor_serve.settings import Settings
from mentor_serve.store import require_current
from mentor_serve.store.tables import (
    FileFormat,
    TrajectoryFilter,
    TrajectoryReader,
    export_trajectories,
)

_SUFFIXES: dict[str, FileFormat] = {".parquet": "parquet", ".jsonl": "jsonl"}


def export_rollouts(
    settings: Settings,
    path: Path,
    *,
    selection: TrajectoryFilter,
    file_format: FileFormat | None = None,
    with_tokens: bool = True,
    limit: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write trajectories of the settings' run into a file; returns what was written, for JSON.

    Args:
        settings: the database, and the run's name.
        path: the file; None as `file_format` takes the format from its suffix.
        selection: which trajectories; its `run_id` is set here.
        file_format: `parquet` or `jsonl`.
        with_tokens: whether the arrays of tokens go with them.
        limit: most trajectories.
        on_progress: called with (trajectories written, trajectories to write).

    Raises:
        ConfigError: no such run, no such directory, or no format.
        SchemaOutOfDate: the database is not at this version's schema.
        StoreError: reading or writing failed; nothing is left at `path` then.
    """
    chosen = file_format or _format_of(path)
    if not path.parent.is_dir():
        raise ConfigError(f"--out {path}: expected a directory {path.parent}, found none; make it")
    if path.is_dir():
        raise ConfigError(f"--out {path}: expected the name of a file, got a directory")
    with open_store(settings, mode="read") as store:
        run_id = existing_run(settings, store)
    require_current(settings.database_url)
    with TrajectoryReader(settings.database_url, timeout_s=settings.store.timeout_s) as reader:
        report = export_trajectories(
            reader,
            path,
            file_format=chosen,
            selection=replace(selection, run_id=run_id),
            with_tokens=with_tokens,
            limit=limit,
            on_progress=on_progress,
        )
    return {**asdict(report), "format": chosen, "run_name": settings.run_name, "run_id": run_id}


def _format_of(path: Path) -> FileFormat:
    found = _SUFFIXES.get(path.suffix)
    if found is None:
        raise ConfigError(
            f"--out {path}: expected --format parquet or jsonl, or a name that ends in .parquet or "
            ".jsonl"
        )
    return found
