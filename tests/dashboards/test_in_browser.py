"""The dashboard as people see it: its own server, and a real Chromium that looks at every page."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ports import free_port
from seeded_comparison import main_names, write_comparison
from seeded_store import SeededRun, empty_store, save_tokenizer

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
CHARTS = "[data-testid=stVegaLiteChart] canvas, [data-testid=stVegaLiteChart] svg"
CHROMIUM = shutil.which("chromium")
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
PAGES = {
    "Overview": ("/", 4),
    "Guidance": ("/guidance", 4),
    "Learner": ("/learner", 4),
    "Trajectories": ("/trajectories", 0),
    "Experiments": ("/experiments", 7),
}
"""By title: where it is, and how many charts it shows at least."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A dashboard over a database with a service's run and a comparison."""
    home = tmp_path_factory.mktemp("home")
    url = empty_store(home / "mentor.db")
    write_comparison(url, main_names())
    SeededRun().write(url)
    policy = save_tokenizer(home / "policy")
    port = free_port()
    environment = {
        **os.environ,
        "MENTOR_SERVE_HOME": str(home),
        "MENTOR_SERVE_POLICY__MODEL": str(policy),
    }
    options = (
        f"--server.port={port} --server.address=127.0.0.1 --server.headless=true "
        "--browser.gatherUsageStats=false"
    )
    command = [sys.executable, "-m", "streamlit", "run", "dashboards/app.py", *options.split()]
    with (home / "streamlit.log").open("wb") as log:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.fixture(scope="module")
def browser(address: str) -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH (tests/install_chromium.sh installs it)")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS.split())
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """An empty tab, tall because charts are drawn when they come into view."""
    page = browser.new_page(viewport={"width": 1400, "height": 2400})
    page.set_default_timeout(60_000)
    yield page
    page.close()


def open_page(tab: Any, url: str) -> None:
    """Go there; a server that is starting refuses connections."""
    for _ in range(120):
        try:
            tab.goto(url)
            return
        except playwright.Error as error:
            if "ERR_CONNECTION_REFUSED" not in str(error):
                raise
            tab.wait_for_timeout(500)
    raise AssertionError(f"no dashboard at {url} after a minute")


@pytest.mark.parametrize("title", PAGES)
def test_every_page_draws_its_charts_without_an_error(address: str, tab: Any, title: str) -> None:
    path, num_charts = PAGES[title]
    open_page(tab, f"{address}{path}")
    tab.get_by_role("heading", name=title, exact=True).wait_for()
    if num_charts:
        tab.wait_for_function(f"document.querySelectorAll('{CHARTS}').length >= {num_charts}")
    else:
        tab.locator("[data-testid=stDataFrame] canvas").first.wait_for()
    assert tab.locator("[data-testid=stException]").count() == 0
    assert tab.locator("[data-testid=stAlertContentError]").count() == 0


def test_a_selection_of_runs_can_be_shared_as_a_link(address: str, browser: Any, tab: Any) -> None:
    open_page(tab, f"{address}/experiments")
    first, *others = sorted(main_names())
    tab.get_by_role("button", name=f"Remove {first}").click()
    tab.wait_for_url("**/experiments?*")
    tab.get_by_text(first, exact=True).wait_for(state="detached")
    other = browser.new_page()
    open_page(other, tab.url)
    chosen = other.locator("[data-testid=stMultiSelect] [data-tag]")
    chosen.first.wait_for()
    assert sorted(chosen.all_inner_texts()) == others
    other.close()


def test_a_run_chosen_by_a_link_stays_chosen_on_the_other_pages(address: str, tab: Any) -> None:
    run = sorted(main_names())[0]
    open_page(tab, f"{address}/?run={run}")
    selector = tab.get_by_test_id("stSidebar").get_by_role("combobox")
    for title in ("Learner", "Experiments", "Guidance", "Overview"):
        tab.get_by_role("link", name=title).click()
        tab.get_by_role("heading", name=title, exact=True).wait_for()
        if title != "Experiments":
            playwright.expect(selector).to_have_value(run)
