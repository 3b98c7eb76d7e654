"""Processes that start together share one state directory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mentor_serve.actors.runtime import check_state_directory
from mentor_serve.settings import load_settings


def test_processes_that_start_together_do_not_disturb_each_other(tmp_path: Path) -> None:
    settings = load_settings((), {"home": str(tmp_path / "home")})
    with ThreadPoolExecutor(8) as pool:
        checks = [pool.submit(check_state_directory, settings) for _ in range(2000)]
    assert [check.result() for check in checks] == [None] * 2000
    assert not [path for path in (tmp_path / "home").iterdir() if path.is_file()]
