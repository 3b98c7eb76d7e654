"""ExpertServer: answers against a plain forward pass, cached prefixes, eviction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from mentor_serve.engines.base import ExpertQuery
from mentor_serve.engines.expert import ExpertServer
from mentor_serve.errors import InvalidRequest

LONG = tuple(2 + i % 29 for i in range(30))


def query(sequence_id, token_ids, *, proposed=5, temperature=1.0, seed=0, num_samples=8):
    return ExpertQuery(
        sequence_id=sequence_id,
        token_ids=token_ids,
        proposed_token_id=proposed,
        temperature=temperature,
        seed=seed,
        num_samples=num_samples,
    )


def plain(model, token_ids, temperature=1.0):
    with torch.no_grad():
        return (model(torch.tensor([token_ids])).logits[0, -1] / temperature).log_softmax(-1)


def assert_answers(model, queries, answers):
    for asked, answer in zip(queries, answers, strict=True):
        expected = plain(model, asked.token_ids, asked.temperature)
        assert answer.proposed_logprob == pytest.approx(
            float(expected[asked.proposed_token_id]), abs=1e-4
        )
        assert len(answer.sample_token_ids) == asked.num_samples
        np.testing.assert_allclose(
            answer.sample_logprobs, expected[list(answer.sample_token_ids)].numpy(), atol=1e-4
        )


def test_a_growing_sequence_is_read_once(tiny_llama):
    model = tiny_llama(2)
    server = ExpertServer(model)
    for length in (5, 6, 12, 30):
        asked = [query(1, LONG[:length], temperature=0.7, proposed=length)]
        assert_answers(model, asked, server.advise(asked))
    assert server.slots.num_tokens_read == 30
    # Asked again at the same place, only the last token is read anew.
    server.advise([query(1, LONG)])
    assert server.slots.num_tokens_read == 31


def test_a_sequence_that_branched_is_read_from_the_branch(tiny_llama):
    model = tiny_llama(2)
    server = ExpertServer(model)
    server.advise([query(1, LONG)])
    branched = [query(1, (*LONG[:20], 3, 3, 3))]
    assert_answers(model, branched, server.advise(branched))
    assert server.slots.num_tokens_read == 30 + 3


def test_sequences_of_one_prompt_read_it_once(tiny_llama):
    model = tiny_llama(2)
    server = ExpertServer(model)
    asked = [query(i, (*LONG, 4 + i, 9)[: 31 + i % 2], num_samples=i) for i in range(4)]
    assert_answers(model, asked, server.advise(asked))
    # The first reads 31; the others at most the two tokens beyond the prompt.
    assert server.slots.num_tokens_read <= 31 + 3 * 2
    later = [query(9, (*LONG, 8))]
    before = server.slots.num_tokens_read
    assert_answers(model, later, server.advise(later))
    assert server.slots.num_tokens_read == before + 1


def test_more_sequences_than_slots_evict_the_least_recent(tiny_llama):
    model = tiny_llama(2)
    server = ExpertServer(model, max_sequences=3)
    asked = [query(i, (2 + i, *LONG[:12])) for i in range(8)]
    assert_answers(model, asked, server.advise(asked))
    before = server.slots.num_tokens_read
    server.advise([asked[7]])
    assert server.slots.num_tokens_read == before + 1
    server.advise([asked[0]])
    assert server.slots.num_tokens_read == before + 1 + 13


def test_one_sequence_may_occur_twice_in_a_call(tiny_llama):
    model = tiny_llama(2)
    asked = [query(1, LONG[:9]), query(2, LONG[:4]), query(1, LONG[:11])]
    assert_answers(model, asked, ExpertServer(model).advise(asked))


def test_released_sequences_are_forgotten(tiny_llama):
    server = ExpertServer(tiny_llama(2), max_sequences=2)
    server.advise([query(1, LONG)])
    server.release([1, 77])
    server.advise([query(1, LONG)])
    assert server.slots.num_tokens_read == 60


def test_samples_follow_the_expert_and_depend_on_the_seed_alone(tiny_llama):
    """Chi-square of 20,000 samples at a fixed seed, p > 1e-3."""
    model = tiny_llama(2)
    server = ExpertServer(model)
    (many,) = server.advise([query(1, LONG[:6], num_samples=20_000, temperature=2.0)])
    counts = np.bincount(many.sample_token_ids, minlength=32)
    expected = plain(model, LONG[:6], 2.0).exp().double().numpy() * 20_000
    frequent = expected >= 5
    observed = np.append(counts[frequent], counts[~frequent].sum())
    pooled = np.append(expected[frequent], expected[~frequent].sum())
    kept = pooled > 0
    assert observed[~kept].sum() == 0
    expected = pooled[kept] * observed.sum() / pooled.sum()
    assert chisquare(observed[kept], expected).pvalue > 1e-3
    (same,), (other,) = (
        server.advise([query(3, LONG[:6], seed=seed, temperature=2.0)]) for seed in (0, 1)
    )
    assert same.sample_token_ids == many.sample_token_ids[:8]
    assert other.sample_token_ids != same.sample_token_ids


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"token_ids": ()}, "1 to 256 tokens"),
        ({"token_ids": (99,)}, "0 to 31"),
        ({"token_ids": (3,), "proposed": 32}, "0 to 31"),
        ({"token_ids": (3,), "temperature": 0.0}, "temperature"),
    ],
)
def test_impossible_queries_are_refused(tiny_llama, wrong, message):
    with pytest.raises(InvalidRequest, match=message):
        ExpertServer(tiny_llama(2)).advise([query(1, **wrong)])


def test_no_queries_get_no_answers(tiny_llama):
    assert ExpertServer(tiny_llama(2)).advise([]) == []
