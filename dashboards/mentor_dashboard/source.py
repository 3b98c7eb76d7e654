"""Where the pages get their rows: cached, read-only queries of the trajectory store.

`read(StatsReader.training_curve, run_id)` runs one query at most every `CACHE_S` seconds however
many browser tabs are open. Failures are not cached, so a page recovers as soon as the database
does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import streamlit as st

from mentor_serve.settings import Settings, load_settings
from mentor_serve.store.experiment_stats import ExperimentReader

CACHE_S = 1.5
"""Below the shortest refresh interval, so that every refresh shows new rows."""
TIMEOUT_S = 5.0
"""A page gives up on a locked database after this long and tries again at its next refresh."""

P = ParamSpec("P")
T = TypeVar("T")


def settings() -> Settings:
    """The service's settings as this process's environment has them."""
    return load_settings()


def read(
    query: Callable[Concatenate[ExperimentReader, P], T], *args: P.args, **parameters: P.kwargs
) -> T:
    """Run one of the methods of `StatsReader` or `ExperimentReader` on the configured database.

    Raises:
        StoreError: the database cannot be opened, is behind, or did not answer in time.
        ConfigError: the environment holds a setting that is not valid.
    """
    url = settings().database_url
    return cast(T, _cached(url, query.__name__, args, tuple(sorted(parameters.items()))))


@st.cache_data(ttl=CACHE_S, max_entries=256, show_spinner=False)
def _cached(url: str, query: str, args: Any, parameters: Any) -> Any:
    return getattr(_reader(url), query)(*args, **dict(parameters))


@st.cache_resource(max_entries=4, show_spinner=False)
def _reader(url: str) -> ExperimentReader:
    return ExperimentReader(url, timeout_s=TIMEOUT_S)
