from __future__ import annotations

from pathlib import Path

import mentor_serve
from tests.imports import loaded_by

PACKAGE = Path(mentor_serve.__file__).parent


def test_importing_the_package_loads_neither_torch_nor_ray() -> None:
    assert loaded_by("import mentor_serve.types, mentor_serve.settings, mentor_serve.engines") == []


def test_commands_that_only_look_load_neither_torch_nor_ray() -> None:
    """They take seconds to import, on a machine that the service keeps busy."""
    reports = "import mentor_serve.reports.rollouts, mentor_serve.reports.status"
    assert loaded_by(f"{reports}, mentor_serve.reports.weights, mentor_serve.cli.application") == []


def test_comparisons_evaluations_and_replays_need_no_ray() -> None:
    reports = "import mentor_serve.reports.comparison, mentor_serve.reports.evaluation"
    assert loaded_by(f"{reports}, mentor_serve.reports.replay") == ["torch", "transformers"]


def test_no_module_is_too_long() -> None:
    lengths = {
        path.relative_to(PACKAGE): len(path.read_text(encoding="utf-8").splitlines())
        for path in PACKAGE.rglob("*.py")
    }
    assert {path: n for path, n in lengths.items() if n > 500} == {}
