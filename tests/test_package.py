from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mentor_serve

PACKAGE = Path(mentor_serve.__file__).parent


def loaded_by(modules: str) -> list[str]:
    """Which of the heavy libraries a process has after importing `modules`."""
    code = (
        f"import sys, {modules}\n"
        "print(*[m for m in ('ray', 'torch', 'transformers') if m in sys.modules])"
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()


def test_importing_the_package_loads_neither_torch_nor_ray() -> None:
    assert loaded_by("mentor_serve.types, mentor_serve.settings, mentor_serve.engines") == []


def test_commands_that_only_look_load_neither_torch_nor_ray() -> None:
    """They take seconds to import, on a machine that the service keeps busy."""
    reports = "mentor_serve.reports.rollouts, mentor_serve.reports.status"
    assert loaded_by(f"{reports}, mentor_serve.reports.weights, mentor_serve.cli.application") == []


def test_comparisons_evaluations_and_replays_need_no_ray() -> None:
    reports = "mentor_serve.reports.comparison, mentor_serve.reports.evaluation"
    assert loaded_by(f"{reports}, mentor_serve.reports.replay") == ["torch", "transformers"]


def test_no_module_is_too_long() -> None:
    lengths = {
        path.relative_to(PACKAGE): len(path.read_text(encoding="utf-8").splitlines())
        for path in PACKAGE.rglob("*.py")
    }
    assert {path: n for path, n in lengths.items() if n > 500} == {}
