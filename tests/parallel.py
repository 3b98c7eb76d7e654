"""Which tests may run beside which, where `make test` runs them in two processes (pytest-xdist).

Tests of one file stay together, because they share fixtures. So do those that start the whole
service, and those that start a Ray cluster: two of a kind at a time would outgrow a small machine.
Both kinds come first, so that the rest fills the time that they wait.
"""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

_LONG_FOLDERS = ("tests/e2e", "tests/learner/backends")


def group_of(nodeid: str) -> str:
    """Tests of one group run one after the other, in one process."""
    path = nodeid.split("::", 1)[0]
    return next((folder for folder in _LONG_FOLDERS if path.startswith(f"{folder}/")), path)


class GroupScheduling(LoadScopeScheduling):
    """Gives the next group to the process that is free, in the order of the tests."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> GroupScheduling:
    """xdist asks for a scheduler once, in the process that hands out tests."""
    return GroupScheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long groups first; a plain `pytest` keeps the order of the files."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: group_of(item.nodeid) not in _LONG_FOLDERS)
