"""What `mentor-serve compare` does: all trials of a preset, side by side, then the results.

A comparison lives in one directory and is resumed there: complete trials are not run again, one
that was cut off goes on at its last update.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from mentor_serve import __version__
from mentor_serve.errors import ConfigError
from mentor_serve.experiments.presets import Preset
from mentor_serve.experiments.results import best_learning_rates, read_trials, summarise
from mentor_serve.experiments.tables import all_tables
from mentor_serve.experiments.trial import TrialPlan
from mentor_serve.reports.trials import BASE, EXPERT, Bench, run_trial

RESULTS = "results.json"
_POLL_S = 2.0

Progress = Callable[[int, int], None]


def compare(bench: Bench, *, jobs: int, on_progress: Progress | None = None) -> dict[str, Any]:
    """Run what is missing, then write `results.json` and `results.md` and return the former.

    Args:
        bench: preset, directory and settings.
        jobs: processes; each runs one trial at a time in one thread.
        on_progress: called with (updates made, updates of all trials).

    Raises:
        ConfigError: the directory holds another comparison.
        MentorError: a trial failed; the others of its stage were finished first.
    """
    preset = bench.preset
    _claim(bench)
    started = time.monotonic()
    sweep = sweep_plans(preset)
    # Two stages: the rates of the second are what the first one is for.
    total = preset.num_updates * (len(sweep) + len(main_plans(preset, {})))
    progress = _Progress(bench, total, on_progress)
    _run_all(bench, sweep, jobs, progress)
    rates = best_learning_rates(read_trials(bench.home / "trials"), preset)
    _run_all(bench, main_plans(preset, rates), jobs, progress)
    results = {
        **summarise(read_trials(bench.home / "trials"), preset),
        "version": __version__,
        "machine": _machine(jobs),
        "wall_s": round(time.monotonic() - started, 1),
    }
    _write(bench.home / RESULTS, json.dumps(results, indent=1) + "\n")
    _write(bench.home / "results.md", _markdown(results))
    return results


def sweep_plans(preset: Preset) -> list[TrialPlan]:
    """Every method at every learning rate."""
    return [
        TrialPlan(stage="sweep", arm=method, seed=seed, learning_rate=rate)
        for seed in preset.sweep_seeds
        for method in preset.methods
        for rate in preset.learning_rates
    ]


def main_plans(preset: Preset, rates: dict[str, float]) -> list[TrialPlan]:
    """Base, expert, and every method and ablation at its method's best rate."""
    plans = [TrialPlan(stage="main", arm=arm) for arm in (BASE, EXPERT)]
    plans += [
        TrialPlan(stage="main", arm=method, seed=seed, learning_rate=rates.get(method))
        for seed in preset.seeds
        for method in preset.methods
    ]
    plans += [
        TrialPlan(stage="ablation", arm=arm, seed=seed, learning_rate=rates.get("mentor"))
        for seed in preset.ablation_seeds
        for arm in preset.ablations
    ]
    return plans


class _Progress:
    """Counts updates by the lines of the logs: every process writes its own."""

    def __init__(self, bench: Bench, total: int, tell: Progress | None) -> None:
        self._bench, self._total, self._tell = bench, total, tell

    def report(self) -> None:
        if self._tell is None:
            return
        done = 0
        for path in (self._bench.home / "trials").glob("*.jsonl"):
            with path.open("rb") as file:
                done += sum(line.startswith(b'{"kind": "update"') for line in file)
        self._tell(done, self._total)


def _run_all(bench: Bench, plans: Sequence[TrialPlan], jobs: int, progress: _Progress) -> None:
    if jobs == 1:
        for plan in plans:
            run_trial(bench, plan)
            progress.report()
        return
    # Fresh processes: a fork of one with threads (torch) may hang.
    context = multiprocessing.get_context("spawn")
    parent = os.getpid()
    with ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_enter_worker, initargs=(parent,)
    ) as pool:
        pending = {pool.submit(run_trial, bench, plan) for plan in plans}
        try:
            while pending:
                done, pending = wait(pending, timeout=_POLL_S, return_when=FIRST_COMPLETED)
                progress.report()
                for future in done:
                    future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _enter_worker(parent: int) -> None:
    """Keep libraries' greetings off standard output (`--json`), and end with the parent."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    # A trial may be ended anywhere: it goes on from what is stored.
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    os._exit(1)


def _claim(bench: Bench) -> None:
    """Refuse a directory whose trials would not be comparable with ours."""
    bench.home.mkdir(parents=True, exist_ok=True)
    path = bench.home / "comparison.json"
    ours = json.loads(
        json.dumps(
            {
                "preset": repr(bench.preset),
                "settings": dict(bench.base),
                "config_files": [str(file.resolve()) for file in bench.config_files],
            },
            default=str,
        )
    )
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        if theirs != ours:
            raise ConfigError(
                f"{bench.home} holds a comparison of another preset or other settings; choose "
                "another --out, or delete it"
            )
        return
    _write(path, json.dumps(ours, indent=1) + "\n")


def _machine(jobs: int) -> dict[str, Any]:
    import torch

    return {
        "processor": _processor(),
        "num_cores": os.cpu_count(),
        "jobs": jobs,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        lines: Iterable[str] = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _markdown(results: dict[str, Any]) -> str:
    parts = [f"## {name}\n\n{table}\n" for name, table in all_tables(results).items()]
    return "\n".join(parts)


def _write(path: Path, text: str) -> None:
    staging = path.with_suffix(".partial")
    staging.write_text(text, encoding="utf-8")
    staging.replace(path)
