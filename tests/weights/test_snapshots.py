"""Snapshots: layout, damage, atomic appearance, pruning."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mentor_serve.errors import WeightsError
from mentor_serve.types import Guidance
from mentor_serve.weights import (
    SnapshotLabel,
    discard_after,
    list_snapshots,
    prune_snapshots,
    read_manifest,
    read_snapshot,
    snapshot_path,
    write_snapshot,
)


def label(version, **values):
    return SnapshotLabel(
        **({"version": version, "step": version, "alpha": 0.5, "gamma": 1.5} | values)
    )


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(0, tie_word_embeddings=True)


@pytest.fixture
def write(model, tmp_path):
    def write(version, **values):
        return write_snapshot(
            tmp_path, label=label(version, **values), model=model, state_dict=model.state_dict()
        )

    return write


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_a_snapshot_as_it_is(tied, tiny_llama, tiny_tokenizer, tmp_path):
    model = tiny_llama(0, tie_word_embeddings=tied)
    snapshot = write_snapshot(
        tmp_path,
        label=label(12),
        model=model,
        state_dict=model.state_dict(),
        tokenizer=tiny_tokenizer,
    )
    assert snapshot.path == tmp_path / "v000012"
    loaded = AutoModelForCausalLM.from_pretrained(snapshot.path)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert loaded.config.tie_word_embeddings is tied
    tokenizer = AutoTokenizer.from_pretrained(snapshot.path)
    assert tokenizer("1+2").input_ids == tiny_tokenizer("1+2").input_ids
    names = {path.name for path in snapshot.path.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json"} <= names
    assert {"mentor.json", "tokenizer.json"} <= names


def test_given_weights_are_written_not_the_models_own(model, tmp_path):
    zeros = {name: torch.zeros_like(item) for name, item in model.state_dict().items()}
    del zeros["lm_head.weight"]
    snapshot = write_snapshot(tmp_path, label=label(1), model=model, state_dict=zeros)
    found = read_snapshot(snapshot.path).state_dict
    assert found.keys() == zeros.keys()
    assert not any(tensor.any() for tensor in found.values())


def test_a_snapshot_reads_back_with_its_manifest(write, model):
    written = write(3, parent_version=1, run_id="run")
    found = read_snapshot(written.path)
    assert found == written
    assert (found.parent_version, found.run_id, found.created_at.tzinfo is None) == (
        1,
        "run",
        False,
    )
    assert found.guidance == Guidance(policy_version=3, step=3, alpha=0.5, gamma=1.5)
    assert torch.equal(
        found.state_dict["model.embed_tokens.weight"], model.get_input_embeddings().weight
    )
    assert read_manifest(written.path).state_dict is None


def test_a_changed_byte_is_found_and_both_hashes_are_named(write):
    snapshot = write(1)
    file = snapshot.path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(WeightsError) as caught:
        read_snapshot(snapshot.path)
    message = str(caught.value)
    assert str(file) in message
    assert snapshot.sha256 in message
    assert message.count("sha256") == 1
    assert read_snapshot(snapshot.path, verify=False).version == 1


def test_a_cut_off_file_is_found_even_unverified(write):
    snapshot = write(1)
    file = snapshot.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(WeightsError, match="damaged"):
        read_snapshot(snapshot.path, verify=False)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 99}', '{"format": 1}'])
def test_a_damaged_manifest_is_named(write, content):
    snapshot = write(1)
    (snapshot.path / "mentor.json").write_text(content)
    with pytest.raises(WeightsError, match=r"mentor\.json"):
        read_manifest(snapshot.path)


def test_a_missing_snapshot_is_named(tmp_path):
    with pytest.raises(WeightsError, match="v000005"):
        read_snapshot(snapshot_path(tmp_path, 5))


def test_a_missing_weights_file_is_named(write):
    snapshot = write(1)
    (snapshot.path / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model\.safetensors cannot be read"):
        read_snapshot(snapshot.path)


def test_versions_are_never_overwritten(write):
    before = write(1)
    with pytest.raises(WeightsError, match="never overwritten"):
        write(1, alpha=0.9)
    assert read_manifest(before.path) == before


def test_a_failing_writer_leaves_nothing(model, tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(type(model), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        write_snapshot(tmp_path, label=label(1), model=model, state_dict=model.state_dict())
    assert list(tmp_path.iterdir()) == []


def test_snapshots_are_listed_oldest_first_without_weights(write, tmp_path):
    for version in (10, 2, 1_000_000):
        write(version)
    (tmp_path / ".tmp-v000011-abc").mkdir()
    (tmp_path / "notes").mkdir()
    found = list_snapshots(tmp_path)
    assert [item.version for item in found] == [2, 10, 1_000_000]
    assert all(item.state_dict is None for item in found)
    assert list_snapshots(tmp_path / "absent") == []


def test_one_bad_directory_does_not_hide_the_others(write, tmp_path, caplog):
    write(1)
    (write(2).path / "mentor.json").write_text("{")
    assert [item.version for item in list_snapshots(tmp_path)] == [1]
    assert "v000002" in caplog.text


def test_pruning_keeps_the_newest_and_the_protected(write, tmp_path):
    for version in range(5):
        write(version)
    assert prune_snapshots(tmp_path, keep=2, protect={1}) == [0, 2]
    assert [item.version for item in list_snapshots(tmp_path)] == [1, 3, 4]
    assert prune_snapshots(tmp_path, keep=9) == []
    with pytest.raises(ValueError, match="keep"):
        prune_snapshots(tmp_path, keep=0)


def test_orphans_and_leftovers_are_discarded(write, tmp_path):
    for version in range(4):
        write(version)
    (tmp_path / ".tmp-v000009-x").mkdir()
    assert discard_after(tmp_path, 1) == [2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v000000", "v000001"]


def test_the_manifest_is_plain_json(write):
    snapshot = write(7, parent_version=6)
    manifest = json.loads((snapshot.path / "mentor.json").read_text())
    assert manifest["version"] == 7
    assert manifest["parent"] == 6
    assert manifest["sha256"] == snapshot.sha256
    assert manifest["created_at"].endswith("+00:00")


def test_weights_are_readable_by_other_users(write):
    assert write(1).path.stat().st_mode & 0o777 == 0o755
