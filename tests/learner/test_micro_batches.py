"""Packed rows give each response the log-probabilities it has alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_samples import (
    VOCAB,
    leased,
    leased_group,
    random_groups,
    reference_logprobs,
    tiny_model,
)
from torch import nn

from mentor_serve.learner import build_batch, logprobs
from mentor_serve.learner.logprobs import ResponseScorer
from mentor_serve.learner.packing import build_micro_batch, plan_micro_batches


def trajectories_of(groups):
    batch = build_batch(groups, alpha=1.0, policy_version=0)
    return [list(group.trajectories) for group in batch.groups]


def packed_logprobs(model, groups, *, max_tokens, temperature=1.0):
    """trajectory identity -> its log-probabilities, through packing."""
    scorer = ResponseScorer(model, temperature=temperature)
    found = {}
    for rows in plan_micro_batches(groups, max_tokens=max_tokens):
        scored = scorer(build_micro_batch(rows))
        items = [item for row in rows for block in row for item in block]
        counts = [len(item.token_ids) for item in items]
        for item, part in zip(items, torch.split(scored, counts), strict=True):
            found[id(item)] = part
    return found


@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_packed_equals_one_sequence_at_a_time(max_tokens, temperature):
    model = tiny_model().eval()
    groups = trajectories_of(random_groups(model, 5))
    with torch.no_grad():
        found = packed_logprobs(model, groups, max_tokens=max_tokens, temperature=temperature)
        for group in groups:
            for item in group:
                alone = reference_logprobs(
                    model, item.prompt_token_ids.tolist(), item.token_ids.tolist(), temperature
                )
                torch.testing.assert_close(found[id(item)], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_rows_of_one_response_need_no_mask(implementation):
    model = tiny_model(max_position_embeddings=400).eval()
    model.set_attn_implementation(implementation)
    lengths = (300, 280, 260)  # each longer than half of a row, so padded to the longest
    responses = [leased([5 + i % 3 for i in range(n)], index=n) for n in lengths]
    groups = trajectories_of([leased_group(responses)])
    (rows,) = plan_micro_batches(groups, max_tokens=10_000)
    assert build_micro_batch(rows).attention_mask is None
    with torch.no_grad():
        found = packed_logprobs(model, groups, max_tokens=10_000)
        for item in groups[0]:
            alone = reference_logprobs(
                model, item.prompt_token_ids.tolist(), item.token_ids.tolist()
            )
            torch.testing.assert_close(found[id(item)], alone, atol=1e-5, rtol=1e-5)


def test_eager_attention_gives_the_same():
    model = tiny_model().eval()
    groups = trajectories_of(random_groups(model, 2))
    with torch.no_grad():
        expected = packed_logprobs(model, groups, max_tokens=1000)
        model.set_attn_implementation("eager")
        found = packed_logprobs(model, groups, max_tokens=1000)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("has_bias", [False, True], ids=["linear", "any head"])
def test_chunked_logits_give_the_same_values_and_gradients(monkeypatch, has_bias):
    model = tiny_model(tie_word_embeddings=False).eval()
    if has_bias:  # then the head's own forward is called
        model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, VOCAB))
    groups = trajectories_of(random_groups(model, 2))
    results = []
    for size in (1000, 3):
        monkeypatch.setattr(logprobs, "_chunk_size", lambda *_, size=size: size)
        model.zero_grad()
        total = sum(part.sum() for part in packed_logprobs(model, groups, max_tokens=99).values())
        total.backward()
        results.append((total.detach(), [item.grad.clone() for item in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-5)


def test_a_head_that_is_more_than_linear_goes_through_the_models_own_forward():
    model = tiny_model().eval()
    plain_forward = model.forward

    def scaled_forward(*args, **kwargs):
        output = plain_forward(*args, **kwargs)
        output.logits = output.logits * 0.25
        return output

    model.forward = scaled_forward
    groups = trajectories_of(random_groups(tiny_model().eval(), 2))
    with torch.no_grad():
        found = packed_logprobs(model, groups, max_tokens=1000)
        for item in groups[0]:
            alone = reference_logprobs(
                model, item.prompt_token_ids.tolist(), item.token_ids.tolist()
            )
            torch.testing.assert_close(found[id(item)], alone, atol=1e-5, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(
        st.tuples(st.integers(1, 20), st.lists(st.integers(1, 30), max_size=6)), max_size=6
    ),
    max_tokens=st.integers(1, 700),
)
def test_every_response_is_planned_exactly_once_within_the_budget(lengths, max_tokens):
    groups = trajectories_of(
        [
            leased_group(
                [
                    leased([5] * count, prompt=[1] * prompt, index=i)
                    for i, count in enumerate(counts)
                ],
                number=number,
                prompt=[1] * prompt,
            )
            for number, (prompt, counts) in enumerate(lengths)
        ]
    )
    micro_batches = plan_micro_batches(groups, max_tokens=max_tokens)
    planned = [id(t) for rows in micro_batches for row in rows for block in row for t in block]
    assert sorted(planned) == sorted(id(item) for group in groups for item in group)
    for rows in micro_batches:
        shape = build_micro_batch(rows).input_ids.shape
        assert len(rows) == 1 or shape.numel() <= max_tokens


def test_responses_of_a_prompt_share_one_copy_of_it():
    group = leased_group([leased([4, 5, 6], index=i) for i in range(3)])
    (rows,) = plan_micro_batches(trajectories_of([group]), max_tokens=1000)
    # Three prompt tokens once, and two inputs of each response: the last token predicts nothing.
    assert build_micro_batch(rows).input_ids.shape == (1, 3 + 3 * 2)
