"""`mentor-serve eval`: numbers with intervals, on problems that training never sees, in SQL."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_outcome import Outcome

from mentor_serve.models.loading import load_model, load_tokenizer
from mentor_serve.models.reference import reference_path
from mentor_serve.settings import load_settings
from mentor_serve.store import TrajectoryStore, VersionRecord, upgrade
from mentor_serve.weights import SnapshotLabel, write_snapshot

SMALL = ("--num-problems", "4", "--num-samples", "2")


def rows_of(home: Path) -> list[dict[str, Any]]:
    connection = sqlite3.connect(home / "mentor.db")
    connection.row_factory = sqlite3.Row
    try:
        return [dict(row) for row in connection.execute("select * from evaluations order by id")]
    finally:
        connection.close()


@pytest.fixture
def version_2(home: Path) -> VersionRecord:
    """A run whose live and newest version 2 is the bundled expert, so that it differs from 0."""
    settings = load_settings()
    home.mkdir()
    upgrade(settings.database_url)
    path = reference_path("expert")
    model = load_model(path)
    snapshot = write_snapshot(
        settings.weights_dir,
        label=SnapshotLabel(version=2, step=2, alpha=1.0, gamma=0.5, parent_version=1),
        model=model,
        state_dict=model.state_dict(),
        tokenizer=load_tokenizer(path),
    )
    record = VersionRecord(
        version=2, step=2, alpha=1.0, gamma=0.5, sha256=snapshot.sha256, path=str(snapshot.path)
    )
    with TrajectoryStore(settings.database_url) as store:
        run_id = store.open_run(settings.run_name, {"kept": "as it is"})
        store.add_version(run_id, record)
        store.set_live(run_id, 2)
    return record


def test_a_version_gets_one_row_a_number_that_names_it(
    run: Callable[..., Outcome], home: Path, version_2: VersionRecord
) -> None:
    outcome = run("eval", "--version", "2", *SMALL, "--suite", "sums", "--json")
    assert outcome.exit_code == 0, outcome.err
    document = json.loads(outcome.out)
    rows = rows_of(home)
    assert len(rows) == len(document["measures"]) == len({(r["metric"], r["k"]) for r in rows})
    assert {(r["policy_version"], r["model"], r["suite"]) for r in rows} == {(2, "policy", "sums")}
    assert {r["evaluation_id"] for r in rows} == {document["evaluation_id"]}
    by_name = {(r["metric"], r["k"]): r for r in rows}
    # Version 2 has the expert's weights, which solve nearly all.
    assert by_name["greedy_pass_at_k", 1]["value"] >= 0.75
    for name in [("avg_at_k", 2), ("pass_at_k", 1), ("pass_at_k", 2), ("mean_tokens", None)]:
        row = by_name[name]
        assert row["value_low"] <= row["value"] <= row["value_high"], row
        assert (row["num_samples"], row["temperature"]) == (2, 0.6)
    connection = sqlite3.connect(home / "mentor.db")
    assert connection.execute("select config_json from runs").fetchall() == [
        ('{"kept": "as it is"}',)
    ]
    connection.close()


@pytest.mark.parametrize("name", ["latest", "live", "policy@2"])
def test_a_version_has_several_names(
    run: Callable[..., Outcome], version_2: VersionRecord, name: str
) -> None:
    outcome = run("eval", name, "--num-problems", "2", "--num-samples", "0", "--json")
    assert outcome.exit_code == 0, outcome.err
    assert json.loads(outcome.out)["policy_version"] == 2


def test_the_same_seed_gives_the_same_numbers(run: Callable[..., Outcome]) -> None:
    policy = str(reference_path("policy"))

    def measured(seed: int) -> Any:
        # Hot enough that two seeds cannot agree by chance: the bundled policy is sure of its words.
        options = ("--temperature", "2", "--no-greedy", "--json")
        arguments = ("eval", policy, *SMALL, "--seed", str(seed), *options)
        return json.loads(run(*arguments).out)["measures"]

    assert measured(1) == measured(1)
    assert measured(1) != measured(2)


def test_a_directory_and_the_expert_are_stored_without_a_version(
    run: Callable[..., Outcome], home: Path
) -> None:
    directory = str(reference_path("policy"))
    for model in (directory, "expert"):
        outcome = run("eval", model, "--num-problems", "2", "--num-samples", "0")
        assert outcome.exit_code == 0, outcome.err
        assert "95 % interval" in outcome.out
    found = {(row["policy_version"], row["model"]) for row in rows_of(home)}
    assert found == {(None, directory), (None, "embedded:expert")}


def test_words_and_ks_are_settings(run: Callable[..., Outcome]) -> None:
    chosen = ("--set", 'evaluation.words=["zzz"]', "--set", "evaluation.ks=[2]")
    outcome = run("eval", str(reference_path("policy")), *SMALL, *chosen, "--json")
    names = [(m["metric"], m["k"]) for m in json.loads(outcome.out)["measures"]]
    assert [name for name in names if ":" in name[0]] == [("word_share:zzz", None)]
    assert [k for metric, k in names if metric == "pass_at_k"] == [2]


def test_a_snapshot_that_is_not_what_the_store_says_is_not_evaluated(
    run: Callable[..., Outcome], home: Path, version_2: VersionRecord
) -> None:
    weights = Path(str(version_2.path)) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    outcome = run("eval", "--version", "2", *SMALL)
    assert outcome.exit_code == 1
    assert "damaged" in outcome.err
    assert rows_of(home) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--version", "7"), "policy@7: expected a version of this run"),
        (("--version", "x"), "expected a number or `latest`"),
        (("expert", "--version", "2"), "expected a model or --version, got both"),
        (("--num-samples", "0", "--no-greedy"), "greedy responses, sampled ones or both"),
        (("/nowhere/model",), "no such file or directory"),
    ],
)
def test_wrong_usage(
    run: Callable[..., Outcome], version_2: VersionRecord, arguments: tuple[str, ...], message: str
) -> None:
    outcome = run("eval", *arguments)
    assert outcome.exit_code == 2
    assert message in outcome.err


def test_the_status_shows_the_newest_evaluation(
    run: Callable[..., Outcome], version_2: VersionRecord
) -> None:
    assert json.loads(run("status", "--json").out)["evaluation"] is None
    run("eval", "latest", *SMALL)
    assert json.loads(run("status", "--json").out)["evaluation"]["policy_version"] == 2
    assert "version 2 on 4 held-out problems" in " ".join(run("status").out.split())
