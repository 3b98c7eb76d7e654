"""The command line: bad input gets one clear line and the right exit code, and loses nothing."""

from __future__ import annotations

import json
import shutil
import socket
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_outcome import Outcome

from mentor_serve.models.reference import reference_path
from tests.ports import free_port


def up(run: Callable[..., Outcome], *settings: str) -> Outcome:
    """`mentor-serve up` that must fail before it starts any process."""
    # The default port may be in use; of settings given twice the last one counts.
    given = (f"gateway.port={free_port()}", *settings)
    flags = [flag for setting in given for flag in ("--set", setting)]
    outcome = run("up", "--no-dashboard", *flags)
    assert outcome.err.startswith("mentor-serve: ")
    assert "Traceback" not in outcome.err
    return outcome


def plain(text: str) -> str:
    return " ".join(text.split())


def test_help_of_every_command_says_what_it_does(run: Callable[..., Outcome]) -> None:
    for command in (["up"], ["status"], ["eval"], ["db", "upgrade"], ["db", "check"], ["doctor"]):
        outcome = run(*command, "--help")
        assert outcome.exit_code == 0
        assert len(outcome.out.splitlines()) > 8


def test_unknown_setting(run: Callable[..., Outcome]) -> None:
    outcome = up(run, "learner.lr=1")
    assert outcome.exit_code == 2
    assert "learner.lr: unknown setting" in plain(outcome.err)


def test_setting_without_value(run: Callable[..., Outcome]) -> None:
    outcome = up(run, "learner.seed")
    assert outcome.exit_code == 2
    assert "expected SECTION.KEY=VALUE" in plain(outcome.err)


def test_missing_model_directory(run: Callable[..., Outcome]) -> None:
    outcome = up(run, "policy.model=/nowhere/model")
    assert outcome.exit_code == 2
    assert "/nowhere/model" in plain(outcome.err)


def test_vocabulary_mismatch(run: Callable[..., Outcome], tmp_path: Path) -> None:
    other = tmp_path / "expert"
    shutil.copytree(reference_path("expert"), other)
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    (first, a), (second, b) = list(vocabulary.items())[-2:]
    vocabulary[first], vocabulary[second] = b, a
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    outcome = up(run, f"expert.model={other}")
    assert outcome.exit_code == 2
    assert "vocabular" in plain(outcome.err)


def test_state_directory_that_cannot_be_made(
    run: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MENTOR_SERVE_HOME", str(tmp_path / "file" / "home"))
    outcome = up(run)
    assert outcome.exit_code == 2
    assert "must be writable" in plain(outcome.err)


def test_port_in_use(run: Callable[..., Outcome]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        outcome = up(run, f"gateway.port={taken.getsockname()[1]}")
    assert outcome.exit_code == 2
    assert "should be a free port" in plain(outcome.err)


def test_malformed_task_file_names_the_line(run: Callable[..., Outcome], tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"prompt": "1+1", "answer": "2"}\n{"prompt": "1+1"}\n', encoding="utf-8")
    outcome = up(run, "tasks.source=jsonl", f"tasks.name={tasks}")
    assert outcome.exit_code == 2
    assert f"{tasks}:2" in outcome.err.replace("\n", "")


def test_database_of_a_newer_version_is_left_alone(run: Callable[..., Outcome], home: Path) -> None:
    assert run("db", "upgrade").exit_code == 0
    connection = sqlite3.connect(home / "mentor.db")
    connection.execute("update alembic_version set version_num = 'from_the_future'")
    connection.commit()
    connection.close()
    outcome = up(run)
    assert outcome.exit_code == 1
    assert "newer" in plain(outcome.err)


def test_database_upgrade_and_check(run: Callable[..., Outcome]) -> None:
    upgraded = run("db", "upgrade", "--json")
    assert upgraded.exit_code == 0
    assert json.loads(upgraded.out)["status"] == "ok"
    checked = run("db", "check", "--json")
    assert checked.exit_code == 0
    assert json.loads(checked.out)["ok"] is True


def test_status_without_a_database_says_how_to_start(run: Callable[..., Outcome]) -> None:
    outcome = run("status")
    assert outcome.exit_code == 2
    assert "mentor-serve up" in plain(outcome.err)


def test_configuration_is_shown_without_secrets(run: Callable[..., Outcome]) -> None:
    outcome = run(
        "config", "show", "--json", "--set", "store.url=postgresql+psycopg://u:hunter2@h/db"
    )
    tree = json.loads(outcome.out)
    assert tree["guidance"]["entropy_quantile"] == 0.95
    assert "hunter2" not in outcome.out


def test_shown_configuration_can_be_read_back(run: Callable[..., Outcome], tmp_path: Path) -> None:
    shown = run("config", "show", "--set", 'tasks.config={"min_terms": 3}').out
    file = tmp_path / "shown.toml"
    file.write_text(shown, encoding="utf-8")
    again = run("config", "show", "--config", str(file)).out
    assert again == shown
    assert "min_terms" in shown


def test_doctor_reports_each_check(run: Callable[..., Outcome]) -> None:
    outcome = run("doctor", "--json", "--set", "policy.model=/nowhere/model")
    checks = {check["name"]: check for check in json.loads(outcome.out)}
    assert outcome.exit_code == 1
    assert checks["models"]["status"] == "fail"
    assert checks["torch"]["status"] == "ok"
    assert checks["tasks"]["status"] == "ok"
