"""Checkpoints: exact resumption, damage, generators."""

import random

import numpy as np
import pytest
import torch
from learner_samples import random_groups, tiny_model

from mentor_serve.errors import WeightsError
from mentor_serve.learner import TorchBackend, TrainingOptions, UpdateConfig, build_batch
from mentor_serve.learner.checkpoint import (
    BACKEND,
    TrainingState,
    newest_intact,
    read_checkpoint,
    restore_rng,
    write_checkpoint,
)

STATE = TrainingState(version=3, step=2, alpha=0.75, gamma=1.25, parent_version=1)


def built_backend(seed=0, **overrides):
    backend = TorchBackend(TrainingOptions(learning_rate=1e-2))
    backend.build(tiny_model(seed, **overrides))
    return backend


def batches(count):
    model = tiny_model().eval()
    return [
        build_batch(random_groups(model, 2, seed=seed), alpha=0.5, policy_version=0)
        for seed in range(count)
    ]


def test_resumed_training_equals_uninterrupted_training_bit_for_bit(tmp_path):
    first, second, third = batches(3)
    config = UpdateConfig(mini_batch_prompts=1)
    straight = built_backend()
    for batch in (first, second, third):
        metrics = straight.step(batch, config)
    stopped = built_backend()
    stopped.step(first, config)
    path = write_checkpoint(tmp_path, state=STATE, save_backend=stopped.save)
    resumed = built_backend(seed=9)
    assert read_checkpoint(path) == STATE
    resumed.load(path / BACKEND)
    resumed.step(second, config)
    assert resumed.step(third, config) == metrics
    expected = straight.full_state()
    for name, tensor in resumed.full_state().items():
        assert torch.equal(tensor, expected[name]), name


def test_generators_are_restored(tmp_path):
    path = write_checkpoint(tmp_path, state=STATE, save_backend=lambda folder: None)
    expected = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    restore_rng(path)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == expected


def test_a_version_is_never_overwritten(tmp_path):
    write_checkpoint(tmp_path, state=STATE, save_backend=lambda folder: None)
    with pytest.raises(WeightsError, match="never overwritten"):
        write_checkpoint(tmp_path, state=STATE, save_backend=lambda folder: None)


def test_a_failing_backend_leaves_no_checkpoint(tmp_path):
    def fail(folder):
        (folder / "half").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(tmp_path, state=STATE, save_backend=fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content"), [("checkpoint.json", b"{"), ("checkpoint.json", b"{}"), ("rng.pt", b"")]
)
def test_damage_is_detected_and_the_older_checkpoint_found(tmp_path, name, content):
    older = write_checkpoint(
        tmp_path,
        state=TrainingState(version=2, step=1, alpha=1.0, gamma=1.0),
        save_backend=lambda folder: None,
    )
    path = write_checkpoint(tmp_path, state=STATE, save_backend=lambda folder: None)
    (path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=name.replace(".", r"\.")):
        read_checkpoint(path)
    assert newest_intact(tmp_path, up_to=3) == older
    assert newest_intact(tmp_path, up_to=1) is None


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(WeightsError, match="v000009 cannot be read"):
        read_checkpoint(tmp_path / "v000009")


def test_weights_of_another_architecture_are_refused():
    backend = built_backend()
    with pytest.raises(WeightsError, match="missing are"):
        backend.load_weights({"something": torch.zeros(1)})
    wider = built_backend(hidden_size=32).full_state()
    before = backend.full_state()
    with pytest.raises(WeightsError, match="expected shape"):
        backend.load_weights(wider)
    for name, tensor in backend.full_state().items():
        assert torch.equal(tensor, before[name])


def test_half_precision_models_are_trained_in_float32():
    backend = TorchBackend()
    backend.build(tiny_model().to(torch.bfloat16))
    assert {item.dtype for item in backend.full_state().values()} == {torch.float32}


def test_dropout_is_off_during_training():
    backend = TorchBackend()
    backend.build(tiny_model(attention_dropout=0.5).train())
    assert not backend.model.training


def test_a_closed_backend_says_what_is_missing():
    backend = built_backend()
    backend.close()
    with pytest.raises(RuntimeError, match="call build"):
        backend.full_state()
