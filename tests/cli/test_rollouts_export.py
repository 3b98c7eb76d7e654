"""`mentor-serve rollouts export` on a run that was really trained."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
from cli_outcome import Outcome

from mentor_serve.cli import options
from mentor_serve.store.tables import reader

Run = Callable[..., Outcome]
NUM_ROWS = 36
"""Three updates of two groups of four on-policy and two mixed responses."""


def exported(run: Run, path: Path, *arguments: str) -> list[dict[str, Any]]:
    outcome = run("rollouts", "export", "--out", str(path), *arguments)
    assert outcome.exit_code == 0, outcome.err
    if path.suffix == ".parquet":
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return rows
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_whole_run(run: Run, trained: Path, tmp_path: Path, suffix: str) -> None:
    rows = exported(run, tmp_path / f"all.{suffix}")
    assert len(rows) == NUM_ROWS
    assert {row["consumed_by_step"] for row in rows} == {1, 2, 3}
    assert {row["kind"] for row in rows} == {"on_policy", "mixed"}
    assert all(len(row["token_ids"]) == row["num_tokens"] for row in rows)
    assert all(len(row["interventions"]) == row["num_interventions"] for row in rows)


def test_filters_reach_the_query(run: Run, trained: Path, tmp_path: Path) -> None:
    rows = exported(
        run,
        tmp_path / "some.jsonl",
        *("--kind", "mixed", "--passed", "--status", "ok", "--no-tokens"),
        *("--min-version", "1", "--max-version", "1", "--since", "2020-01-01"),
    )
    # Of the two mixed responses of a group the second has reward 1.
    assert [(row["kind"], row["accuracy"], row["policy_version"]) for row in rows] == [
        ("mixed", 1.0, 1)
    ] * 2
    assert "token_ids" not in rows[0]


def test_limit_and_until(run: Run, trained: Path, tmp_path: Path) -> None:
    assert len(exported(run, tmp_path / "few.jsonl", "--limit", "5")) == 5
    assert exported(run, tmp_path / "none.jsonl", "--until", "2020-01-01T00:00Z") == []


def test_json_says_what_was_written(run: Run, trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "all.parquet"
    outcome = run("rollouts", "export", "--out", str(path), "--json")
    report = json.loads(outcome.out)
    assert report["path"] == str(path)
    assert report["num_trajectories"] == NUM_ROWS
    assert report["num_bytes"] == path.stat().st_size
    assert (report["format"], report["run_name"]) == ("parquet", "default")


def test_people_are_told_where_it_is(run: Run, trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "all.parquet"
    outcome = run("rollouts", "export", "--out", str(path))
    assert outcome.out.startswith("36 trajectories of run default (")
    assert outcome.out.endswith(f" MB) are in {path}\n")


def test_an_empty_result_has_the_schema_and_says_so(
    run: Run, trained: Path, tmp_path: Path
) -> None:
    path = tmp_path / "none.parquet"
    outcome = run("rollouts", "export", "--out", str(path), "--kind", "served")
    assert outcome.exit_code == 0
    assert "No trajectory fits: an empty table" in outcome.out
    assert pq.read_table(path).num_rows == 0
    assert "token_ids" in pq.read_schema(path).names


def test_the_format_goes_before_the_ending(run: Run, trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "table.data"
    assert run("rollouts", "export", "--out", str(path), "--format", "parquet").exit_code == 0
    assert pq.read_table(path).num_rows == NUM_ROWS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "x.csv"), "expected --format parquet or jsonl"),
        (("--out", "missing/x.jsonl"), "expected a directory missing"),
        (("--out", "/", "--format", "jsonl"), "got a directory"),
        (("--out", "x.jsonl", "--run", "other"), "no run named 'other'"),
        (("--out", "x.jsonl", "--since", "yesterday"), "--since yesterday: expected a time"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    run: Run,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run("rollouts", "export", *arguments)
    assert outcome.exit_code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "x.jsonl").exists()


def test_no_database_is_wrong_usage(run: Run, home: Path, tmp_path: Path) -> None:
    outcome = run("rollouts", "export", "--out", str(tmp_path / "x.jsonl"))
    assert outcome.exit_code == 2
    assert "expected a database" in outcome.err


def test_damaged_arrays_end_it_without_a_file(run: Run, trained: Path, tmp_path: Path) -> None:
    connection = sqlite3.connect(trained / "mentor.db")
    with connection:
        connection.execute("UPDATE trajectory_tokens SET weights = x'0102'")
    connection.close()
    path = tmp_path / "x.parquet"
    outcome = run("rollouts", "export", "--out", str(path))
    assert outcome.exit_code == 1
    assert re.search(
        r"weights of trajectory \S+-mixed-00: expected an encoded array of at least 8 bytes",
        outcome.err,
    )
    assert list(tmp_path.glob("*x.parquet*")) == []
    # What does not need them still goes.
    assert len(exported(run, path, "--no-tokens")) == NUM_ROWS


def test_progress_is_lines_where_there_is_no_terminal(
    run: Run, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "PROGRESS_INTERVAL_S", 0.0)
    monkeypatch.setattr(reader, "PAGE_ROWS", 20)
    outcome = run("rollouts", "export", "--out", str(tmp_path / "x.jsonl"), "--json")
    assert "exporting: 20 of 36\nexporting: 36 of 36\n" in outcome.err
    assert json.loads(outcome.out)["num_trajectories"] == NUM_ROWS


def _recipes() -> list[Any]:
    guide = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    return [pytest.param(block, id=block.split()[1]) for block in blocks]


@pytest.mark.parametrize("recipe", _recipes())
def test_recipes_of_the_guide(
    run: Run,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "import polars" in recipe:
        pytest.importorskip("polars")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".mentor").symlink_to(trained)
    exported(run, tmp_path / "rollouts.parquet")
    capsys.readouterr()
    exec(compile(recipe, "docs/export.md", "exec"), {})
    assert capsys.readouterr().out
