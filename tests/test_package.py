from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mentor_serve

PACKAGE = Path(mentor_serve.__file__).parent


def test_importing_the_package_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys, mentor_serve.types, mentor_serve.settings, mentor_serve.engines\n"
        "print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == "[]"


def test_commands_that_only_look_load_neither_torch_nor_ray() -> None:
    """They take seconds to import, of a machine that the service keeps busy."""
    code = (
        "import sys, mentor_serve.cli.application, mentor_serve.reports.rollouts\n"
        "import mentor_serve.reports.status, mentor_serve.reports.weights, mentor_serve.doctor\n"
        "print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == "[]"


def test_no_module_is_too_long() -> None:
    lengths = {
        path.relative_to(PACKAGE): len(path.read_text(encoding="utf-8").splitlines())
        for path in PACKAGE.rglob("*.py")
    }
    assert {path: n for path, n in lengths.items() if n > 500} == {}
