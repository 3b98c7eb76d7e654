"""Options that change what a rank holds: adapters, weight decay; backends that cannot be built."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from backend_cases import (
    OPTIONS,
    UPDATE,
    Case,
    assert_same_metrics,
    assert_same_weights,
    batch_of,
)
from learner_samples import tiny_model

from mentor_serve.errors import ConfigError, WeightsError
from mentor_serve.learner import LoraOptions, TrainingOptions
from mentor_serve.learner.backends import RankOptions, build_backend

TORCH = Case("torch")


@pytest.fixture
def started(request):
    """Makes a backend with the initial weights, closed after the test."""
    made = []

    def start(case, options=OPTIONS):
        if case.num_learners > 0:
            request.getfixturevalue("ray_cluster")
        backend = case.make(options)
        made.append(backend)
        backend.build(tiny_model())
        return backend

    yield start
    for backend in made:
        backend.close()


with_ranks = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    "case", [Case("rllib"), pytest.param(Case("deepspeed", 2, 3), marks=with_ranks)], ids=str
)
def test_adapters_equal_plain_torch(started, case, tmp_path):
    lora = LoraOptions(rank=2, scale=8, target_modules=("q_proj", "v_proj"))
    options = replace(OPTIONS, lora=lora, gradient_checkpointing=True)
    backend, reference = started(case, options), started(TORCH, options)
    for seed in range(2):
        found, expected = (item.step(batch_of(seed), UPDATE) for item in (backend, reference))
        assert_same_metrics(found, expected)
    backend.save(tmp_path)
    expected = reference.full_state()
    assert_same_weights(backend.full_state(), expected)
    untrained = tiny_model().state_dict()
    moved = {name for name, item in expected.items() if not torch.equal(item, untrained[name])}
    assert moved == {name for name in expected if "q_proj" in name or "v_proj" in name}
    backend.step(batch_of(2), UPDATE)
    backend.load(tmp_path)
    assert_same_weights(backend.full_state(), expected)
    assert_same_metrics(*(item.step(batch_of(2), UPDATE) for item in (backend, reference)))
    assert_same_weights(backend.full_state(), reference.full_state())


@pytest.mark.parametrize(
    "case",
    [TORCH, Case("rllib"), pytest.param(Case("deepspeed", 1, 2), marks=with_ranks)],
    ids=str,
)
def test_a_changed_weight_decay_counts_after_a_load(started, case, tmp_path):
    decayed = replace(OPTIONS, weight_decay=5.0)
    before, reference = started(case), started(TORCH)
    for backend, directory in ((before, tmp_path / "case"), (reference, tmp_path / "torch")):
        directory.mkdir()
        backend.step(batch_of(), UPDATE)
        backend.save(directory)
    before.close()
    after, expected = started(case, decayed), started(TORCH, decayed)
    after.load(tmp_path / "case")
    expected.load(tmp_path / "torch")
    for backend in (after, expected, reference):
        backend.step(batch_of(1), UPDATE)
    assert_same_weights(after.full_state(), expected.full_state())
    name = "model.embed_tokens.weight"
    assert after.full_state()[name].norm() < 0.96 * reference.full_state()[name].norm()


def test_torch_and_rllib_go_on_from_each_others_checkpoints(started, tmp_path):
    one, other = started(TORCH), started(Case("rllib"))
    one.step(batch_of(), UPDATE)
    one.save(tmp_path)
    other.load(tmp_path)
    assert other.step(batch_of(1), UPDATE) == one.step(batch_of(1), UPDATE)


@pytest.mark.parametrize("method", ["load", "load_optimizer"])
def test_a_checkpoint_without_the_backends_files_is_refused(started, tmp_path, method):
    (tmp_path / "deepspeed.json").write_text("{}")
    for case in (TORCH, Case("rllib")):
        backend = started(case)
        with pytest.raises(WeightsError, match=r"found \['deepspeed.json'\].*learner.backend"):
            getattr(backend, method)(tmp_path)
        backend.step(batch_of(), UPDATE)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_deepspeed_refuses_a_checkpoint_of_other_ranks(started, tmp_path):
    backend = started(Case("deepspeed", 1, 2))
    (tmp_path / "deepspeed.json").write_text('{"num_learners": 4, "zero_stage": 3}')
    with pytest.raises(WeightsError, match=r"'num_learners': 1.*'num_learners': 4"):
        backend.load(tmp_path)
    backend.full_state()


@pytest.mark.ray
def test_ranks_that_find_no_place_are_an_error(ray_cluster):
    ranks = RankOptions(num_learners=2, num_cpus=1000, start_timeout_s=1.0)
    backend = build_backend("deepspeed", TrainingOptions(), ranks)
    with pytest.raises(RuntimeError, match=r"2 x \{'CPU': 1000\} free in the Ray cluster"):
        backend.build(tiny_model())


def test_deepspeed_needs_ranks():
    with pytest.raises(ConfigError, match="at least 1"):
        build_backend("deepspeed", TrainingOptions(), RankOptions(num_learners=0))


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("mentor_serve.learner.backends.factory.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"mentor-serve\[deepspeed\]"):
        build_backend("deepspeed", TrainingOptions())


def test_an_unknown_backend_is_refused():
    with pytest.raises(ConfigError, match="got 'jax'"):
        build_backend("jax", TrainingOptions())


def test_a_backend_without_a_model_says_so():
    backend = build_backend("rllib", TrainingOptions())
    for call in (backend.full_state, lambda: backend.model):
        with pytest.raises(RuntimeError, match="call build"):
            call()
