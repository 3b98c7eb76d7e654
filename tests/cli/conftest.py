"""The real command line in this process, on a state directory of the test's own."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_outcome import Outcome
from trained_run import train

from mentor_serve import cli


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "home"
    monkeypatch.setenv("MENTOR_SERVE_HOME", str(path))
    return path


@pytest.fixture
def run(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    def call(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["mentor-serve", *arguments])
        capsys.readouterr()  # what fixtures printed is none of the command's
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return Outcome(int(stopped.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def trained_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state directory with a run of three updates."""
    path = tmp_path_factory.mktemp("trained") / "home"
    train(path)
    return path


@pytest.fixture
def trained(home: Path, trained_home: Path) -> Path:
    """A copy of it that the test may change."""
    shutil.copytree(trained_home, home)
    return home
