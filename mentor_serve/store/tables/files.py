"""Trajectories into one Parquet or JSONL file.

The file appears under its name when it is complete and on the disk; an export that fails or is
interrupted leaves nothing there, and a file that was there before stays as it was.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from mentor_serve.errors import StoreError
from mentor_serve.store.tables.arrow import arrow_schema, arrow_table, load_pyarrow
from mentor_serve.store.tables.columns import ARRAYS, COLUMNS, INTERVENTION
from mentor_serve.store.tables.reader import EVERYTHING, Row, TrajectoryFilter, TrajectoryReader

FileFormat = Literal["parquet", "jsonl"]
_Write = Callable[[list[Row]], None]
_encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode

ROW_GROUP_BYTES = 64 << 20
"""Of Arrow memory in a row group of Parquet: what a reader, and this writer, holds at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What was written."""

    path: Path
    num_trajectories: int
    num_tokens: int
    """Of responses, whether their arrays were exported or not."""
    num_bytes: int
    """Size of the file."""


def export_trajectories(
    reader: TrajectoryReader,
    path: Path,
    *,
    file_format: FileFormat,
    selection: TrajectoryFilter = EVERYTHING,
    with_tokens: bool = True,
    limit: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Write trajectories, oldest first; replaces a file that is there.

    Args:
        reader: where from.
        path: the file to make; its directory exists.
        file_format: `parquet`, or `jsonl` (one object a line; NaN and infinity become null).
        selection: which trajectories.
        with_tokens: whether the arrays of tokens go with them.
        limit: most trajectories.
        on_progress: called with (trajectories written, trajectories to write).

    Raises:
        StoreError: the database cannot be read, the file cannot be written, or Parquet is asked for
            without pyarrow.
    """
    if file_format == "parquet":
        load_pyarrow()  # before anything is counted or opened
    total = reader.count(selection)
    total = total if limit is None else min(total, limit)
    num_rows = num_tokens = 0
    opened = (
        partial(_parquet_rows, with_tokens=with_tokens) if file_format == "parquet" else _json_lines
    )
    with _appearing_whole(path) as file, opened(file) as write:
        for rows in reader.read_batches(selection, with_tokens=with_tokens, limit=limit):
            write(rows)
            num_rows += len(rows)
            num_tokens += sum(row["num_tokens"] for row in rows)
            if on_progress is not None:
                on_progress(num_rows, max(num_rows, total))
    return ExportReport(
        path=path,
        num_trajectories=num_rows,
        num_tokens=num_tokens,
        num_bytes=path.stat().st_size,
    )


@contextmanager
def _appearing_whole(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` that takes its place at the end, or vanishes."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise StoreError(
            f"writing {path} failed: {error.strerror or error}; a file of that name from before is "
            "untouched"
        ) from error
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def _parquet_rows(file: BinaryIO, *, with_tokens: bool) -> Iterator[_Write]:
    """Collects tables to row groups of about `ROW_GROUP_BYTES`."""
    from pyarrow import parquet

    pa = load_pyarrow()
    schema = arrow_schema(with_tokens=with_tokens)
    waiting: list[Any] = []
    # Left by an exception it still has to be closed before the file is.
    with parquet.ParquetWriter(file, schema, **_compression(with_tokens=with_tokens)) as writer:

        def flush() -> None:
            if waiting:
                writer.write_table(pa.concat_tables(waiting))
                waiting.clear()

        def write(rows: list[Row]) -> None:
            waiting.append(arrow_table(rows, with_tokens=with_tokens))
            if sum(table.nbytes for table in waiting) >= ROW_GROUP_BYTES:
                flush()

        yield write
        flush()


def _compression(*, with_tokens: bool) -> dict[str, Any]:
    """Options of the Parquet writer; the float32 of tokens split by byte take a fifth less.

    A column is split or has a dictionary, so both have to be named.
    """
    arrays = {f"{name}.list.element": kind for name, kind in ARRAYS.items() if with_tokens}
    floats = [path for path, kind in arrays.items() if kind == "float32"]
    others = [column.name for column in COLUMNS]
    others += [f"interventions.list.element.{name}" for name in INTERVENTION]
    others += [path for path in arrays if path not in floats]
    return {"compression": "zstd", "use_dictionary": others, "use_byte_stream_split": floats}


@contextmanager
def _json_lines(file: BinaryIO) -> Iterator[_Write]:
    """One object a line, keys in the order of the table."""

    def write(rows: list[Row]) -> None:
        for row in rows:
            # Names of columns need no escapes.
            pairs = (f'"{name}": {_json_text(value)}' for name, value in row.items())
            file.write(f"{{{', '.join(pairs)}}}\n".encode())

    yield write


def _json_text(value: Any) -> str:
    if isinstance(value, np.ndarray):
        if value.dtype.kind != "f":
            return _encode_json(value.tolist())
        # The shortest digits that give back the same float32; as Python floats they were twice as
        # long.
        texts = np.where(np.isfinite(value), value.astype("U16"), "null")
        return f"[{', '.join(texts.tolist())}]"
    if isinstance(value, float) and not math.isfinite(value):
        return "null"
    if isinstance(value, datetime):
        value = value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return _encode_json(value)
