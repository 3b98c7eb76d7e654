"""The samplers that the engine is compared with follow pi_mix themselves.

Responses of 3 tokens over a vocabulary of 6 are enumerated under pi_mix. Each chi-square test takes
20,000 samples at a fixed seed with threshold p > 1e-3: a correct sampler fails with probability
1e-3 for a freshly chosen seed, and never by chance for these seeds. Cells that expect fewer than 5
samples are pooled.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from benchmarks.samplers import Algorithm1, Naive, Workload
from mentor_serve.core.entropy import token_entropy
from mentor_serve.core.gate import guidance_weight
from mentor_serve.core.speculative import mix

VOCAB = 6
LENGTH = 3
PROMPT = (3, 1, 4)
SAMPLERS = (Naive, Algorithm1)


@pytest.fixture(scope="module")
def pair(tiny_llama):
    return tiny_llama(11, vocab_size=VOCAB), tiny_llama(12, vocab_size=VOCAB)


def workload(**changes):
    fields = {
        "prompts": (PROMPT,),
        "samples_per_prompt": 2000,
        "new_tokens": LENGTH,
        "gamma": 2.0,
    }
    return Workload(**{**fields, **changes})


def enumerate_mixture(policy, expert, *, gamma, temperature):
    """Probability of every response under pi_mix, by the models' own forward."""
    responses = {(): 1.0}
    for _ in range(LENGTH):
        tokens = torch.tensor([[*PROMPT, *response] for response in responses])
        with torch.no_grad():
            policy_logits = policy(tokens).logits[:, -1].double() / temperature
            expert_logits = expert(tokens).logits[:, -1].double() / temperature
        weights = guidance_weight(token_entropy(policy_logits), gamma)
        mixed = mix(policy_logits.softmax(-1), expert_logits.softmax(-1), weights).tolist()
        responses = {
            (*response, token): mass * probability
            for (response, mass), row in zip(responses.items(), mixed, strict=True)
            for token, probability in enumerate(row)
        }
    return responses


def p_value(token_ids, probabilities):
    counts = Counter(map(tuple, token_ids.tolist()))
    expected = np.array(list(probabilities.values())) * len(token_ids)
    observed = np.array([counts[response] for response in probabilities], dtype=float)
    rare = expected < 5
    expected = np.append(expected[~rare], expected[rare].sum())
    observed = np.append(observed[~rare], observed[rare].sum())
    return chisquare(observed, expected * observed.sum() / expected.sum()).pvalue


def sampled(sampler, **changes):
    """[20000, LENGTH] in ten batches of different seeds."""
    runs = [sampler.run(workload(seed=1000 * batch, **changes)) for batch in range(10)]
    return np.concatenate([run.token_ids for run in runs])


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize(
    ("gamma", "temperature"), [(2.0, 1.0), (0.0, 1.0), (1.2, 0.7)], ids=["gated", "always", "cool"]
)
def test_responses_follow_the_enumerated_mixture(pair, kind, gamma, temperature):
    token_ids = sampled(
        kind(*pair, max_rows=2000, max_tokens=8), gamma=gamma, temperature=temperature
    )
    target = enumerate_mixture(*pair, gamma=gamma, temperature=temperature)
    assert sum(target.values()) == pytest.approx(1.0)
    assert p_value(token_ids, target) > 1e-3


@pytest.mark.parametrize("k", [1, 2])
def test_algorithm_1_is_exact_for_every_draft_length(pair, k):
    token_ids = sampled(Algorithm1(*pair, max_rows=2000, max_tokens=8, k=k))
    assert p_value(token_ids, enumerate_mixture(*pair, gamma=2.0, temperature=1.0)) > 1e-3


def test_the_comparison_rejects_another_gate(pair):
    token_ids = sampled(Algorithm1(*pair, max_rows=2000, max_tokens=8))
    assert p_value(token_ids, enumerate_mixture(*pair, gamma=1.0, temperature=1.0)) < 1e-6


@pytest.mark.parametrize("kind", SAMPLERS)
def test_without_a_gate_every_token_is_the_policys(pair, kind):
    run = kind(*pair, max_rows=2000, max_tokens=8).run(workload(gamma=1e30))
    alone = Naive(pair[0], pair[0], max_rows=2000, max_tokens=8).run(workload())
    assert (run.token_ids == alone.token_ids).all()
    assert run.rolled_back == 0
    assert run.mean_weight == pytest.approx(0.0, abs=1e-20)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_row_depends_neither_on_its_neighbours_nor_on_what_ran_before(pair, kind):
    sampler = kind(*pair, max_rows=40, max_tokens=32)
    crowd = workload(prompts=(PROMPT, (2,)), samples_per_prompt=20, new_tokens=11, gamma=1.0)
    first = sampler.run(crowd)
    alone = sampler.run(workload(samples_per_prompt=1, new_tokens=11, gamma=1.0))
    again = sampler.run(crowd)
    assert (first.token_ids == again.token_ids).all()
    assert (first.token_ids[0] == alone.token_ids[0]).all()


def test_the_naive_sampler_asks_the_expert_at_every_token(pair):
    run = Naive(*pair, max_rows=8, max_tokens=32).run(workload(samples_per_prompt=8, new_tokens=10))
    prompt_pass = 1
    assert run.expert_calls == prompt_pass + 10
    assert run.expert_tokens == len(PROMPT) - 1 + 8 * 10
    assert run.rolled_back == 0


def test_algorithm_1_calls_the_expert_once_for_k_tokens_that_are_all_kept(pair):
    """Policy and expert are one model here, so nothing is ever rejected."""
    policy, _ = pair
    sampler = Algorithm1(policy, policy, max_rows=8, max_tokens=32, k=4)
    run = sampler.run(workload(samples_per_prompt=8, new_tokens=10, gamma=0.0))
    assert run.expert_calls == 1 + 3
    assert run.expert_tokens == len(PROMPT) - 1 + 8 * 10
    assert run.rolled_back == 0
    assert run.mean_weight == pytest.approx(1.0)


def test_algorithm_1_throws_away_what_follows_a_rejection(pair):
    """The expert reads every draft, so what it reads is what is emitted and what is thrown away."""
    run = Algorithm1(*pair, max_rows=50, max_tokens=32).run(
        workload(samples_per_prompt=50, new_tokens=20, gamma=0.5)
    )
    assert run.rolled_back > 0
    assert run.expert_tokens == len(PROMPT) - 1 + 50 * 20 + run.rolled_back
