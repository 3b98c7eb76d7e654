"""`mentor-serve db`: what it prints, how it ends, and that no password gets out."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_outcome import Outcome
from sqlalchemy import make_url

from mentor_serve.store import TrajectoryStore
from mentor_serve.store import prune as prune_module

Run = Callable[..., Outcome]
PASSWORD = "correct-horse"


def plain(text: str) -> str:
    return " ".join(text.split())


def numbers(path: Path, query: str) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(path / "mentor.db")
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def change(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path / "mentor.db")
    connection.execute(statement)
    connection.commit()
    connection.close()


@pytest.fixture
def configured(url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty database of each kind, named by the environment."""
    monkeypatch.setenv("MENTOR_SERVE_STORE__URL", url)
    return url


# check


@pytest.mark.parametrize("flags", [(), ("--quick",)])
def test_a_real_run_is_sound(run: Run, trained: Path, flags: tuple[str, ...]) -> None:
    outcome = run("db", "check", "--json", *flags)
    report = json.loads(outcome.out)
    assert (outcome.exit_code, report["problems"], report["ok"]) == (0, [], True)
    assert run("db", "check", *flags).out.rstrip().endswith("sound")


def test_the_check_says_what_to_do_and_fails(run: Run, trained: Path) -> None:
    change(trained, "DELETE FROM updates WHERE step = 2")
    outcome = run("db", "check")
    assert outcome.exit_code == 1
    assert "2 consumed groups without the update that consumed them; nothing trains" in plain(
        outcome.out
    )
    assert json.loads(run("db", "check", "--json").out)["ok"] is False


def test_a_file_that_is_no_database_is_a_report(run: Run, home: Path) -> None:
    home.mkdir()
    (home / "mentor.db").write_bytes(b"no database at all, but long enough for one" * 100)
    outcome = run("db", "check", "--json")
    assert outcome.exit_code == 1
    assert "the database is damaged" in json.loads(outcome.out)["problems"][0]
    assert "Traceback" not in outcome.err


def test_a_check_without_a_database_names_the_command(run: Run, home: Path) -> None:
    outcome = run("db", "check")
    assert outcome.exit_code == 1
    assert "mentor-serve db upgrade" in plain(outcome.out)
    assert not (home / "mentor.db").exists()


@pytest.mark.usefixtures("configured")
def test_an_empty_database_is_sound_and_small(run: Run) -> None:
    assert run("db", "check").exit_code == 0
    report = json.loads(run("db", "stats", "--json").out)
    assert report["tables"]["trajectories"]["num_rows"] == 0
    assert report["num_bytes"] > 0
    assert report["rollouts"]["bytes_per_trajectory"] is None
    assert run("db", "stats").exit_code == 0
    pruned = json.loads(run("db", "prune", "--keep-days", "0", "--json").out)
    assert (pruned["num_groups"], pruned["is_dry"]) == (0, False)


# stats


def test_stats_of_a_real_run(run: Run, trained: Path) -> None:
    spool = trained / "spool" / "default" / "0"
    spool.mkdir(parents=True)
    (spool / "one.group").write_bytes(b"x" * 100)
    report = json.loads(run("db", "stats", "--json").out)
    ((num_tokens, num_rows),) = numbers(
        trained, "SELECT SUM(num_tokens), COUNT(*) FROM trajectories WHERE status = 'ok'"
    )
    assert report["tables"]["trajectories"]["num_rows"] == num_rows
    assert report["rollouts"]["num_tokens_with_arrays"] == num_tokens
    assert report["groups"]["consumed"] == report["rollouts"]["last_day"]["num_groups"] == 6
    assert report["spool"] == {"num_files": 1, "num_bytes": 100}
    assert report["runs"] == [{"name": "default", "num_groups": 6, "num_pruned_groups": 0}]
    shown = plain(run("db", "stats").out)
    assert "trajectory_tokens 36" in shown
    assert "spool 1 files, 100 bytes" in shown


# prune


def test_prune_needs_a_rule(run: Run, trained: Path) -> None:
    outcome = run("db", "prune")
    assert outcome.exit_code == 2
    assert "expected --keep-days, --keep-versions or both, got neither" in plain(outcome.err)
    outcome = run("db", "prune", "--keep-days", "1", "--dry-run", "--vacuum")
    assert outcome.exit_code == 2
    outcome = run("db", "prune", "--keep-days", "1", "--run", "nobody")
    assert outcome.exit_code == 2
    assert "a run named 'nobody', found ['default']" in plain(outcome.err)


def test_prune_says_what_it_would_delete_then_deletes_it(run: Run, trained: Path) -> None:
    dry = run("db", "prune", "--keep-versions", "1", "--what", "groups", "--dry-run")
    assert "would delete 6 groups and 0 served responses with 36 trajectories" in plain(dry.out)
    assert numbers(trained, "SELECT COUNT(*) FROM rollout_groups") == [(6,)]
    tokens = run("db", "prune", "--keep-versions", "1")
    assert "deleted the arrays of 36 responses" in plain(tokens.out)
    assert "--vacuum gives it back" in plain(tokens.out)
    assert numbers(trained, "SELECT COUNT(*) FROM trajectories") == [(36,)]
    done = run("db", "prune", "--keep-versions", "1", "--what", "groups", "--vacuum", "--json")
    document = json.loads(done.out)
    assert (document["num_groups"], document["num_token_rows"]) == (6, 0)
    sizes = document["file_bytes"]
    assert sizes["after"] == (trained / "mentor.db").stat().st_size < sizes["before"]
    assert numbers(trained, "SELECT num_pruned_groups FROM runs") == [(6,)]
    assert run("db", "check").exit_code == 0
    assert numbers(trained, "PRAGMA journal_mode") == [("wal",)]


def test_a_vacuum_waits_for_nobody(run: Run, trained: Path) -> None:
    """Beside a service it is refused before anything is deleted."""
    with TrajectoryStore(f"sqlite:///{trained / 'mentor.db'}") as service:
        assert service.find_run("default") is not None
        outcome = run("db", "prune", "--keep-days", "0", "--what", "groups", "--vacuum")
    assert outcome.exit_code == 1
    assert "another process has it open; stop the service" in plain(outcome.err)
    assert numbers(trained, "SELECT COUNT(*) FROM rollout_groups") == [(6,)]


def test_ctrl_c_keeps_what_was_done_and_says_how_to_go_on(
    run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = prune_module._delete, []

    def delete(*arguments: object, **options: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(prune_module, "_delete", delete)
    rule = ("--keep-days", "0", "--what", "groups", "--batch-size", "1")
    outcome = run("db", "prune", *rule)
    assert outcome.exit_code == 1
    assert "deleted 2 groups" in plain(outcome.out)
    assert "the same command goes on" in plain(outcome.out)
    assert numbers(trained, "SELECT num_pruned_groups FROM runs") == [(2,)]
    monkeypatch.undo()
    monkeypatch.setenv("MENTOR_SERVE_HOME", str(trained))
    assert "deleted 4 groups" in plain(run("db", "prune", *rule).out)


# roles


def test_roles_are_printed_as_sql(run: Run) -> None:
    outcome = run("db", "roles", "--writer", "service", "--reader", "people")
    assert outcome.exit_code == 0
    assert "GRANT SELECT ON ALL TABLES IN SCHEMA public TO people;" in outcome.out
    assert ":writer" not in outcome.out
    assert run("db", "roles", "--reader", 'x"; DROP TABLE runs').exit_code == 2
    assert run("db", "roles", "--reader", "mentor_writer").exit_code == 2


# The guide

GUIDE = Path(__file__).parents[2] / "docs" / "operations.md"


@pytest.mark.parametrize(
    "line",
    sorted(
        set(re.findall(r"^.*mentor-serve (db [^#>|`\n]+)", GUIDE.read_text("utf-8"), re.MULTILINE))
    ),
)
def test_the_guide_uses_options_that_there_are(run: Run, line: str) -> None:
    command, *options = line.split()[1:]
    shown = run("db", command, "--help")
    assert shown.exit_code == 0
    for option in options:
        name = option.strip("[]")
        assert not name.startswith("--") or name in shown.out


# Passwords

COMMANDS = (
    ("upgrade",),
    ("check",),
    ("check", "--quick"),
    ("stats",),
    ("prune", "--keep-days", "0"),
    ("prune", "--keep-days", "0", "--what", "groups", "--dry-run"),
    ("prune", "--keep-days", "0", "--vacuum"),
    ("roles",),
)


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize(
    "address",
    [
        f"postgresql://mentor:{PASSWORD}@127.0.0.1:9/mentor",
        f"postgresql://mentor:{PASSWORD}@no-such-host.invalid/mentor",
        f"mysql://mentor:{PASSWORD}@127.0.0.1/mentor",
        f"postgresql://mentor:{PASSWORD}@127.0.0.1:port/mentor",
        f"postgresql://mentor:with@{PASSWORD}:{PASSWORD}/mentor",
    ],
)
def test_no_password_gets_out_of_a_failure(
    run: Run,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    address: str,
    command: tuple[str, ...],
    as_json: bool,
) -> None:
    monkeypatch.setenv("MENTOR_SERVE_STORE__URL", address)
    flags = ("--json",) if as_json and command != ("roles",) else ()
    outcome = run("db", *command, *flags)
    assert PASSWORD not in outcome.out + outcome.err
    assert "Traceback" not in outcome.err
    assert (outcome.exit_code == 0) is (command == ("roles",))


@pytest.mark.usefixtures("configured")
@pytest.mark.parametrize("command", COMMANDS[:-2], ids=" ".join)
def test_no_password_gets_out_of_a_success(run: Run, configured: str, command: tuple[str]) -> None:
    password = make_url(configured).password
    if password is None:
        pytest.skip("SQLite has no passwords")
    for flags in ((), ("--json",)):
        outcome = run("db", *command, *flags)
        assert outcome.exit_code == 0
        assert str(password) not in outcome.out + outcome.err
