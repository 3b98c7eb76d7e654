"""Inserting many rows of one table, as near to the driver as it gets.

The ORM's own path compiles nothing twice either, but it looks at every value of every row on the
way; token arrays are most of what is stored, and there is nothing to look at in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from sqlalchemy import Connection, Dialect, TypeDecorator

from mentor_serve.store.models import Base

Row = tuple[Any, ...]
_Convert = Callable[[Any], Any]

_PLACEHOLDERS = {"sqlite": "?", "postgresql": "%s"}


class BulkInsert:
    """`INSERT` of some columns of a table, for one kind of database.

    Rows are made where they come from (`row`) and written in the transaction (`execute`).
    """

    def __init__(self, model: type[Base], columns: Sequence[str], dialect: Dialect) -> None:
        """Take the names of the columns in the order of the rows."""
        self._table = model.__table__
        self._name = model.__tablename__
        self._columns = tuple(columns)
        self.dialect = dialect

    def row(self, values: Mapping[str, Any]) -> Row:
        """The values of one row as the driver takes them.

        Raises:
            KeyError: a column is missing.
            ValueError: a value that its column's type refuses, for instance a naive datetime.
        """
        row = [values[name] for name in self._columns]
        for index, convert in self._conversions:
            row[index] = convert(row[index])
        return tuple(row)

    def execute(self, connection: Connection, rows: Sequence[Row]) -> None:
        """Insert the rows in the connection's transaction."""
        if rows:
            connection.exec_driver_sql(self.statement, list(rows))

    @cached_property
    def statement(self) -> str:
        """The SQL, with a placeholder for each column."""
        quote = self.dialect.identifier_preparer.quote
        names = ", ".join(quote(name) for name in self._columns)
        marks = ", ".join([_PLACEHOLDERS[self.dialect.name]] * len(self._columns))
        return f"INSERT INTO {quote(self._name)} ({names}) VALUES ({marks})"  # noqa: S608

    @cached_property
    def _conversions(self) -> list[tuple[int, _Convert]]:
        """Of the types that this package defines; drivers take all others as they are."""
        found: list[tuple[int, _Convert]] = []
        for index, name in enumerate(self._columns):
            kind = self._table.columns[name].type
            if isinstance(kind, TypeDecorator):
                convert = kind.dialect_impl(self.dialect).bind_processor(self.dialect)
                if convert is not None:
                    found.append((index, convert))
        return found
