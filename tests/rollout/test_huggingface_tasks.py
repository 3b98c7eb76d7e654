import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest

from mentor_serve.errors import ConfigError
from mentor_serve.rollout.tasks import build_source

ROWS = [{"problem": f"{n} + 0", "answer": str(n), "level": n % 3} for n in range(12)]


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    match path.suffix:
        case ".parquet":
            pyarrow.parquet.write_table(table, path)
        case ".csv":
            pyarrow.csv.write_csv(table, path)
        case _:
            path.write_text("\n".join(map(json.dumps, rows)))
    return path


def prompts(**options: Any) -> set[str]:
    source = build_source(source="huggingface", **options)
    return {source.next_task().prompt for _ in range(40)}


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json", "csv"])
def test_a_file_is_read_whole(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path / f"problems.{suffix}", ROWS)
    source = build_source(source="huggingface", name=str(file))
    drawn = [source.next_task() for _ in range(11)]
    held_out = source.holdout(1)
    assert {task.prompt for task in [*drawn, *held_out]} == {row["problem"] for row in ROWS}
    assert {task.source for task in drawn} == {f"huggingface:problems.{suffix}"}
    assert all(task.metadata == {"level": int(task.answer) % 3} for task in drawn)


def test_a_directory_is_read_by_split(tmp_path: Path) -> None:
    write(tmp_path / "set" / "train.parquet", ROWS[:4])
    write(tmp_path / "set" / "test.parquet", ROWS[4:8])
    directory = str(tmp_path / "set")
    assert prompts(name=directory, split="train") == {row["problem"] for row in ROWS[:4]}
    assert prompts(name=directory, config={"split": "test"}) == {
        row["problem"] for row in ROWS[4:8]
    }
    assert prompts(name=directory, split="test[:2]") == {row["problem"] for row in ROWS[4:6]}


def test_message_lists_of_parquet_files_become_messages(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "1 + 1?"}]
    file = write(tmp_path / "chat.parquet", [{"prompt": messages, "answer": "2"}])
    task = build_source(source="huggingface", name=str(file)).next_task()
    assert task.metadata["messages"] == messages


@pytest.mark.parametrize(
    ("name", "message"),
    [("./missing", "no such file"), ("/missing.parquet", "no such file")],
)
def test_a_missing_path_is_a_config_error(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_source(source="huggingface", name=name)


def test_a_file_of_another_kind_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "problems.txt").write_text("1 + 1")
    with pytest.raises(ConfigError, match=r"expected one of \.parquet"):
        build_source(source="huggingface", name=str(tmp_path / "problems.txt"))


def test_an_unknown_split_is_a_config_error(tmp_path: Path) -> None:
    write(tmp_path / "set" / "train.parquet", ROWS)
    with pytest.raises(ConfigError, match="cannot load data set"):
        build_source(source="huggingface", name=str(tmp_path / "set"), split="validation")


def test_a_damaged_file_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "problems.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ConfigError, match="cannot load data set"):
        build_source(source="huggingface", name=str(tmp_path / "problems.parquet"))


def test_a_row_without_an_answer_is_named(tmp_path: Path) -> None:
    rows = [*ROWS[:2], {"problem": "7 + 0", "answer": None, "level": 1}]
    file = write(tmp_path / "problems.parquet", rows)
    with pytest.raises(ConfigError, match="row 2: expected a column answer"):
        build_source(source="huggingface", name=str(file))
