"""What a trial has measured so far: one JSON line an entry, so that a killed trial goes on.

The store has the run, its updates and its evaluations; the log adds what only the experiment knows
(times, costs, results problem by problem) and is all that the analysis reads.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TrialLog:
    """Appends entries to a file and reads them back."""

    def __init__(self, path: Path) -> None:
        """Read what is there; a line that a kill cut off counts as not written."""
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._entries: list[dict[str, Any]] = []
        if path.exists():
            *lines, rest = path.read_text(encoding="utf-8").split("\n")
            self._entries = [json.loads(line) for line in lines]
            if rest:
                os.truncate(path, path.stat().st_size - len(rest.encode()))

    def add(self, kind: str, values: Mapping[str, Any]) -> None:
        """Append an entry; NaN becomes null."""
        entry = {"kind": kind, **{name: _plain(value) for name, value in values.items()}}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")
        self._entries.append(entry)

    def entries(self, kind: str) -> list[dict[str, Any]]:
        """Every entry of a kind, in the order they were added, without the kind."""
        return [
            {name: value for name, value in entry.items() if name != "kind"}
            for entry in self._entries
            if entry["kind"] == kind
        ]

    @property
    def is_complete(self) -> bool:
        """Whether the trial said that it is done."""
        return bool(self.entries("done"))


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
