"""`mentor-serve compare` refuses what it cannot run; what it runs: tests/experiments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cli_outcome import Outcome


def test_an_unknown_preset_is_refused(run: Callable[..., Outcome], tmp_path: Path) -> None:
    done = run("compare", "--out", str(tmp_path / "comparison"), "--preset", "huge")
    assert done.exit_code == 2
    assert "--preset huge: expected one of laptop, pretrained, smoke" in done.err
