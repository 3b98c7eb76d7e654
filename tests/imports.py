"""Which heavy libraries a process of ours has imported."""

from __future__ import annotations

import os
import subprocess
import sys

_HEAVY = ("ray", "torch", "transformers")


def loaded_by(code: str) -> list[str]:
    """Those that a new process has after running `code`, which must not fail."""
    return subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys\n{code}\nprint(*[m for m in {_HEAVY} if m in sys.modules])",
        ],
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.split()
