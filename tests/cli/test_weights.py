"""`mentor-serve weights` and `export` on a run that was really trained, without a service."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_outcome import Outcome
from trained_run import NUM_STEPS, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from mentor_serve.learner.guards import DirectoryLock
from mentor_serve.reports import weights
from mentor_serve.settings import load_settings
from mentor_serve.weights import read_snapshot, snapshot_path
from mentor_serve.weights.snapshots import verify_file
from tests.ports import free_port


@pytest.fixture(autouse=True)
def nothing_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """No service of the machine's own answers at the default port."""
    monkeypatch.setenv("MENTOR_SERVE_GATEWAY__PORT", str(free_port()))


def weights_of(version: int) -> dict[str, torch.Tensor]:
    path = snapshot_path(load_settings().weights_dir, version)
    return dict(read_snapshot(path).state_dict or {})


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def damage(version: int) -> None:
    file = snapshot_path(load_settings().weights_dir, version) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def listed(run: Callable[..., Outcome], *flags: str) -> dict[int, dict[str, Any]]:
    return {row["version"]: row for row in json.loads(run("weights", "list", "--json", *flags).out)}


def query(home: Path, sql: str) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(home / "mentor.db")
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def test_versions_are_listed_newest_first(run: Callable[..., Outcome], trained: Path) -> None:
    rows = listed(run)
    assert list(rows) == [3, 2, 1, 0]
    assert [row["parent_version"] for row in rows.values()] == [2, 1, 0, None]
    assert [row["is_live"] for row in rows.values()] == [True, False, False, False]
    assert all(row["is_kept"] and row["num_bytes"] > 10**6 for row in rows.values())
    assert all(row["verified"] is None for row in rows.values())
    text = run("weights", "list").out
    assert "live" in text
    assert rows[3]["sha256"][:12] in text


def test_verify_finds_a_damaged_snapshot(run: Callable[..., Outcome], trained: Path) -> None:
    assert all(row["verified"] for row in listed(run, "--verify").values())
    damage(1)
    outcome = run("weights", "list", "--verify")
    assert outcome.exit_code == 1
    assert "damaged" in outcome.out
    verified = {version: row["verified"] for version, row in listed(run, "--verify").items()}
    assert verified == {3: True, 2: True, 1: False, 0: True}
    # Without --verify nothing is read, and nothing is claimed.
    assert run("weights", "list").exit_code == 0


def test_a_snapshot_that_is_pruned_while_it_is_read_is_not_damaged(
    run: Callable[..., Outcome], trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pruned(file: Path, sha256: str) -> None:
        if file.parent.name == "v000000":
            shutil.rmtree(file.parent)
            file.stat()
        verify_file(file, sha256)

    monkeypatch.setattr(weights, "verify_file", pruned)
    rows = listed(run, "--verify")
    assert [row["is_kept"] for row in rows.values()] == [True, True, True, False]
    assert [row["verified"] for row in rows.values()] == [True, True, True, None]
    assert rows[0]["problem"] is None


def test_a_rollback_makes_old_weights_the_newest_version_and_keeps_history(
    run: Callable[..., Outcome], trained: Path
) -> None:
    outcome = run("weights", "rollback", "1", "--json")
    assert outcome.exit_code == 0, outcome.err
    record = json.loads(outcome.out)
    assert (record["version"], record["parent_version"], record["step"]) == (4, 1, NUM_STEPS)
    rows = listed(run)
    assert list(rows) == [4, 3, 2, 1, 0]
    assert [version for version, row in rows.items() if row["is_live"]] == [4]
    assert same(weights_of(4), weights_of(1))
    assert not same(weights_of(4), weights_of(3))
    assert query(trained, "select count(*) from updates") == [(NUM_STEPS,)]
    assert query(trained, "select kind from events where kind = 'rolled_back'")


def test_training_goes_on_from_a_rollback(run: Callable[..., Outcome], trained: Path) -> None:
    assert run("weights", "rollback", "0").exit_code == 0
    train(trained, num_steps=NUM_STEPS + 1)
    rows = listed(run)
    assert rows[5]["parent_version"] == 4
    assert rows[5]["step"] == NUM_STEPS + 1
    assert not same(weights_of(5), weights_of(0))


def test_a_rollback_while_a_learner_runs_elsewhere_is_refused(
    run: Callable[..., Outcome], trained: Path
) -> None:
    lock = DirectoryLock(load_settings().checkpoints_dir)
    lock.acquire(timeout_s=0)
    try:
        outcome = run("weights", "rollback", "1")
    finally:
        lock.release()
    assert outcome.exit_code == 1
    assert "expected to be the only learner" in outcome.err
    assert list(listed(run)) == [3, 2, 1, 0]


def test_a_damaged_or_unknown_version_cannot_be_rolled_back_to(
    run: Callable[..., Outcome], trained: Path
) -> None:
    damage(1)
    outcome = run("weights", "rollback", "1")
    assert (outcome.exit_code, "damaged" in outcome.err) == (1, True)
    outcome = run("weights", "rollback", "9")
    assert (outcome.exit_code, "expected a version of this run" in outcome.err) == (2, True)
    assert list(listed(run)) == [3, 2, 1, 0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_loads_anywhere(
    run: Callable[..., Outcome], trained: Path, tmp_path: Path, dtype: str
) -> None:
    target = tmp_path / "deep" / "model"
    outcome = run("export", "2", "--to", str(target), "--dtype", dtype, "--json")
    assert outcome.exit_code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["version"] == 2
    model = AutoModelForCausalLM.from_pretrained(target)
    assert str(model.dtype) == f"torch.{dtype}"
    expected = weights_of(2)
    own = model.state_dict()
    assert all(torch.equal(own[name], value.to(model.dtype)) for name, value in expected.items())
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.decode(tokenizer.encode("1 + 2 =")) == "1 + 2 ="
    assert (target / "generation_config.json").is_file()
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],
        cwd=target,
        capture_output=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout
    names = {path.name for path in target.iterdir()} - {"SHA256SUMS"}
    assert set(report["files"]) == names


def test_the_model_card_says_where_the_weights_come_from(
    run: Callable[..., Outcome], trained: Path, tmp_path: Path
) -> None:
    assert run("export", "latest", "--to", str(tmp_path / "m")).exit_code == 0
    card = (tmp_path / "m" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert listed(run)[3]["sha256"] in card
    assert "| policy version | 3 |" in card
    settings = card.split("```json\n")[1].split("```")[0]
    assert json.loads(settings)["learner"]["learning_rate"] == 1e-3


def test_an_export_appears_whole_or_not_at_all(
    run: Callable[..., Outcome], trained: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out" / "model"
    damage(2)
    outcome = run("export", "2", "--to", str(target))
    assert (outcome.exit_code, "damaged" in outcome.err) == (1, True)
    # Fails after the weights were written: without a tokenizer the directory would be incomplete.
    (snapshot_path(load_settings().weights_dir, 1) / "tokenizer.json").write_text("{")
    outcome = run("export", "1", "--to", str(target))
    assert outcome.exit_code == 2
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("9", "--to", "new"), "expected a version of this run"),
        (("newest", "--to", "new"), "expected a version or `latest`"),
        (("3", "--to", "."), "expected a directory that does not exist yet"),
    ],
)
def test_wrong_usage_of_export(
    run: Callable[..., Outcome], trained: Path, arguments: tuple[str, ...], message: str
) -> None:
    outcome = run("export", *arguments)
    assert outcome.exit_code == 2
    assert message in outcome.err


def test_a_version_that_is_not_kept_is_named(
    run: Callable[..., Outcome], trained: Path, tmp_path: Path
) -> None:
    path = snapshot_path(load_settings().weights_dir, 1)
    path.rename(tmp_path / "moved")
    assert listed(run)[1]["is_kept"] is False
    outcome = run("export", "1", "--to", str(tmp_path / "new"))
    assert outcome.exit_code == 1
    assert "version 1" in outcome.err
    assert "weights list" in outcome.err
