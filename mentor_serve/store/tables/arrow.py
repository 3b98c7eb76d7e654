"""Rows of trajectories as Arrow tables. pyarrow is an extra, imported when it is first needed."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mentor_serve.errors import StoreError
from mentor_serve.store.tables.columns import ARRAYS, COLUMNS, INTERVENTION

if TYPE_CHECKING:
    import pyarrow


def load_pyarrow() -> ModuleType:
    """The module pyarrow.

    Raises:
        StoreError: it is not installed.
    """
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise StoreError(
            "Arrow tables and Parquet need pyarrow: pip install 'mentor-serve[export]'"
        ) from error
    module: ModuleType = pyarrow
    return module


def arrow_schema(*, with_tokens: bool) -> pyarrow.Schema:
    """Columns of an exported table, in order."""
    pa = load_pyarrow()
    entry = pa.struct([pa.field(name, _type(kind)) for name, kind in INTERVENTION.items()])
    fields = [pa.field(column.name, _type(column.type)) for column in COLUMNS]
    fields.append(pa.field("interventions", pa.list_(entry)))
    if with_tokens:
        fields += [
            pa.field(name, pa.list_(pa.type_for_alias(kind))) for name, kind in ARRAYS.items()
        ]
    return pa.schema(fields)


def arrow_table(rows: Sequence[dict[str, Any]], *, with_tokens: bool) -> pyarrow.Table:
    """Rows of `TrajectoryReader.read_batches` as a table of `arrow_schema`."""
    pa = load_pyarrow()
    schema = arrow_schema(with_tokens=with_tokens)
    columns = [
        _lists([row[field.name] for row in rows], ARRAYS[field.name])
        if field.name in ARRAYS
        else pa.array([row[field.name] for row in rows], type=field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def _type(kind: str) -> pyarrow.DataType:
    pa = load_pyarrow()
    return pa.timestamp("us", tz="UTC") if kind == "timestamp" else pa.type_for_alias(kind)


def _lists(arrays: Sequence[NDArray[Any] | None], kind: str) -> pyarrow.Array:
    """A list column from the arrays' own memory layout: no Python object for each token."""
    pa = load_pyarrow()
    lengths = [0 if array is None else len(array) for array in arrays]
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    present = [array for array in arrays if array is not None]
    values = np.concatenate(present) if present else np.empty(0, kind)
    is_missing = np.array([array is None for array in arrays], dtype=bool)
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(values, type=pa.type_for_alias(kind)), mask=pa.array(is_missing)
    )
