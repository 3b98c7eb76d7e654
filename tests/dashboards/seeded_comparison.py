"""Rows as `mentor-serve compare` leaves them: many runs, their updates, their evaluations."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from seeded_store import run_row, write_rows

from mentor_serve.store import models as tables

NOW = datetime(2026, 5, 4, 12, tzinfo=UTC)
SUITES = ("in_domain:test", "harder_8:test")
KS = (1, 2, 4, 8)
LEVELS = {"base": 0.0, "on_policy": 0.25, "luffy": 0.3, "questa": 0.02, "mentor": 0.32}
"""How much each method learns, as a share of problems solved."""
SPEECH = {"check": 0.004, "wait": 0.001, "however": 0.0}
"""Share of responses with a word; the expert says them fifty times as often."""

Rows = list[dict[str, Any]]


def write_comparison(
    url: str,
    names: Sequence[str],
    *,
    num_updates: int = 10,
    suites: Sequence[str] = SUITES,
    ks: Sequence[int] = KS,
) -> None:
    """Write a finished run under each name, the last one most recently active."""
    rows: dict[Any, Rows] = {
        table: [] for table in (tables.Run, tables.PolicyVersion, tables.Update, tables.Evaluation)
    }
    for index, name in enumerate(names):
        run = SeededTrial(name, at=NOW + timedelta(minutes=index), num_updates=num_updates)
        run.write(rows, suites=suites, ks=ks)
    write_rows(url, rows)


class SeededTrial:
    """One run; deterministic in its name, and a method's seeds lie around its level."""

    def __init__(self, name: str, *, at: datetime, num_updates: int) -> None:
        self.name = name
        self.at = at
        self.arm = next((arm for arm in (*LEVELS, "expert") if f"-{arm}-" in name), "mentor")
        self.is_trained = self.arm not in ("base", "expert")
        self.num_updates = num_updates if self.is_trained else 0
        self.random = random.Random(zlib.crc32(name.encode()))
        self.offset = self.random.gauss(0, 0.015) if self.is_trained else 0.0

    def write(self, rows: dict[Any, Rows], *, suites: Sequence[str], ks: Sequence[int]) -> None:
        run = run_row(self.name, name=self.name, at=self.at)
        run["config_json"] = {"guidance": {"method": self.arm}}
        rows[tables.Run].append(run)
        if self.is_trained:
            rows[tables.PolicyVersion] += [
                self._version(step) for step in range(self.num_updates + 1)
            ]
            rows[tables.Update] += [self._update(step) for step in range(1, self.num_updates + 1)]
            for step in range(0, self.num_updates + 1, max(1, self.num_updates // 5)):
                rows[tables.Evaluation] += self._evaluation("in_domain:curve", step, ks=())
        for suite in suites:
            rows[tables.Evaluation] += self._evaluation(suite, self.num_updates, ks=ks)

    def solved(self, step: int) -> float:
        if self.arm == "expert":
            return 0.99
        learnt = 1 - math.exp(-4 * step / max(1, self.num_updates))
        return 0.55 + learnt * LEVELS[self.arm] + self.offset

    def _version(self, step: int) -> dict[str, Any]:
        return {
            "run_id": self.name,
            "version": step,
            "step": step,
            "sha256": None,
            "path": None,
            "created_at": self.at,
            "is_live": step == self.num_updates,
            "parent_version": step - 1 if step else None,
            "alpha": 0.5,
            "gamma": 1.5,
        }

    def _update(self, step: int) -> dict[str, Any]:
        solved = self.solved(step)
        return {
            "run_id": self.name,
            "step": step,
            "policy_version": step,
            "num_groups": 16,
            "num_trajectories": 192,
            "num_tokens": 6000,
            "alpha": 0.5,
            "gamma": 1.5,
            "num_stale": 0,
            "entropy": 0.25 - 0.2 * solved + self.random.gauss(0, 0.005),
            "mean_response_tokens": 28 + 6 * solved + self.random.gauss(0, 0.4),
            "mean_reward_on_policy": min(1.0, solved + self.random.gauss(0, 0.03)),
            "step_time_s": 0.5,
            # The first update of a run waits for the evaluation before it.
            "wait_time_s": 20.0 if step == 1 else 0.75,
            "created_at": self.at + timedelta(seconds=step),
        }

    def _evaluation(self, suite: str, step: int, *, ks: Sequence[int]) -> Rows:
        solved = self.solved(step) * (0.8 if suite.startswith("harder") else 1.0)
        speech = 50 if self.arm == "expert" else 1
        numbers = [("greedy_pass_at_k", 1, solved)]
        if ks:
            numbers.append(("avg_at_k", max(ks), solved - 0.05))
            numbers += [("pass_at_k", k, min(1.0, solved + 0.03 * math.log2(k) - 0.05)) for k in ks]
        prefix = "word_share:" if ks else "greedy_word_share:"
        numbers += [(prefix + word, None, share * speech) for word, share in SPEECH.items()]
        evaluation_id = f"{self.name}/{suite}/{step:05d}"
        return [
            {
                "id": f"{step:05d}-{zlib.crc32(f'{evaluation_id}{metric}{k}'.encode()):08x}"
                f"-{self.name[-40:]}",
                "evaluation_id": evaluation_id[:64],
                "run_id": self.name,
                "policy_version": step if self.is_trained else None,
                "model": "policy" if self.is_trained else f"embedded:{self.arm}",
                "suite": suite,
                "metric": metric,
                "k": k,
                "value": value,
                "num_problems": 200,
                "num_samples": 1 if metric.startswith("greedy") else max(ks),
                "temperature": 0.0 if metric.startswith("greedy") else 0.6,
                "created_at": self.at,
            }
            for metric, k, value in numbers
        ]


METHODS = ("on_policy", "luffy", "questa", "mentor")


def main_names(seeds: Sequence[int] = (0, 1)) -> list[str]:
    """Runs of a comparison's main stage."""
    trained = [f"main-{arm}-seed{seed}" for seed in seeds for arm in METHODS]
    return ["main-base-seed0", "main-expert-seed0", *trained]
