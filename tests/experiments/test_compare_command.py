"""`mentor-serve compare --preset smoke` as a user runs it: real processes, real training."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mentor_serve.experiments.presets import PRESETS
from mentor_serve.experiments.tables import all_tables

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SMOKE = PRESETS["smoke"]


def compare(home: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mentor_serve.cli", "compare", "--out", str(home), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("comparison")


@pytest.fixture(scope="module")
def results(home: Path) -> dict[str, Any]:
    done = compare(home, "--jobs", "2", "--json", "--figures", str(home / "figures"))
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_every_method_learns_and_directions_are_those_of_the_paper(results: dict[str, Any]):
    in_domain = results["accuracy"]["in_domain"]
    behaviour, costs = results["behaviour"], results["costs"]

    def average(arm: str) -> float:
        return float(in_domain[arm]["avg@8"]["value"])

    # Ten updates of eight problems: who has an expert is ahead; on-policy RL needs more of them.
    assert average("expert") > 0.9 > average("base")
    for method in ("luffy", "mentor"):
        assert average(method) > average("base") + 0.02, method
        solved = in_domain[method]["pass@8"]["value"]
        assert solved > in_domain["base"]["pass@8"]["value"] + 0.05, method
    # ... and the expert's tokens keep the policy from becoming sure of what it does already.
    assert average("mentor") > average("on_policy") + 0.05
    entropies = {arm: of_arm["mean_entropy"]["value"] for arm, of_arm in behaviour.items()}
    assert entropies["mentor"] > 1.5 * entropies["on_policy"]
    # The expert says "verify" often, the policy hardly ever.
    assert behaviour["expert"]["word_share:verify"]["value"] > 0.05
    assert behaviour["base"]["word_share:verify"]["value"] < 0.03
    # Who asks the expert, and how much: never, at uncertain tokens, for whole solutions.
    tokens = {arm: cost["expert_tokens_per_token"]["value"] for arm, cost in costs.items()}
    assert tokens["on_policy"] == 0
    assert tokens["mentor"] > 0
    assert tokens["luffy"] > 0
    # The unselective gate asks as often, on average.
    weights = {arm: row["mean_weight"]["value"] for arm, row in results["ablations"].items()}
    assert weights["unselective"] == pytest.approx(weights["mentor"], rel=0.6)


def test_everything_is_in_the_database_too(home: Path, results: dict[str, Any]):
    connection = sqlite3.connect(home / "mentor.db")
    (num_runs,) = connection.execute("SELECT count(*) FROM runs").fetchone()
    updates = connection.execute(
        "SELECT count(*), sum(mean_reward_on_policy IS NOT NULL) FROM updates"
    ).fetchone()
    greedy = connection.execute(
        "SELECT e.value FROM evaluations e JOIN runs r ON r.id = e.run_id "
        "WHERE r.name = 'main-mentor-seed0' AND e.suite = 'in_domain:test' "
        "AND e.metric = 'greedy_pass_at_k'"
    ).fetchall()
    connection.close()
    num_trained = len(SMOKE.methods) * len(SMOKE.seeds) + len(SMOKE.ablations)
    assert num_runs == num_trained + 2
    assert updates == (num_trained * SMOKE.num_updates,) * 2
    by_seed = results["accuracy"]["in_domain"]["mentor"]["pass@1 (greedy)"]["by_seed"]
    assert greedy == [(pytest.approx(by_seed[0], abs=1e-3),)]


def test_figures_and_tables_are_written(home: Path, results: dict[str, Any]):
    tables = (home / "results.md").read_text(encoding="utf-8")
    assert all(table in tables for table in all_tables(results).values())
    names = {path.name for path in (home / "figures").glob("*.svg")}
    assert names == {
        "figure-2-curves.svg",
        "figure-3-words.svg",
        "figure-4-pass.svg",
        "pass-at-k.svg",
    }


def test_the_same_command_runs_nothing_again(home: Path, results: dict[str, Any]):
    logs = {path: path.stat().st_mtime_ns for path in (home / "trials").iterdir()}
    done = compare(home, "--jobs", "1", "--json")
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    for name in ("accuracy", "paired", "behaviour", "curves", "costs", "ablations"):
        assert again[name] == results[name], name
    assert logs == {path: path.stat().st_mtime_ns for path in (home / "trials").iterdir()}


def test_another_comparison_in_the_same_directory_is_refused(home: Path, results: dict[str, Any]):
    done = compare(home, "--seeds", "1")
    assert done.returncode == 2
    assert "holds a comparison of another preset or other settings" in done.stderr
