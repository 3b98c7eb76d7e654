"""Timing in rounds: every contender runs once a round, in turn, and medians are compared.

Machines drift (heat, neighbours), so contenders are never timed one after the other as blocks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from benchmarks.machine import synchronize

Result = TypeVar("Result")


@dataclass(slots=True)
class Timings(Generic[Result]):
    """The timed rounds of one contender, in order."""

    seconds: list[float] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)

    def median_rate(self, size_of: Callable[[Result], int]) -> float:
        """Median over rounds of size per second, for instance tokens per second."""
        return statistics.median(self.rates(size_of))

    def rates(self, size_of: Callable[[Result], int]) -> list[float]:
        """Size per second of each round."""
        return [size_of(r) / s for r, s in zip(self.results, self.seconds, strict=True)]


def run_rounds(
    contenders: Mapping[str, Callable[[int], Result]],
    *,
    rounds: int,
    device: str = "cpu",
    on_round: Callable[[int], None] | None = None,
) -> dict[str, Timings[Result]]:
    """Run every contender in turn, `rounds` times and once before that to warm up, untimed.

    A contender gets the round's number as its seed: 0 warms up, 1 .. `rounds` are kept.
    """
    timings: dict[str, Timings[Result]] = {name: Timings() for name in contenders}
    for number in range(rounds + 1):
        if on_round is not None:
            on_round(number)
        for name, contender in contenders.items():
            synchronize(device)
            started = time.perf_counter()
            result = contender(number)
            synchronize(device)
            elapsed = time.perf_counter() - started
            if number > 0:
                timings[name].seconds.append(elapsed)
                timings[name].results.append(result)
    return timings
