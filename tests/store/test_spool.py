"""Files of groups, and the directory that they wait in."""

import dataclasses
import errno
import os
import time
from datetime import UTC, date, datetime

import numpy as np
import pytest
from store_samples import expert_rollout, group, trajectory

from mentor_serve.errors import StoreError, StoreUnavailable
from mentor_serve.store import NewGroup, NewTrajectory
from mentor_serve.store.group_files import FiledGroup, decode_group, encode_group
from mentor_serve.store.group_rows import ARRAY_COLUMNS
from mentor_serve.store.journal import content_key
from mentor_serve.store.spool import Spool, SpoolFull
from mentor_serve.types import (
    GuidanceMethod,
    Rollout,
    Score,
    StopReason,
    Task,
    TrajectoryKind,
)

NOW = datetime(2026, 1, 31, 12, 0, 0, 123456, tzinfo=UTC)
NOT_STORED = {"top_logprobs", "prompt_logprobs", "prompt_top_logprobs"}
"""Of a rollout: the database has no column for them either."""


def full_group():
    """One that differs from the default in every field."""
    return NewGroup(
        group_id="a-group",
        task=Task(
            source="test", prompt="\ud800 lone", answer="\x00é", metadata={"n": 1}, split="test"
        ),
        guidance=group(version=3).guidance,
        trajectories=[
            dataclasses.replace(trajectory(TrajectoryKind.MIXED), text="own text"),
            NewTrajectory(
                rollout=dataclasses.replace(
                    expert_rollout(), stop_reason=StopReason.LENGTH, expert_lost=True
                ),
                kind=TrajectoryKind.EXPERT,
                sample_index=4,
                score=Score(reward=float("nan"), accuracy=0.0, format_score=1.0),
                prompt_token_ids=(7, 8),
                error="unlucky",
                demonstration_id="demonstration",
                expert_model="expert",
            ),
            NewTrajectory(
                rollout=None,
                kind=TrajectoryKind.ON_POLICY,
                sample_index=5,
                score=None,
                prompt_token_ids=np.array([1, 2], np.int32),
            ),
        ],
        status="failed",
        error="because",
        method=GuidanceMethod.QUESTA,
        num_hint_tokens=3,
        hint_fraction=0.5,
    )


def round_trip(stored):
    return decode_group(encode_group(FiledGroup(run_id="run", created_at=NOW, group=stored)))


def plain(value):
    """Comparable: arrays as their bytes, dataclasses as dictionaries, NaN equal to itself."""
    if dataclasses.is_dataclass(value):
        return {one.name: plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return (value.dtype.name, value.tobytes())
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return repr(value)


def test_a_file_holds_everything_that_the_database_keeps():
    stored = full_group()
    filed = round_trip(stored)
    assert (filed.run_id, filed.created_at) == ("run", NOW)
    expected = plain(stored)
    for item in expected["trajectories"]:
        if isinstance(item["prompt_token_ids"], list):
            ids = [int(one) for one in item["prompt_token_ids"]]
            item["prompt_token_ids"] = plain(np.array(ids, np.int64))
    assert plain(filed.group) == expected


def test_no_field_is_forgotten():
    """A new field of a group has to be written to files as well (group_files.py)."""

    def names(kind):
        return {one.name for one in dataclasses.fields(kind)}

    assert names(Rollout) - NOT_STORED == set(ARRAY_COLUMNS) | {
        *("stop_reason", "text", "interventions", "latency_s", "expert_lost")
    }
    assert names(NewTrajectory) == {
        *("rollout", "kind", "sample_index", "score", "prompt_token_ids", "text", "seed", "error"),
        *("token_texts", "demonstration_id", "expert_model"),
    }
    assert names(NewGroup) == {
        *("group_id", "task", "guidance", "trajectories", "status", "error", "method"),
        *("num_hint_tokens", "hint_fraction"),
    }


def test_the_same_problem_stays_the_same_task():
    odd = {
        "when": date(2026, 1, 31),
        "pair": (1, {"b": 2, "a": 1}),
        "count": np.int64(5),
        "share": np.float32(0.5),
    }
    stored = dataclasses.replace(
        group(), task=Task(source="s", prompt="p", answer="a", metadata=odd)
    )
    assert content_key(round_trip(stored).group.task) == content_key(stored.task)


def test_numbers_of_numpy_are_numbers():
    item = dataclasses.replace(trajectory(), seed=np.int64(2**40))
    filed = round_trip(dataclasses.replace(group(), trajectories=[item]))
    assert filed.group.trajectories[0].seed == 2**40


def test_a_prompt_that_trajectories_share_is_written_once():
    prompt = list(range(5000))
    items = [
        dataclasses.replace(trajectory(sample_index=index), prompt_token_ids=prompt)
        for index in range(8)
    ]
    data = encode_group(
        FiledGroup(
            run_id="run",
            created_at=NOW,
            group=dataclasses.replace(group(), trajectories=items),
        )
    )
    assert len(data) < 2 * 8 * len(prompt)


def test_damage_anywhere_is_noticed():
    data = encode_group(FiledGroup(run_id="run", created_at=NOW, group=group()))
    rng = np.random.default_rng(0)
    for position in [*range(40), *rng.integers(40, len(data), 100)]:
        spoiled = bytearray(data)
        spoiled[position] ^= 1 << int(rng.integers(8))
        with pytest.raises(StoreError):
            decode_group(bytes(spoiled))
    for length in [*range(40), *rng.integers(40, len(data), 50)]:
        with pytest.raises(StoreError):
            decode_group(data[:length])


def test_a_newer_format_is_named():
    data = encode_group(FiledGroup(run_id="run", created_at=NOW, group=group()))
    with pytest.raises(StoreError, match="expected a file of format 1, got format 2"):
        decode_group(data[:7] + b"\x02" + data[8:])


@pytest.fixture
def spool(tmp_path):
    return Spool(tmp_path / "spool", max_bytes=1000)


def names(spool):
    return [path.name[21:-6] for path in spool.oldest(max_groups=100, max_bytes=10**9)]


def test_files_come_out_as_they_came_even_if_the_clock_goes_back(spool, monkeypatch):
    spool.put("first", b"1")
    monkeypatch.setattr(time, "time_ns", lambda: 5)
    spool.put("second", b"2")
    again = Spool(spool.directory, max_bytes=1000)
    again.put("third", b"3")
    assert names(again) == ["first", "second", "third"]
    assert (again.num_groups, again.num_bytes) == (3, 3)
    again.remove(again.oldest(max_groups=1, max_bytes=1))
    assert names(again) == ["second", "third"]
    assert len(list(spool.directory.glob("*.group"))) == 2


def test_a_batch_is_bounded_by_groups_and_bytes(spool):
    for name in "abcd":
        spool.put(name, bytes(100))
    assert len(spool.oldest(max_groups=3, max_bytes=10**6)) == 3
    assert len(spool.oldest(max_groups=10, max_bytes=250)) == 2
    assert len(spool.oldest(max_groups=10, max_bytes=1)) == 1


def test_a_full_spool_refuses_and_an_empty_one_takes_anything(spool):
    spool.put("huge", bytes(5000))
    with pytest.raises(SpoolFull, match="spool_max_mb"):
        spool.put("more", b"1")
    assert issubclass(SpoolFull, StoreUnavailable)
    assert names(spool) == ["huge"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_the_disk_does_not_take_is_not_kept(spool, monkeypatch, call):
    def fail(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(SpoolFull, match="No space left"):
            spool.put("group", b"1")
    assert spool.num_groups == 0
    assert [path for path in spool.directory.iterdir() if path.is_file()] == []


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match="spool directory"):
        Spool(tmp_path / "file" / "spool", max_bytes=1)


def test_leftovers_of_a_dead_process_go_and_those_of_a_living_one_stay(spool):
    old, young = (spool.directory / f"{age}.partial" for age in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    again = Spool(spool.directory, max_bytes=1000)
    assert (old.exists(), young.exists()) == (False, True)
    assert again.num_groups == 0


def test_rejected_files_have_their_reason_beside_them(spool):
    spool.put("waits", b"1")
    (path,) = spool.oldest(max_groups=1, max_bytes=1)
    moved = spool.set_aside(path, "because")
    kept = spool.reject("new", b"2", "also because")
    assert spool.num_groups == 0
    assert (moved.read_bytes(), kept.read_bytes()) == (b"1", b"2")
    assert moved.with_suffix(".reason.txt").read_text() == "because\n"
    assert kept.with_suffix(".reason.txt").read_text() == "also because\n"
    assert {moved.parent, kept.parent} == {spool.rejected_directory}


def test_a_spool_takes_over_another_one_in_order(spool, tmp_path):
    orphan = Spool(tmp_path / "orphan", max_bytes=1000)
    orphan.put("old", b"1")
    spool.put("new", b"2")
    assert spool.take_from(orphan.directory) == 1
    assert spool.take_from(orphan.directory) == spool.take_from(tmp_path / "nothing") == 0
    assert names(spool) == ["old", "new"]


def test_files_put_back_by_hand_are_seen(spool):
    kept = spool.reject("again", b"2", "a table was missing")
    os.replace(kept, spool.directory / kept.name)
    (spool.directory / "notes.group").write_text("not one of ours")
    spool.scan()
    assert names(spool) == ["again"]
