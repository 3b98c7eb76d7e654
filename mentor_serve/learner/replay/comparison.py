"""Stored beside recomputed: what differs, first of all, and by how much."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DEFAULT_TOLERANCE = {"float32": 1e-4, "bfloat16": 1.5, "float16": 0.1}
"""Of rollouts, by the type the policy generates in; docs/evaluation.md has the measurement."""
UPDATE_TOLERANCE = {"none": 1e-4, "bfloat16": 1e-2}
"""Of updates, by `learner.autocast`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One value that is not what it should be."""

    field: str
    stored: float | None
    """None where nothing is stored (NaN or NULL)."""
    recomputed: float | None
    version: int
    """Version of the weights that it was computed with."""
    trajectory_id: str | None = None
    position: int | None = None
    """Offset of the token in the response, from 0."""

    @property
    def distance(self) -> float:
        """Absolute difference; infinite where only one of the two is a number."""
        if self.stored is None or self.recomputed is None:
            return math.inf
        return abs(self.stored - self.recomputed)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        distance = self.distance
        return {**asdict(self), "distance": distance if math.isfinite(distance) else None}


@dataclass(slots=True, kw_only=True)
class FieldComparison:
    """All values of one field."""

    field: str
    num_compared: int = 0
    num_different: int = 0
    max_distance: float = 0.0
    """Largest absolute difference of those compared."""
    num_skipped: int = 0
    """Values that cannot be computed again exactly, or were never stored: no verdict."""
    first: Difference | None = None
    pair: tuple[float | None, float | None] | None = None
    """Stored and recomputed, where the field has one value."""

    def add(
        self,
        stored: Floats,
        recomputed: Floats,
        counts: NDArray[np.bool_],
        *,
        tolerance: float,
        version: int,
        trajectory_id: str | None = None,
        is_by_token: bool = True,
    ) -> None:
        """Compare two arrays of equal length, [T]; values where `counts` is False are skipped.

        Two values agree within `tolerance * max(1, |stored|)`.
        """
        self.num_skipped += int(np.count_nonzero(~counts))
        self.num_compared += int(np.count_nonzero(counts))
        distance = np.abs(stored - recomputed)
        # A NaN on one side or on both is no agreement.
        differs = counts & ~(distance <= tolerance * np.maximum(1.0, np.abs(stored)))
        finite = distance[counts & np.isfinite(distance)]
        self.max_distance = max(self.max_distance, float(finite.max(initial=0.0)))
        self.num_different += int(np.count_nonzero(differs))
        if self.first is None and differs.any():
            position = int(np.argmax(differs))
            self.first = Difference(
                field=self.field,
                stored=_number(stored[position]),
                recomputed=_number(recomputed[position]),
                version=version,
                trajectory_id=trajectory_id,
                position=position if is_by_token else None,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayReport:
    """The verdict on a trajectory, a group or an update."""

    subject: str
    versions: tuple[int, ...]
    """Versions whose weights were used."""
    tolerance: float
    fields: tuple[FieldComparison, ...]
    skipped: dict[str, int] = field(default_factory=dict)
    """Why values have no verdict -> how many tokens (or numbers) that concerns."""
    derived: dict[str, dict[str, float]] = field(default_factory=dict)
    """Numbers that were computed but are stored nowhere: advantages by trajectory."""

    @property
    def num_compared(self) -> int:
        """Values with a verdict."""
        return sum(item.num_compared for item in self.fields)

    @property
    def is_equal(self) -> bool:
        """Whether every compared value agrees; False where nothing could be compared."""
        return self.num_compared > 0 and all(item.first is None for item in self.fields)

    @property
    def first(self) -> Difference | None:
        """The first difference: by trajectory in their order, then position, then field."""
        found = [item.first for item in self.fields if item.first is not None]
        order = list(self.derived)
        return min(found, key=lambda item: _place(item, order), default=None)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "subject": self.subject,
            "is_equal": self.is_equal,
            "first_difference": None if self.first is None else self.first.as_dict(),
            "tolerance": self.tolerance,
            "versions": list(self.versions),
            "fields": [
                {
                    "field": item.field,
                    **({} if item.pair is None else _named(item.pair)),
                    "num_compared": item.num_compared,
                    "num_different": item.num_different,
                    "max_distance": item.max_distance,
                    "num_skipped": item.num_skipped,
                    "first_difference": None if item.first is None else item.first.as_dict(),
                }
                for item in self.fields
            ],
            "skipped": self.skipped,
            "derived": self.derived,
        }


def compare_numbers(
    pairs: Iterable[tuple[str, float | None, float | None]], *, tolerance: float, version: int
) -> list[FieldComparison]:
    """One comparison a (field, stored, recomputed); where both are missing (NULL, NaN) they agree.

    A field that is stored as NULL by an older release is skipped.
    """
    comparisons = []
    for name, stored, recomputed in pairs:
        comparison = FieldComparison(field=name)
        left, right = _float(stored), _float(recomputed)
        comparison.pair = _number(np.float64(left)), _number(np.float64(right))
        if math.isnan(left):
            comparison.num_skipped = 1
        else:
            counts = np.ones(1, np.bool_)
            values = np.array([left]), np.array([right])
            comparison.add(*values, counts, tolerance=tolerance, version=version, is_by_token=False)
        comparisons.append(comparison)
    return comparisons


def _place(item: Difference, order: list[str]) -> tuple[int, int]:
    trajectory = order.index(item.trajectory_id) if item.trajectory_id in order else len(order)
    return trajectory, -1 if item.position is None else item.position


def _named(pair: tuple[float | None, float | None]) -> dict[str, float | None]:
    return {"stored": pair[0], "recomputed": pair[1]}


def _float(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _number(value: np.floating[Any]) -> float | None:
    return float(value) if math.isfinite(value) else None
