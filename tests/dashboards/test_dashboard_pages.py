"""Each page on a store with a run, on an empty one, on a missing one and on one left behind."""

from __future__ import annotations

import json
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from seeded_store import RUN_ID, SeededRun, empty_store, run_row, write_rows
from streamlit.testing.v1 import AppTest

from mentor_serve.store import models
from mentor_serve.types import TokenSource

PAGES = ("overview", "guidance", "learner", "trajectories")
"""Of one run, which is chosen in the sidebar."""
ALL_PAGES = (*PAGES, "experiments")
APP = Path(__file__).parents[2] / "dashboards" / "app.py"


def open_page(name: str, **query: str) -> AppTest:
    """Run one page's body; AppTest itself cannot cross pages."""
    script = f"from mentor_dashboard.pages import {name}\n{name}.page()\n"
    app = AppTest.from_string(script, default_timeout=60)
    for key, value in query.items():
        app.query_params[key] = value
    app.run()
    assert not app.exception, app.exception
    return app


def chart_titles(app: AppTest) -> list[str]:
    return [json.loads(chart.proto.spec)["title"]["text"] for chart in app.get("vega_lite_chart")]


def metrics(app: AppTest) -> dict[str, str]:
    return {metric.label: metric.value for metric in app.metric}


@pytest.mark.parametrize("name", ALL_PAGES)
def test_a_missing_database_names_the_command_and_the_place(name: str, home: Path) -> None:
    app = open_page(name)
    assert "found none" in app.info[0].value
    assert "make run" in app.markdown[0].value
    assert str(home / "mentor.db") in app.caption[1].value
    assert not (home / "mentor.db").exists()


@pytest.mark.parametrize("name", ALL_PAGES)
@pytest.mark.usefixtures("empty_url")
def test_an_empty_store_waits_for_a_run(name: str) -> None:
    app = open_page(name)
    assert "no run yet" in app.info[0].value


@pytest.mark.parametrize("name", ALL_PAGES)
def test_a_store_that_is_behind_names_the_upgrade(name: str, home: Path) -> None:
    connection = sqlite3.connect(home / "mentor.db")
    connection.execute("CREATE TABLE runs (id TEXT)")
    connection.close()
    assert "mentor-serve db upgrade" in open_page(name).info[0].value


@pytest.mark.parametrize("name", PAGES)
def test_a_run_without_rollouts_draws_every_page(name: str, empty_url: str) -> None:
    write_rows(empty_url, {models.Run: [run_row(at=datetime.now(UTC))]})
    app = open_page(name)
    assert not app.warning
    assert chart_titles(app) == []
    assert app.selectbox[0].value == "default"


@pytest.mark.parametrize("name", PAGES)
def test_a_page_recovers_when_the_service_starts(
    name: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mentor_dashboard.source.CACHE_S", 0)
    app = open_page(name)
    assert app.info
    SeededRun(num_updates=3, groups_per_update=1).write(empty_store(home / "mentor.db"))
    app.run()
    assert not app.exception
    assert not app.info
    assert app.selectbox[0].value == "default"


@pytest.mark.usefixtures("seeded_url")
def test_overview_answers_in_numbers_and_curves() -> None:
    app = open_page("overview")
    shown = metrics(app)
    assert (shown["Step"], shown["Live version"]) == ("40", "40")
    assert shown["Pass rate"].endswith("%")
    assert app.metric[2].delta.startswith("+")
    assert shown["gamma (nats)"] == "1.16"
    assert chart_titles(app) == [
        "Pass rate of the policy alone",
        "Token entropy",
        "Mean reward of the rollouts trained on",
        "Response length",
        "Evaluations",
        "Groups collected per minute",
    ]
    assert list(app.dataframe[0].value["kind"]) == [
        "weights_swapped",
        "expert_unavailable",
        "run_started",
    ]
    assert not app.error


def test_overview_says_when_training_stands_still(home: Path) -> None:
    late = datetime.now(UTC) - timedelta(minutes=20)
    SeededRun(num_updates=3, groups_per_update=1, now=late).write(empty_store(home / "mentor.db"))
    app = open_page("overview")
    assert "The last update was 20 min ago" in app.error[0].value


@pytest.mark.usefixtures("seeded_url")
def test_guidance_shows_rates_and_replacements() -> None:
    app = open_page("guidance")
    assert chart_titles(app) == [
        "How often the expert is asked, and how often it replaces",
        "How much mixed rollouts count (alpha)",
        "The policy's uncertainty",
        "Mean weight of the expert",
    ]
    table = app.dataframe[0].value
    assert "'okay'" in set(table["the policy proposed"])
    assert list(table["times"]) == sorted(table["times"], reverse=True)


@pytest.mark.usefixtures("seeded_url")
def test_learner_shows_the_update_the_data_and_the_queue() -> None:
    titles = chart_titles(open_page("learner"))
    assert "Loss (Eq. 9)" in titles
    assert "Age of the data, last 100 updates" in titles
    assert "Groups waiting and lost" in titles
    assert len(titles) == 9


@pytest.mark.usefixtures("seeded_url")
def test_trajectories_are_filtered() -> None:
    app = open_page("trajectories")
    assert len(app.dataframe[0].value) == 50
    app.toggle(key="replaced").set_value(True).run()
    table = app.dataframe[0].value
    assert set(table["kind"]) == {"mixed"}
    assert (table["replaced"] > 0).all()
    assert not app.exception


@pytest.mark.usefixtures("seeded_url")
def test_a_chosen_trajectory_is_drawn_token_by_token() -> None:
    app = open_page("trajectories", trajectory="t-g-00020-00-05")
    assert app.subheader[0].value.startswith("Mixed response")
    html = response(app)
    tokens = html.count('title="')
    assert tokens > 20
    assert html.count("<span class=") == tokens + len(TokenSource)  # and the legend
    assert 'class="mentor-expert" title=' in html
    assert chart_titles(app) == ["Entropy along the response"]
    assert not app.info


@pytest.mark.usefixtures("seeded_url")
def test_proposals_can_be_hidden() -> None:
    app = open_page("trajectories", trajectory="t-g-00020-00-05")
    assert "<del>" in response(app)
    app.toggle(key="proposals").set_value(False).run()
    assert "<del>" not in response(app)


def response(app: AppTest) -> str:
    """The HTML of the chosen trajectory's response."""
    (html,) = (item.proto.body for item in app.get("html") if "mentor-text" in item.proto.body)
    return str(html)


@pytest.mark.usefixtures("seeded_url")
def test_an_unknown_trajectory_is_a_message() -> None:
    app = open_page("trajectories", trajectory="nothing")
    assert "not in this database" in app.warning[0].value


@pytest.mark.usefixtures("seeded_url")
def test_without_a_tokenizer_ids_are_shown_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MENTOR_SERVE_POLICY__MODEL", str(tmp_path / "gone"))
    app = open_page("trajectories", trajectory="t-g-00020-00-05")
    assert "Token ids instead of text" in app.info[0].value
    assert ">[" in response(app)


@pytest.mark.usefixtures("seeded_url")
def test_the_run_can_be_chosen(seeded_url: str) -> None:
    other = run_row("run-2", name="other", at=datetime(2026, 1, 1, tzinfo=UTC))
    write_rows(seeded_url, {models.Run: [other]})
    app = open_page("overview")
    assert app.selectbox[0].options == ["default", "other"]
    app.selectbox[0].select("other").run()
    assert metrics(app)["Step"] == "-"
    assert not app.exception


@pytest.mark.usefixtures("seeded_url")
def test_the_entry_point_opens_the_overview() -> None:
    app = AppTest.from_file(str(APP), default_timeout=60).run()
    assert not app.exception
    assert metrics(app)["Step"] == "40"


def test_a_wrong_environment_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MENTOR_SERVE_LEARNER__LEARNING_RATE", "fast")
    assert "learner.learning_rate" in open_page("overview").info[0].value


def test_the_seeded_run_is_what_the_tests_expect(seeded_url: str) -> None:
    path = seeded_url.removeprefix("sqlite:///")
    connection = sqlite3.connect(path)
    counted = connection.execute("SELECT COUNT(*) FROM updates WHERE run_id = ?", (RUN_ID,))
    assert counted.fetchone() == (40,)
    connection.close()
