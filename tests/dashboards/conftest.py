"""Every test of the dashboard reads a database of its own, named by the environment."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import streamlit as st
from seeded_store import SeededRun, empty_store, save_tokenizer, sqlite_url


@pytest.fixture(autouse=True)
def main_module() -> Iterator[None]:
    """AppTest leaves the page as `__main__`, which every process started later would run first."""
    before = sys.modules["__main__"]
    yield
    sys.modules["__main__"] = before


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory without a database; caches of an earlier test are dropped."""
    monkeypatch.setenv("MENTOR_SERVE_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    st.cache_data.clear()
    st.cache_resource.clear()
    return tmp_path / "home"


@pytest.fixture(scope="session")
def seeded_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("seeded") / "mentor.db"
    SeededRun().write(empty_store(path))
    return path


@pytest.fixture(scope="session")
def policy_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("policy") / "policy")


@pytest.fixture
def seeded_url(
    home: Path, seeded_file: Path, policy_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """A store with a run of forty updates, and the tokenizer of its policy."""
    shutil.copy(seeded_file, home / "mentor.db")
    monkeypatch.setenv("MENTOR_SERVE_POLICY__MODEL", str(policy_directory))
    return sqlite_url(home / "mentor.db")


@pytest.fixture
def empty_url(home: Path) -> str:
    """A migrated store in which nothing has happened."""
    return empty_store(home / "mentor.db")
