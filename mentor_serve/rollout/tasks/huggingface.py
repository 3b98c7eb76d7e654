"""Tasks from anything that `datasets` loads: a hub id, a directory, or a parquet, JSON or CSV file.

Columns: see `columns.task_from_row`. The split is read whole when the source is built. Scripts that
come with a data set are not run (`datasets` no longer does).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from mentor_serve.errors import ConfigError
from mentor_serve.rollout.tasks.columns import task_from_row
from mentor_serve.types import Task

_BUILDERS: Final = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
}
CONFIG_KEYS: Final = frozenset({"name", "data_files", "revision", "split"})


def read_huggingface(name: str, *, split: str, config: dict[str, Any]) -> list[Task]:
    """Return the tasks of one split, in its order.

    Args:
        name: hub id, directory or file.
        split: `train`, `test[:500]`, ...; `config["split"]` goes before it.
        config: `name` (the data set's configuration), `data_files`, `revision`, `split`.

    Raises:
        ConfigError: unknown keys, nothing there, no such split, or a row that is not a task.
    """
    if unknown := config.keys() - CONFIG_KEYS:
        raise ConfigError(
            f"tasks.config: unknown keys {', '.join(sorted(unknown))} for source huggingface; "
            f"expected {', '.join(sorted(CONFIG_KEYS))}"
        )
    split = config.get("split", split)
    rows = _load(name, split, {key: value for key, value in config.items() if key != "split"})
    label = f"huggingface:{Path(name).name if Path(name).exists() else name}"
    return [
        task_from_row(row, source=label, where=f"{name}, split {split}, row {number}", split=split)
        for number, row in enumerate(rows)
    ]


def _load(name: str, split: str, options: dict[str, Any]) -> Any:
    import datasets

    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix not in _BUILDERS:
            raise ConfigError(f"{path}: expected one of {', '.join(_BUILDERS)}")
        options["data_files"] = {split.partition("[")[0]: str(path)}
        name = _BUILDERS[path.suffix]
    elif path.is_dir():
        name = str(path)
    elif path.is_absolute() or name.startswith("."):
        raise ConfigError(f"{name}: no such file or directory")
    try:
        return datasets.load_dataset(name, split=split, **options)
    except Exception as error:  # boundary: pyarrow, fsspec and the hub client raise many families
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            f"cannot load data set {name!r}, split {split!r}: {type(error).__name__}: {first_line}"
            " (expected a hub id that can be reached, a directory or a parquet, JSON or CSV file)"
        ) from error
