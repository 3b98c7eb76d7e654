"""What all pages share: run selector, pause switch, self-refresh, and words for a missing database.

A page hands its body to `live_page`, or to `live_selection` with widgets of its own that choose
what it is about. The body is drawn in a fragment that runs again by itself; when the database is
missing, behind or locked, the page says what to run and looks again every few seconds until it can
be read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import altair as alt
import streamlit as st

from mentor_dashboard.source import read, settings
from mentor_serve.errors import ConfigError, StoreError
from mentor_serve.store.stats import StatsReader

RETRY_S = 3.0
"""How often a page without a database looks again."""
INTERVALS_S = (2, 5, 15, 60)
RUN = "run"
"""Where the session and the address keep the name of the chosen run."""

_STYLE = "<style>.stMainBlockContainer { padding: 2.75rem 2.5rem 3rem; }</style>"
"""The charts matter more than Streamlit's six empty lines above them."""

Run = Mapping[str, Any]
Chosen = TypeVar("Chosen")


def live_page(title: str, body: Callable[[Run], None], *, intro: str) -> None:
    """Draw `body` for the run that is chosen in the sidebar, now and at every refresh."""
    live_selection(title, body, intro=intro, choose=_one_run)


def live_selection(
    title: str,
    body: Callable[[Chosen], None],
    *,
    intro: str,
    choose: Callable[[list[dict[str, Any]]], Chosen],
) -> None:
    """Draw `body` for what `choose` makes of the runs, now and at every refresh.

    `choose` draws its widgets and is called anew when they change or a run appears, not at every
    refresh.
    """
    st.html(_STYLE)
    st.header(title, anchor=False)
    st.caption(intro)
    try:
        runs = read(StatsReader.runs)
    except (StoreError, ConfigError):
        runs = []
    if not runs:
        _wait()
        return
    chosen = choose(runs)
    _live(chosen, body, every_s=_refresh_interval_s(), num_runs=len(runs))


def panel(chart: alt.Chart | None, *, empty: str) -> None:
    """A chart in a bordered cell, or a sentence that says when it will have something to show."""
    with st.container(border=True):
        if chart is None:
            st.caption(empty)
        else:
            st.altair_chart(chart, width="stretch")


def _one_run(runs: list[dict[str, Any]]) -> Run:
    names = [run["name"] for run in runs]
    if RUN in st.session_state:
        # Widgets of two pages are two: a value from a link is lost by the first change of pages
        # unless it is written down again.
        st.session_state[RUN] = st.session_state[RUN]
    name = st.sidebar.selectbox(
        "Run", names, key=RUN, bind="query-params", help="Most recently active first."
    )
    return runs[names.index(name)] if name in names else runs[0]


def _refresh_interval_s() -> float | None:
    with st.sidebar:
        live = st.toggle(
            "Refresh by itself",
            value=True,
            key="live",
            persist_state="session",
            help="Switch off to look at a moment in peace.",
        )
        interval_s = st.segmented_control(
            "Every",
            INTERVALS_S,
            default=INTERVALS_S[1],
            format_func=lambda seconds: f"{seconds} s",
            key="interval",
            persist_state="session",
            disabled=not live,
            required=True,
        )
    return float(interval_s or INTERVALS_S[1]) if live else None


def _live(
    chosen: Chosen, body: Callable[[Chosen], None], *, every_s: float | None, num_runs: int
) -> None:
    @st.fragment(run_every=every_s)
    def draw() -> None:
        try:
            if len(read(StatsReader.runs)) != num_runs:
                st.rerun()  # the selector lies outside this fragment
            body(chosen)
        except StoreError as error:
            st.warning(f"The trajectory store did not answer: {error}", icon=":material/database:")

    draw()


def _wait() -> None:
    """Say what is missing and how to get it; start over by itself once a run can be read."""

    @st.fragment(run_every=RETRY_S)
    def look_again() -> None:
        try:
            if read(StatsReader.runs):
                st.rerun()
            reason = "The trajectory store has no run yet."
        except (StoreError, ConfigError) as error:
            reason = f"The trajectory store cannot be read yet: {error}"
        st.info(reason, icon=":material/hourglass_empty:")
        st.markdown(
            "Start the service with `make run` (or `mentor-serve up`); this page will follow."
        )
        st.caption(_where())

    look_again()


def _where() -> str:
    try:
        reader = StatsReader(settings().database_url)
    except (StoreError, ConfigError):
        return "The database is chosen by `MENTOR_SERVE_HOME` or `MENTOR_SERVE_STORE__URL`."
    return (
        f"Looking at `{reader.location}`, chosen by `MENTOR_SERVE_HOME` or "
        "`MENTOR_SERVE_STORE__URL`."
    )
