"""The learner's step and what it is compared with: all make the same update of the same batch."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from benchmarks import updates
from benchmarks.update_batches import (
    NUM_MIXED,
    NUM_ON_POLICY,
    BatchShape,
    num_response_tokens,
    random_batch,
)
from benchmarks.updates import TrlUnavailable, our_step, pad_batch, padded_step, trl_step
from benchmarks.vocabulary_memory import vocabulary_model

RAGGED = BatchShape(num_groups=2, prompt_tokens=5, shortest=3, longest=20)
EQUAL = BatchShape(num_groups=2, prompt_tokens=5, shortest=9, longest=9)
MAX_TOKENS = 70
"""Cuts both batches into several micro-batches."""


@pytest.fixture
def plain_gradient_steps(monkeypatch):
    """Steps move weights by the clipped gradient itself, so that weights compare gradients."""

    def plain(model):
        return torch.optim.SGD(model.parameters(), lr=1.0)

    monkeypatch.setattr(updates, "_prepare", plain)


def assert_same_step(model, batch, make, other):
    """Both find the same loss and leave the same weights, which are not those before."""
    before = copy.deepcopy(model.state_dict())
    mine, theirs = copy.deepcopy(model), copy.deepcopy(model)
    loss = make(mine)(batch)
    assert math.isfinite(loss)
    assert other(theirs)(batch) == pytest.approx(loss, abs=1e-5)
    changed = False
    for name, tensor in mine.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], tensor, rtol=0, atol=2e-5)
        changed |= (tensor - before[name]).abs().max().item() > 1e-3
    assert changed


def ours(model):
    return our_step(model, max_tokens=MAX_TOKENS)


@pytest.mark.usefixtures("plain_gradient_steps")
@pytest.mark.parametrize("shape", [RAGGED, EQUAL], ids=["ragged", "equal"])
def test_the_padded_step_is_ours(tiny_llama, shape):
    model = tiny_llama(1)
    batch = random_batch(model, shape)
    assert_same_step(model, batch, ours, lambda other: padded_step(other, max_tokens=MAX_TOKENS))


@pytest.mark.usefixtures("plain_gradient_steps")
@pytest.mark.filterwarnings("default")  # TRL's own
@pytest.mark.parametrize("shape", [RAGGED, EQUAL], ids=["ragged", "equal"])
def test_the_step_of_trl_is_ours(tiny_llama, tiny_tokenizer, shape):
    pytest.importorskip("trl")
    model = tiny_llama(1)
    batch = random_batch(model, shape)
    assert_same_step(
        model,
        batch,
        ours,
        lambda other: trl_step(other, tiny_tokenizer, max_tokens=MAX_TOKENS),
    )


def test_without_trl_the_message_says_what_to_install(tiny_llama, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(updates, "find_spec", lambda name: None)
    with pytest.raises(TrlUnavailable, match=r"mentor-serve\[benchmark\]"):
        trl_step(tiny_llama(1), tiny_tokenizer, max_tokens=MAX_TOKENS)


def test_every_trajectory_of_a_batch_has_an_advantage_and_is_near_the_model(tiny_llama):
    batch = random_batch(tiny_llama(1), RAGGED)
    assert len(batch.groups) == 2
    for group in batch.groups:
        assert len(group.trajectories) == NUM_ON_POLICY + NUM_MIXED
        assert sum(item.is_mixed for item in group.trajectories) == NUM_MIXED
        assert all(item.advantage != 0 for item in group.trajectories)
        assert all(3 <= len(item.token_ids) <= 20 for item in group.trajectories)
        assert len({tuple(item.prompt_token_ids) for item in group.trajectories}) == 1
    items = [item for group in batch.groups for item in group.trajectories]
    assert len({len(item.token_ids) for item in items}) > 5
    again = random_batch(tiny_llama(1), RAGGED)
    assert [list(item.token_ids) for item in items] == [
        list(item.token_ids) for group in again.groups for item in group.trajectories
    ]


def test_padding_keeps_every_token_once_and_masks_the_rest(tiny_llama):
    batch = random_batch(tiny_llama(1), RAGGED)
    rows = pad_batch(batch, torch.device("cpu"))
    assert rows["completion_ids"].shape[0] == 2 * (NUM_ON_POLICY + NUM_MIXED)
    assert int(rows["completion_mask"].sum()) == num_response_tokens(batch)
    parts = list(updates._micro_batches(rows, MAX_TOKENS))
    assert len(parts) > 1
    assert all(
        part["completion_ids"].numel() + part["prompt_ids"].numel() <= MAX_TOKENS for part in parts
    )
    assert torch.equal(torch.cat([part["advantages"] for part in parts]), rows["advantages"])


def test_models_of_other_vocabularies_differ_in_their_table_alone():
    small, large = vocabulary_model(32), vocabulary_model(1024)
    shapes = {name: item.shape for name, item in small.named_parameters()}
    others = {name: item.shape for name, item in large.named_parameters()}
    assert {name for name in shapes if shapes[name] != others[name]} == {
        "model.embed_tokens.weight"
    }
