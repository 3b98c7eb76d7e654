"""Trajectories read back in bulk: arrays, Arrow tables, Parquet and JSONL files."""

import errno
import json
import os
import subprocess
import sys
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sqlalchemy import delete, select
from store_samples import demonstration, group, rollout, task, trajectory

from mentor_serve.errors import StoreError
from mentor_serve.store import (
    NewTrajectory,
    TrajectoryFilter,
    TrajectoryReader,
    export_trajectories,
    new_id,
)
from mentor_serve.store.connection import open_engine, writing
from mentor_serve.store.models import InterventionRow, Trajectory, TrajectoryTokens
from mentor_serve.store.tables import reader as reader_module
from mentor_serve.store.tables.columns import ARRAYS, COLUMNS, INTERVENTION
from mentor_serve.store.tables.files import _json_text
from mentor_serve.types import TrajectoryKind


@pytest.fixture
def reader(url):
    with TrajectoryReader(url) as opened:
        yield opened


@pytest.fixture
def filled(store, run_id, clock):
    """Versions 0 to 3, one group of two on-policy (accuracy 0 and 1) and one mixed each."""
    for version in range(4):
        store.add_group(run_id, group(number=version, version=version))
        clock.advance(3600)
    return run_id


def rows(reader, selection=None, **options):
    batches = reader.read_batches(selection or TrajectoryFilter(), **options)
    return [row for batch in batches for row in batch]


def add_served(store, run_id):
    served = trajectory(TrajectoryKind.SERVED)
    store.add_served(run_id, served, trajectory_id=new_id())


def test_every_stored_column_is_exported():
    exported = {column.source for column in COLUMNS}
    names = {column.name for column in COLUMNS}
    assert all(getattr(Trajectory, c.key) in exported for c in Trajectory.__table__.columns)
    assert len(names) == len(COLUMNS)
    assert set(ARRAYS) == set(TrajectoryTokens.__table__.columns.keys()) - {"trajectory_id"}
    assert set(INTERVENTION) == set(InterventionRow.__table__.columns.keys()) - {"trajectory_id"}


def test_arrays_come_back_bit_for_bit_and_torch_takes_them(reader, store, run_id):
    store.add_group(run_id, group(num_on_policy=1, num_mixed=1))
    found = dict(reader.read_tokens())
    assert [name.rsplit("-", 2)[1] for name in found] == ["mixed", "on_policy"]
    for name, arrays in found.items():
        original = rollout(is_mixed="mixed" in name)
        for column in set(ARRAYS) - {"prompt_token_ids", "versions"}:
            assert arrays[column].tobytes() == getattr(original, column).tobytes(), column
        assert arrays["prompt_token_ids"].tolist() == [1, 2, 3]
        tensor = torch.from_numpy(arrays["entropies"])
        tensor.zero_()
        assert not arrays["entropies"].any()


def test_arrays_of_some_ids(reader, filled):
    ids = [row["id"] for row in rows(reader)]
    assert [name for name, _ in reader.read_tokens(TrajectoryFilter(ids=ids[3:5]))] == ids[3:5]


def test_rows_carry_group_task_and_interventions(reader, filled):
    row = rows(reader, TrajectoryFilter(kinds=[TrajectoryKind.MIXED], min_version=2))[0]
    assert row["run_name"] == "test"
    assert (row["prompt"], row["answer"], row["source"]) == ("2 + 1 = ?", "3", "test:sums")
    assert row["completion"] == "<think>1 + 1</think> 2"
    assert (row["policy_version"], row["alpha"], row["gamma"]) == (2, 0.5, 1.25)
    assert (row["group_status"], row["consumed_by_step"]) == ("ready", None)
    assert row["created_at"] == datetime(2026, 1, 31, 14, tzinfo=UTC)
    assert row["interventions"] == [
        {
            "position": 1,
            "proposed_token_id": 7,
            "proposed_text": " wait",
            "chosen_token_id": 9,
            "chosen_text": " verify",
            "entropy": 2.5,
            "weight": 0.75,
            "policy_logprob": -1.5,
            "expert_logprob": -9.0,
        }
    ]


def test_responses_without_a_group_have_none_of_its_values(reader, store, run_id):
    add_served(store, run_id)
    store.add_demonstrations(run_id, task(), [demonstration()])
    served, expert = sorted(rows(reader), key=lambda row: row["kind"], reverse=True)
    assert (served["kind"], served["prompt"], served["group_id"]) == ("served", None, None)
    assert (expert["kind"], expert["prompt"], expert["alpha"]) == ("expert", "0 + 1 = ?", None)
    assert np.isnan(expert["policy_logprobs"]).all()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 12),
        ({"kinds": ["mixed"]}, 4),
        ({"kinds": ["mixed", "on_policy"]}, 12),
        ({"kinds": ["served"]}, 0),
        ({"min_version": 1}, 9),
        ({"max_version": 1}, 6),
        ({"min_version": 1, "max_version": 1}, 3),
        ({"is_passed": True}, 8),
        ({"is_passed": False}, 4),
        ({"status": "ok"}, 12),
        ({"status": "failed"}, 0),
        ({"since": datetime(2026, 1, 31, 13, tzinfo=UTC)}, 9),
        ({"until": datetime(2026, 1, 31, 13, tzinfo=UTC)}, 3),
        ({"run_id": "another"}, 0),
        ({"kinds": ["mixed"], "min_version": 3, "is_passed": True}, 1),
    ],
)
def test_filters(reader, filled, options, expected):
    selection = TrajectoryFilter(**options)
    assert reader.count(selection) == expected
    assert len(rows(reader, selection)) == expected


@pytest.mark.parametrize("limit", [None, 1, 3, 5, 12, 100])
def test_pages_and_batches_leave_nothing_out_and_repeat_nothing(reader, filled, monkeypatch, limit):
    everything = [row["id"] for row in rows(reader)]
    assert everything == sorted(everything)
    monkeypatch.setattr(reader_module, "PAGE_ROWS", 5)
    monkeypatch.setattr(reader_module, "BATCH_TOKENS", 16)
    batches = list(reader.read_batches(limit=limit))
    # A row has 3 tokens of prompt and 5 of response.
    assert max(map(len, batches)) <= 2
    assert [row["id"] for batch in batches for row in batch] == everything[:limit]


def test_one_response_larger_than_a_batch_is_read_all_the_same(reader, filled, monkeypatch):
    monkeypatch.setattr(reader_module, "BATCH_TOKENS", 1)
    assert len(rows(reader)) == 12


def test_what_is_stored_while_reading_is_left_out(reader, store, filled, monkeypatch):
    monkeypatch.setattr(reader_module, "PAGE_ROWS", 4)
    batches = reader.read_batches()
    num_rows = len(next(batches))
    store.add_group(filled, group(number=9, version=9))
    assert num_rows + sum(map(len, batches)) == 12
    assert reader.count() == 15


def test_pruned_arrays_are_null_and_the_row_stays(reader, url, filled):
    old = select(Trajectory.id).where(Trajectory.min_policy_version < 2)
    pruned = delete(TrajectoryTokens).where(TrajectoryTokens.trajectory_id.in_(old))
    engine = open_engine(url)
    with writing(engine, url, doing="pruning") as connection:
        connection.execute(pruned)
    engine.dispose()
    table = reader.to_arrow()
    assert table.num_rows == 12
    assert table["token_ids"].null_count == 6
    assert table["completion"].null_count == 0
    assert len(list(reader.read_tokens())) == 6


def test_an_arrow_table_has_the_values_and_exact_types(reader, filled):
    table = reader.to_arrow(TrajectoryFilter(kinds=["mixed"], min_version=3))
    assert table.schema.field("token_ids").type == pa.list_(pa.int32())
    assert table.schema.field("sources").type == pa.list_(pa.uint8())
    assert table.schema.field("created_at").type == pa.timestamp("us", tz="UTC")
    (row,) = table.to_pylist()
    original = rollout(is_mixed=True, version=3)
    assert row["token_ids"] == original.token_ids.tolist()
    assert row["versions"] == [3] * 5
    stored = np.array(row["mixed_logprobs"], np.float32)
    assert stored.tobytes() == original.mixed_logprobs.tobytes()
    assert row["interventions"][0]["chosen_text"] == " verify"


def test_an_arrow_table_without_tokens_has_no_such_columns(reader, filled):
    table = reader.to_arrow(with_tokens=False, limit=2)
    assert table.num_rows == 2
    assert not set(ARRAYS) & set(table.column_names)
    assert "interventions" in table.column_names


def export(reader, path, **options):
    return export_trajectories(reader, path, file_format=path.suffix[1:], **options)


def test_parquet_holds_the_table_in_row_groups(reader, filled, tmp_path, monkeypatch):
    monkeypatch.setattr(reader_module, "PAGE_ROWS", 5)
    progress = []
    report = export(
        reader, tmp_path / "all.parquet", on_progress=lambda *step: progress.append(step)
    )
    table = pq.read_table(report.path)
    assert table.schema.equals(reader.to_arrow().schema)
    # As text: NaN is not equal to itself.
    assert str(table.to_pylist()) == str(reader.to_arrow().to_pylist())
    assert (report.num_trajectories, report.num_tokens) == (12, 60)
    assert report.num_bytes == report.path.stat().st_size
    assert progress == [(5, 12), (10, 12), (12, 12)]
    assert pq.ParquetFile(report.path).num_row_groups == 1


def test_large_exports_have_several_row_groups(reader, filled, tmp_path, monkeypatch):
    monkeypatch.setattr(reader_module, "PAGE_ROWS", 4)
    monkeypatch.setattr("mentor_serve.store.tables.files.ROW_GROUP_BYTES", 1)
    report = export(reader, tmp_path / "all.parquet")
    assert pq.ParquetFile(report.path).num_row_groups == 3
    assert pq.read_table(report.path)["id"].to_pylist() == [row["id"] for row in rows(reader)]


def test_parquet_splits_floats_of_tokens_by_byte(reader, filled, tmp_path):
    metadata = pq.ParquetFile(export(reader, tmp_path / "all.parquet").path).metadata.row_group(0)
    encodings = {
        metadata.column(i).path_in_schema: metadata.column(i).encodings
        for i in range(metadata.num_columns)
    }
    for name, kind in ARRAYS.items():
        is_split = "BYTE_STREAM_SPLIT" in encodings[f"{name}.list.element"]
        assert is_split == (kind == "float32"), name
    assert "RLE_DICTIONARY" in encodings["prompt"]
    assert "RLE_DICTIONARY" in encodings["interventions.list.element.chosen_text"]


def test_jsonl_is_strict_json_and_nan_is_null(reader, store, filled, tmp_path):
    add_served(store, filled)
    report = export(reader, tmp_path / "all.jsonl")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = report.path.read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [document["id"] for document in documents] == [row["id"] for row in rows(reader)]
    mixed = next(document for document in documents if document["kind"] == "mixed")
    assert mixed["mixed_logprobs"] == [None, -0.25, None, None, None]
    entropies = np.array(mixed["entropies"], np.float32)
    assert entropies.tobytes() == rollout(is_mixed=True).entropies.tobytes()
    assert mixed["created_at"] == "2026-01-31T12:00:00Z"
    assert list(mixed) == reader.to_arrow().column_names


def test_extreme_floats_survive_jsonl():
    values = np.array([0.0, -0.0, 1e-45, -1.17549435e-38, 3.4028235e38, 1 / 3, -1e-7], np.float32)
    text = _json_text(values)
    assert np.array(json.loads(text), np.float32).tobytes() == values.tobytes()
    assert _json_text(np.array([np.inf, -np.inf, np.nan], np.float32)) == "[null, null, null]"
    assert _json_text(np.empty(0, np.float32)) == "[]"


@pytest.mark.parametrize("name", ["all.parquet", "all.jsonl"])
def test_datasets_opens_it(reader, filled, tmp_path, monkeypatch, name):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import datasets

    path = export(reader, tmp_path / name).path
    builder = "parquet" if path.suffix == ".parquet" else "json"
    loaded = datasets.load_dataset(
        builder, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded.num_rows == 12
    expected = next(row for row in rows(reader) if row["kind"] == "mixed")
    found = next(row for row in loaded if row["kind"] == "mixed")
    assert found["id"] == expected["id"]
    assert found["token_ids"] == expected["token_ids"].tolist()
    assert np.array(found["entropies"], np.float32).tobytes() == expected["entropies"].tobytes()
    assert found["interventions"][0]["chosen_text"] == " verify"


@pytest.mark.parametrize("name", ["none.parquet", "none.jsonl"])
def test_an_empty_selection_makes_a_file_of_no_rows(reader, filled, tmp_path, name):
    report = export(reader, tmp_path / name, selection=TrajectoryFilter(kinds=["expert"]))
    assert report.num_trajectories == 0
    if name.endswith("parquet"):
        assert pq.read_table(report.path).schema.equals(reader.to_arrow().schema)
        assert pq.read_table(report.path).num_rows == 0
    else:
        assert report.path.read_bytes() == b""


@pytest.mark.parametrize("name", ["all.parquet", "all.jsonl"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_an_export_that_breaks_off_leaves_what_was_there(reader, filled, tmp_path, name, failure):
    path = tmp_path / name
    path.write_bytes(b"yesterday")

    def break_off(done, total):
        raise failure

    expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else StoreError
    with pytest.raises(expected):
        export(reader, path, on_progress=break_off)
    assert path.read_bytes() == b"yesterday"
    assert sorted(entry.name for entry in tmp_path.iterdir() if "mentor.db" not in entry.name) == [
        name
    ]


def test_a_disk_that_fills_up_at_the_very_end_is_an_error_that_names_the_file(
    reader, filled, tmp_path, monkeypatch
):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"all\.jsonl failed: No space left on device"):
        export(reader, tmp_path / "all.jsonl")
    assert not (tmp_path / "all.jsonl").exists()


def test_without_pyarrow_parquet_says_what_to_install_and_jsonl_works(
    reader, filled, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(StoreError, match=r"pip install 'mentor-serve\[export\]'"):
        export(reader, tmp_path / "all.parquet")
    with pytest.raises(StoreError, match=r"pip install 'mentor-serve\[export\]'"):
        reader.to_arrow()
    assert export(reader, tmp_path / "all.jsonl").num_trajectories == 12


def test_the_store_alone_imports_no_pyarrow():
    code = "import sys, mentor_serve.store; sys.exit('pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_failed_trajectories_are_rows_with_their_reason(reader, store, run_id):
    broken = NewTrajectory(
        rollout=None,
        kind=TrajectoryKind.ON_POLICY,
        sample_index=5,
        score=None,
        prompt_token_ids=[1],
        error="engine stopped",
    )
    whole = group(num_on_policy=2, num_mixed=0)
    whole.trajectories.append(broken)
    store.add_group(run_id, whole)
    (row,) = rows(reader, TrajectoryFilter(status="failed"))
    assert (row["error"], row["completion"], row["token_ids"]) == ("engine stopped", None, None)


def test_a_database_that_cannot_be_read_is_a_store_error(tmp_path):
    with (
        TrajectoryReader(f"sqlite:///{tmp_path / 'missing.db'}") as missing,
        pytest.raises(StoreError, match="counting trajectories failed"),
    ):
        missing.count()


def test_pages_are_found_through_an_index(url, filled):
    query = (
        select(Trajectory.id)
        .where(*TrajectoryFilter(run_id=filled).conditions(), Trajectory.id > "0")
        .order_by(Trajectory.id)
        .limit(5)
    )
    engine = open_engine(url, read_only=True)
    with engine.connect() as connection:
        is_sqlite = connection.dialect.name == "sqlite"
        if not is_sqlite:
            # A table this small is scanned unless that is forbidden; a sort would show all the same
            # if no index had the order.
            for plan_node in ("seqscan", "bitmapscan"):
                connection.exec_driver_sql(f"SET enable_{plan_node} = off")
        explain = "EXPLAIN QUERY PLAN" if is_sqlite else "EXPLAIN"
        sql = query.compile(connection, compile_kwargs={"literal_binds": True})
        plan = str(connection.exec_driver_sql(f"{explain} {sql}").fetchall())
    engine.dispose()
    if is_sqlite:
        assert "(run_id=? AND id>?)" in plan
        assert "TEMP B-TREE" not in plan
    else:
        assert "Index" in plan
        assert "Sort" not in plan
