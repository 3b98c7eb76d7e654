"""Stored trajectories read back in bulk: rows, numpy arrays, Arrow tables. Read-only.

Everything streams in batches, oldest first, in short transactions that hold neither a writer nor a
vacuum up, so that a run of millions of trajectories is read in bounded memory while it goes on.
What is stored after reading began is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from numpy.typing import NDArray
from sqlalchemy import ColumnElement, Connection, RowMapping, func, select

from mentor_serve.errors import StoreError
from mentor_serve.store.connection import open_engine, reading
from mentor_serve.store.encoding import decode
from mentor_serve.store.models import Trajectory, TrajectoryTokens
from mentor_serve.store.tables.columns import ARRAYS, INTERVENTION, interventions_query, rows_query

if TYPE_CHECKING:
    import pyarrow

Row = dict[str, Any]

PAGE_ROWS = 1024
"""Rows that one query reads, ..."""
BATCH_TOKENS = 1 << 20
"""... and tokens, at most, whose arrays are in memory at once: 30 MB of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryFilter:
    """Which trajectories; what is None or empty does not restrict."""

    run_id: str | None = None
    ids: Sequence[str] = ()
    kinds: Sequence[str] = ()
    """Of `TrajectoryKind`."""
    status: str | None = None
    """`ok` or `failed`."""
    min_version: int | None = None
    """Of the oldest policy version that produced a token of the response, as is `max_version`."""
    max_version: int | None = None
    since: datetime | None = None
    """Stored at this time or later; aware."""
    until: datetime | None = None
    """Stored before this time; aware."""
    is_passed: bool | None = None
    """Accuracy 1, or below; both leave out what was not scored."""

    def conditions(self) -> list[ColumnElement[bool]]:
        """The filter as SQL over `trajectories`."""
        t = Trajectory
        found: list[ColumnElement[bool]] = []
        if self.run_id is not None:
            found.append(t.run_id == self.run_id)
        if self.ids:
            found.append(t.id.in_(self.ids))
        if self.kinds:
            found.append(t.kind.in_([str(kind) for kind in self.kinds]))
        if self.status is not None:
            found.append(t.status == self.status)
        if self.min_version is not None:
            found.append(t.min_policy_version >= self.min_version)
        if self.max_version is not None:
            found.append(t.min_policy_version <= self.max_version)
        if self.since is not None:
            found.append(t.created_at >= self.since)
        if self.until is not None:
            found.append(t.created_at < self.until)
        if self.is_passed is not None:
            found.append(t.accuracy >= 1 if self.is_passed else t.accuracy < 1)
        return found


EVERYTHING = TrajectoryFilter()


class TrajectoryReader:
    """Bulk reads of one database; close it, or use it as a context manager.

    Every method raises `StoreError` when the database cannot be read. The methods are generators
    where they return iterators: that happens at the first step then.
    """

    def __init__(self, url: str, *, timeout_s: float = 30.0) -> None:
        """Connect lazily. `timeout_s` is how long a query waits for a lock."""
        self._url = url
        self._engine = open_engine(url, pool_size=1, timeout_s=timeout_s, read_only=True)

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        """The reader itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def count(self, selection: TrajectoryFilter = EVERYTHING) -> int:
        """Number of trajectories."""
        query = select(func.count()).select_from(Trajectory).where(*selection.conditions())
        with reading(self._engine, self._url, doing="counting trajectories") as connection:
            return connection.scalars(query).one()

    def read_batches(
        self,
        selection: TrajectoryFilter = EVERYTHING,
        *,
        with_tokens: bool = True,
        limit: int | None = None,
    ) -> Iterator[list[Row]]:
        """Rows of `tables.columns`: `COLUMNS`, `interventions` as a list, and `ARRAYS`.

        Arrays are numpy, [T]; None where they were pruned or never made.

        Args:
            selection: which trajectories.
            with_tokens: whether to read the arrays; without, rows have none of these keys.
            limit: most rows in all.
        """
        for page in self._pages(selection, limit=limit):
            for batch in _by_tokens(page) if with_tokens else [page]:
                with reading(self._engine, self._url, doing="reading trajectories") as connection:
                    _add_interventions(connection, batch)
                    if with_tokens:
                        _add_arrays(connection, batch)
                yield batch

    def read_tokens(
        self, selection: TrajectoryFilter = EVERYTHING, *, limit: int | None = None
    ) -> Iterator[tuple[str, dict[str, NDArray[Any]]]]:
        """Id and arrays ([T], by column of `trajectory_tokens`) of each that has tokens.

        The arrays are writable copies: `torch.from_numpy` takes them as they are. `limit` counts
        trajectories without tokens, too.
        """
        for page in self._pages(selection, limit=limit):
            for batch in _by_tokens(page):
                with reading(self._engine, self._url, doing="reading tokens") as connection:
                    _add_arrays(connection, batch)
                for row in batch:
                    if row["token_ids"] is not None:
                        yield row["id"], {name: row[name] for name in ARRAYS}

    def to_arrow(
        self,
        selection: TrajectoryFilter = EVERYTHING,
        *,
        with_tokens: bool = True,
        limit: int | None = None,
    ) -> pyarrow.Table:
        """The rows of `read_batches` as one table in memory, arrays as list columns.

        NaN stays NaN in lists of float32; NULL is what was not measured.

        Raises:
            StoreError: pyarrow is not installed.
        """
        from mentor_serve.store.tables.arrow import arrow_schema, arrow_table, load_pyarrow

        pa = load_pyarrow()
        batches = self.read_batches(selection, with_tokens=with_tokens, limit=limit)
        tables = [arrow_table(batch, with_tokens=with_tokens) for batch in batches]
        return pa.concat_tables([arrow_schema(with_tokens=with_tokens).empty_table(), *tables])

    def _pages(self, selection: TrajectoryFilter, *, limit: int | None) -> Iterator[list[Row]]:
        """Rows without arrays, by id; ids are compared, so that no query skips rows by counting."""
        conditions = selection.conditions()
        query = rows_query().where(*conditions).order_by(Trajectory.id)
        # New ids are higher: without an end, the export of a running service would have none.
        newest = select(func.max(Trajectory.id)).where(*conditions)
        with reading(self._engine, self._url, doing="reading trajectories") as connection:
            last = connection.scalars(newest).one()
        cursor: str | None = None
        remaining = limit
        while last is not None and (remaining is None or remaining > 0):
            page_rows = PAGE_ROWS if remaining is None else min(PAGE_ROWS, remaining)
            page_query = query.where(Trajectory.id <= last).limit(page_rows)
            if cursor is not None:
                page_query = page_query.where(Trajectory.id > cursor)
            with reading(self._engine, self._url, doing="reading trajectories") as connection:
                page = [dict(row) for row in connection.execute(page_query).mappings()]
            if page:
                yield page
            if len(page) < page_rows:
                return
            cursor = page[-1]["id"]
            remaining = None if remaining is None else remaining - len(page)


def _by_tokens(page: list[Row]) -> Iterator[list[Row]]:
    """The page in parts of at most `BATCH_TOKENS` tokens, one row at least."""
    batch: list[Row] = []
    num_tokens = 0
    for row in page:
        size = row["num_prompt_tokens"] + row["num_tokens"]
        if batch and num_tokens + size > BATCH_TOKENS:
            yield batch
            batch, num_tokens = [], 0
        batch.append(row)
        num_tokens += size
    if batch:
        yield batch


def _add_interventions(connection: Connection, rows: list[Row]) -> None:
    by_id: dict[str, list[Row]] = {}
    for row in rows:
        row["interventions"] = by_id[row["id"]] = []
    with_some = [row["id"] for row in rows if row["num_interventions"]]
    if with_some:
        for found in connection.execute(interventions_query(with_some)).mappings():
            by_id[found["trajectory_id"]].append({name: found[name] for name in INTERVENTION})


def _add_arrays(connection: Connection, rows: list[Row]) -> None:
    query = select(TrajectoryTokens.__table__).where(
        TrajectoryTokens.trajectory_id.in_([row["id"] for row in rows])
    )
    stored = {row["trajectory_id"]: row for row in connection.execute(query).mappings()}
    for row in rows:
        blobs = stored.get(row["id"])
        for name in ARRAYS:
            row[name] = None if blobs is None else _decoded(blobs, name)


def _decoded(blobs: RowMapping, name: str) -> NDArray[Any]:
    try:
        return decode(blobs[name])
    except StoreError as error:
        raise StoreError(f"{name} of trajectory {blobs['trajectory_id']}: {error}") from error
