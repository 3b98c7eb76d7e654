"""The experiments page: on a comparison, on runs of a service, and on runs without results."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
import streamlit as st
from seeded_comparison import main_names, write_comparison
from seeded_store import SeededRun, empty_store, run_row, write_rows
from streamlit.testing.v1 import AppTest

from mentor_serve.experiments.names import METHOD_COLOURS
from mentor_serve.store import models

TITLES = [
    "Greedy accuracy, in_domain (validation)",
    "Response length",
    "Token entropy of rollouts",
    "Reward of on-policy rollouts",
    "Responses with a word (Figure 3)",
    "pass@k over k, in_domain (Figure 4)",
    "pass@8 by problems (Figure 4)",
]
ABLATIONS = ["ablation-quantile_80-seed0", "ablation-quantile_80-seed1"]
RATES = [f"sweep-{arm}-lr{rate}-seed100" for arm in ("luffy", "mentor") for rate in (1e-4, 2e-4)]


@pytest.fixture(scope="module")
def comparison_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("comparison") / "mentor.db"
    url = empty_store(path)
    write_comparison(url, RATES, suites=["in_domain:validation"])
    write_comparison(url, main_names())
    write_comparison(url, ABLATIONS, suites=["in_domain:test"])
    return path


@pytest.fixture
def comparison(home: Path, comparison_file: Path) -> str:
    """A finished comparison: four methods, two seeds, an ablation and two learning rates."""
    (home / "mentor.db").write_bytes(comparison_file.read_bytes())
    return f"sqlite:///{home / 'mentor.db'}"


def open_page(**query: str | list[str]) -> AppTest:
    script = "from mentor_dashboard.pages import experiments\nexperiments.page()\n"
    app = AppTest.from_string(script, default_timeout=60)
    for key, value in query.items():
        app.query_params[key] = value
    return checked(app.run())


def checked(app: AppTest) -> AppTest:
    assert not app.exception, app.exception
    assert not app.warning
    return app


def specs(app: AppTest) -> dict[str, dict]:
    found = [json.loads(chart.proto.spec) for chart in app.get("vega_lite_chart")]
    return {spec["title"]["text"]: spec for spec in found}


def legend(app: AppTest) -> str:
    return next(item.proto.body for item in app.get("html") if "mentor-legend" in item.proto.body)


def colours(spec: dict) -> dict[str, str]:
    scale = spec["layer"][0]["encoding"]["color"]["scale"]
    return dict(zip(scale["domain"], scale["range"], strict=True))


@pytest.mark.usefixtures("comparison")
def test_a_comparison_opens_with_its_methods() -> None:
    app = open_page()
    assert app.multiselect[0].value == sorted(main_names())
    assert list(specs(app)) == TITLES
    table = app.dataframe[0].value
    assert list(table["series"]) == ["base", "On-policy RL", "LUFFY", "QuestA", "MENTOR", "expert"]
    assert list(table["runs"]) == [1, 2, 2, 2, 2, 1]
    assert list(table["updates"]) == [0, 10, 10, 10, 10, 0]
    # The wait before the first update was for an evaluation.
    assert list(table["s an update"])[1] == 1.25
    assert {"greedy accuracy", "avg@8", "pass@8"} <= set(table.columns)
    assert list(table["greedy accuracy"])[-1] == pytest.approx(0.99)
    assert legend(app).count("2 runs") == 4
    assert colours(specs(app)[TITLES[0]])["MENTOR"] == METHOD_COLOURS["mentor"]
    assert "not which problems were drawn" in app.caption[-1].value


@pytest.mark.usefixtures("comparison")
def test_words_and_pass_rates_say_what_they_are_of() -> None:
    drawn = specs(open_page())
    words = drawn["Responses with a word (Figure 3)"]
    assert words["title"]["subtitle"] == "in_domain, temperature 0.6; the axis is a square root"
    assert words["layer"][0]["encoding"]["x"]["scale"]["domain"] == ["check", "wait"]
    bars = drawn["pass@8 by problems (Figure 4)"]
    assert bars["layer"][0]["encoding"]["x"]["scale"]["domain"] == ["in_domain", "harder_8"]


@pytest.mark.usefixtures("comparison")
def test_other_problems_can_be_chosen() -> None:
    app = open_page()
    before = app.dataframe[0].value["greedy accuracy"]
    (control,) = (item for item in app.segmented_control if item.key == "suite")
    app = checked(control.set_value("harder_8:test").run())
    assert "pass@k over k, harder_8 (Figure 4)" in specs(app)
    assert (app.dataframe[0].value["greedy accuracy"] < before).all()


@pytest.mark.usefixtures("comparison")
def test_one_click_shows_ablations_beside_mentor() -> None:
    app = checked(open_page().button(key="choose-Ablations").click().run())
    assert app.multiselect[0].value == [*ABLATIONS, "main-mentor-seed0", "main-mentor-seed1"]
    table = app.dataframe[0].value
    assert list(table["series"]) == ["MENTOR", "p = 0.8"]
    assert table["pass@8"].notna().all()
    assert app.query_params["runs"] == app.multiselect[0].value


@pytest.mark.usefixtures("comparison")
def test_one_click_shows_learning_rates_on_validation_problems() -> None:
    app = checked(open_page().button(key="choose-Learning rates").click().run())
    labels = list(app.dataframe[0].value["series"])
    assert labels[:2] == ["LUFFY, lr 0.0001", "LUFFY, lr 0.0002"]
    assert "pass@k over k, in_domain (validation) (Figure 4)" in specs(app)


@pytest.mark.usefixtures("comparison")
def test_a_link_brings_its_runs() -> None:
    app = open_page(runs=["main-luffy-seed0", "main-luffy-seed1", "main-base-seed0", "gone"])
    assert list(app.dataframe[0].value["series"]) == ["base", "LUFFY"]
    assert list(app.dataframe[0].value["runs"]) == [1, 2]


@pytest.mark.usefixtures("comparison")
def test_no_run_is_a_sentence() -> None:
    app = open_page().multiselect[0].set_value([]).run()
    assert "No run is chosen" in app.info[0].value
    assert specs(app) == {}


def test_a_selection_that_nobody_made_follows_the_comparison(comparison: str) -> None:
    followed, chosen = open_page(), open_page()
    chosen.multiselect[0].set_value(["main-base-seed0"]).run()
    write_comparison(comparison, ["main-mentor-seed2"])
    st.cache_data.clear()  # in place of waiting
    assert "main-mentor-seed2" in followed.run().multiselect[0].value
    assert chosen.run().multiselect[0].value == ["main-base-seed0"]


def test_runs_of_a_service_are_compared_by_their_method(home: Path) -> None:
    url = empty_store(home / "mentor.db")
    write_comparison(url, ["my-luffy-run", "my-mentor-run"], suites=["sums"])
    app = open_page()
    assert app.multiselect[0].value == ["my-luffy-run", "my-mentor-run"]
    assert [button.label for button in app.button] == ["Most recent"]
    drawn = specs(app)
    assert colours(drawn["pass@8 by problems (Figure 4)"]) == {
        "my-luffy-run": METHOD_COLOURS["luffy"],
        "my-mentor-run": METHOD_COLOURS["mentor"],
    }
    # One run each: no interval anywhere.
    kinds = {layer["mark"]["type"] for spec in drawn.values() for layer in spec["layer"]}
    assert kinds == {"line", "circle", "bar"}


@pytest.mark.usefixtures("seeded_url")
def test_a_run_without_greedy_evaluations_has_the_rest() -> None:
    app = open_page()
    assert "Response length" in specs(app)
    captions = [caption.value for caption in app.caption]
    assert any("Greedy accuracy: no evaluation of a version yet" in text for text in captions)
    assert any("Words: no response of an evaluation" in text for text in captions)


def test_a_run_without_anything_says_what_is_missing(empty_url: str) -> None:
    write_rows(empty_url, {models.Run: [run_row(at=datetime.now(UTC))]})
    app = open_page()
    assert specs(app) == {}
    captions = " ".join(caption.value for caption in app.caption)
    for start in ("Greedy accuracy:", "Response length:", "Words: no evaluation yet", "pass@k:"):
        assert start in captions
    assert list(app.dataframe[0].value["updates"]) == [0]


def test_the_page_recovers_when_the_service_starts(home: Path) -> None:
    app = open_page()
    assert "found none" in app.info[0].value
    SeededRun(num_updates=3, groups_per_update=1).write(empty_store(home / "mentor.db"))
    app = checked(app.run())
    assert app.multiselect[0].value == ["default"]
