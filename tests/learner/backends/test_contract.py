"""Every backend makes the same updates as plain torch, and keeps the same promises.

A backend with ranks takes seconds to start, so the tests of one case share it: `build` starts anew.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import pytest
import torch
from backend_cases import (
    CASES,
    UPDATE,
    Case,
    assert_identical,
    assert_same_metrics,
    assert_same_weights,
    batch_of,
    batch_without_gradient,
    batch_without_signal,
    rank_pids,
    wait_until_gone,
)
from learner_samples import tiny_model

from mentor_serve.errors import WeightsError
from mentor_serve.learner.sharding import plan_update

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request, ray_cluster):
    return request.param


@pytest.fixture(scope="module")
def shared(case):
    backend = case.make()
    yield backend
    backend.close()


@pytest.fixture
def backend(shared):
    """The case's backend with the initial weights and no moments."""
    shared.build(tiny_model())
    return shared


@pytest.fixture
def torch_backend():
    """What the others are compared with."""
    backend = Case("torch").make()
    backend.build(tiny_model())
    return backend


def train(backend, count, *, config=UPDATE, first_seed=0):
    """Updates on different batches; returns the metrics of each."""
    return [backend.step(batch_of(first_seed + index), config) for index in range(count)]


def test_batches_have_several_micro_batches_on_every_rank():
    for share in plan_update(batch_of(), UPDATE, world_size=2):
        assert len(share) == 2
        assert all(len(item.micro_batches) > 1 for item in share)


def test_five_updates_equal_plain_torch(backend, torch_backend):
    before = backend.full_state()
    for seed in range(5):
        metrics = backend.step(batch_of(seed), UPDATE)
        assert_same_metrics(metrics, torch_backend.step(batch_of(seed), UPDATE))
        assert_same_weights(backend.full_state(), torch_backend.full_state())
    after = backend.full_state()
    assert min(float((after[name] - item).abs().max()) for name, item in before.items()) > 0.01


@pytest.mark.parametrize("importance", ["none", "token"])
def test_recomputed_log_probabilities_equal_plain_torch(backend, torch_backend, importance):
    config = replace(UPDATE, old_logprobs="recomputed", importance=importance, importance_cap=1.05)
    for found, expected in zip(
        train(backend, 2, config=config), train(torch_backend, 2, config=config), strict=True
    ):
        assert_same_metrics(found, expected)
        share = expected.truncated_weight_share
        assert found.truncated_weight_share == pytest.approx(share, abs=1e-6)
    assert_same_weights(backend.full_state(), torch_backend.full_state())


def test_learning_rate_and_clipping_follow_the_update(backend, torch_backend):
    for config in (
        replace(UPDATE, learning_rate_scale=0.25, max_grad_norm=0.05),
        replace(UPDATE, learning_rate_scale=0.5, max_grad_norm=1e6, temperature=0.7),
    ):
        found, expected = (item.step(batch_of(), config) for item in (backend, torch_backend))
        assert_same_metrics(found, expected)
        assert found.learning_rate == expected.learning_rate
        assert_same_weights(backend.full_state(), torch_backend.full_state())


def assert_resumed_anew(case, directory, expected_metrics, expected):
    fresh = case.make()
    try:
        # Other weights, so that what is found must come from the checkpoint.
        fresh.build(tiny_model(seed=9))
        fresh.load(directory)
        assert train(fresh, 2, first_seed=2) == expected_metrics
        assert_identical(fresh.full_state(), expected)
    finally:
        fresh.close()


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(case, backend, tmp_path):
    train(backend, 2)
    backend.save(tmp_path)
    expected_metrics = train(backend, 2, first_seed=2)
    expected = backend.full_state()
    assert_resumed_anew(case, tmp_path, expected_metrics, expected)
    backend.load(tmp_path)
    assert train(backend, 2, first_seed=2) == expected_metrics
    assert_identical(backend.full_state(), expected)


def test_loaded_weights_come_with_fresh_moments(backend, torch_backend):
    train(backend, 2)
    backend.load_weights(torch_backend.full_state())
    assert_identical(backend.full_state(), torch_backend.full_state())
    assert_same_metrics(*(train(item, 1)[0] for item in (backend, torch_backend)))
    assert_same_weights(backend.full_state(), torch_backend.full_state())


def test_moments_can_be_loaded_without_the_weights(backend, torch_backend, tmp_path):
    for item, directory in ((backend, tmp_path / "case"), (torch_backend, tmp_path / "torch")):
        directory.mkdir()
        train(item, 2)
        item.save(directory)
        item.load_weights(tiny_model(seed=5).state_dict())
        item.load_optimizer(directory)
    expected = tiny_model(seed=5).state_dict()
    assert_identical(backend.full_state(), {name: expected[name] for name in backend.full_state()})
    assert_same_metrics(*(train(item, 1)[0] for item in (backend, torch_backend)))
    assert_same_weights(backend.full_state(), torch_backend.full_state())


def test_weights_of_another_model_are_refused_and_nothing_changes(backend):
    before = backend.full_state()
    with pytest.raises(WeightsError, match="expected shape"):
        backend.load_weights(tiny_model(intermediate_size=48).state_dict())
    with pytest.raises(WeightsError, match="missing"):
        backend.load_weights({})
    assert_identical(backend.full_state(), before)
    train(backend, 1)


def test_a_gradient_that_is_not_finite_is_left_out_on_all_ranks(backend, torch_backend):
    skipped = []
    for batch in (batch_of(), batch_without_gradient(), batch_of(1)):
        found, expected = (item.step(batch, UPDATE) for item in (backend, torch_backend))
        skipped.append(found.skipped_mini_batches)
        assert found.num_optimizer_steps == expected.num_optimizer_steps
        assert found.grad_norm == pytest.approx(expected.grad_norm, abs=1e-4)
        assert_same_weights(backend.full_state(), torch_backend.full_state())
    assert skipped == [(), (0,), ()]


def test_a_mini_batch_without_a_signal_still_ages_the_moments(backend, torch_backend):
    for batch in (batch_of(), batch_without_signal()):
        found, expected = (item.step(batch, UPDATE) for item in (backend, torch_backend))
        assert_same_metrics(found, expected)
        assert_same_weights(backend.full_state(), torch_backend.full_state())


def test_a_tied_head_stays_tied(backend):
    train(backend, 1)
    state = backend.full_state()
    assert "lm_head.weight" not in state
    model = tiny_model()
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    assert torch.equal(model.lm_head.weight, state["model.embed_tokens.weight"])


def test_copies_of_the_weights_are_independent(backend):
    state = backend.full_state()
    kept = {name: item.clone() for name, item in state.items()}
    train(backend, 1)
    assert_identical(state, kept)
    for item in state.values():
        item.zero_()
    assert any(item.any() for item in backend.full_state().values())


def test_the_architecture_is_known_without_the_ranks(backend):
    assert backend.model.config.hidden_size == 16
    assert type(backend.model).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("stage", [0, 1])
def test_stages_that_split_less_make_the_same_updates_and_resume(
    stage, ray_cluster, torch_backend, tmp_path
):
    """The rest of the contract goes through the code of stage 2, and starting ranks takes long."""
    with closing(Case("deepspeed", 2, stage).make()) as backend:
        backend.build(tiny_model())
        for seed in range(2):
            metrics = backend.step(batch_of(seed), UPDATE)
            assert_same_metrics(metrics, torch_backend.step(batch_of(seed), UPDATE))
            assert_same_weights(backend.full_state(), torch_backend.full_state())
        backend.save(tmp_path)
        expected_metrics = train(backend, 2, first_seed=2)
        expected = backend.full_state()
        backend.load(tmp_path)
        assert train(backend, 2, first_seed=2) == expected_metrics
        assert_identical(backend.full_state(), expected)


def test_closing_ends_the_ranks(case, shared, ray_cluster):
    """Last: the next test that needs them starts new ones."""
    shared.build(tiny_model())
    pids = rank_pids(shared) if case.num_learners > 0 else []
    shared.close()
    wait_until_gone(pids)
    with pytest.raises(RuntimeError):
        shared.full_state()
