"""The sampler against pi_mix, enumerated over every sequence of a tiny vocabulary.

Each comparison is a chi-square test of 20,000 samples at a fixed seed with threshold p > 1e-3: a
correct sampler fails with probability 1e-3 for a freshly chosen seed, and never by chance for
these seeds. Cells that expect fewer than 5 samples are pooled.
"""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from mentor_serve.core.entropy import token_entropy
from mentor_serve.core.gate import guidance_weight
from mentor_serve.core.speculative import mix
from mentor_serve.engines import RolloutRequest, SamplingParams, TorchEngine
from mentor_serve.engines.expert import ExpertServer
from mentor_serve.types import TokenSource

NUM_SAMPLES = 20_000
PROMPT = (3, 1, 4)
VOCAB = 6
LENGTH = 3
EOS = 5


@pytest.fixture(scope="module")
def pair(tiny_llama):
    return tiny_llama(11, vocab_size=VOCAB), tiny_llama(12, vocab_size=VOCAB)


def enumerate_mixture(policy, expert, *, gamma, temperature, first_from_expert=False):
    """Probability of every response (ending at EOS or after LENGTH tokens) under pi_mix."""
    prefixes, finished = {(): 1.0}, {}
    for position in range(LENGTH):
        tokens = torch.tensor([[*PROMPT, *prefix] for prefix in prefixes])
        with torch.no_grad():
            policy_logits = policy(tokens).logits[:, -1].double() / temperature
            expert_logits = expert(tokens).logits[:, -1].double() / temperature
        weights = guidance_weight(token_entropy(policy_logits), gamma)
        if first_from_expert and position == 0:
            weights = torch.ones_like(weights)
        mixed = mix(policy_logits.softmax(-1), expert_logits.softmax(-1), weights).tolist()
        extended = {}
        for (prefix, mass), row in zip(prefixes.items(), mixed, strict=True):
            for token, probability in enumerate(row):
                target = finished if token == EOS or position == LENGTH - 1 else extended
                target[(*prefix, token)] = mass * probability
        prefixes = extended
    return finished


def p_value(rollouts, probabilities):
    counts = Counter(tuple(rollout.token_ids.tolist()) for rollout in rollouts)
    assert counts.keys() <= probabilities.keys()
    expected = np.array(list(probabilities.values())) * len(rollouts)
    observed = np.array([counts[sequence] for sequence in probabilities], dtype=float)
    rare = expected < 5
    expected = np.append(expected[~rare], expected[rare].sum())
    observed = np.append(observed[~rare], observed[rare].sum())
    kept = expected > 0
    return chisquare(observed[kept], expected[kept] * observed.sum() / expected.sum()).pvalue


def sample(engine, *, gamma, temperature=1.0, seed=0, record_mixed=False):
    request = RolloutRequest(
        prompt_token_ids=PROMPT,
        mixed=True,
        gamma=gamma,
        num_samples=NUM_SAMPLES,
        seed=seed,
        sampling=SamplingParams(temperature=temperature, max_new_tokens=LENGTH),
        record_mixed=record_mixed,
    )
    return engine.generate([request])[0]


@pytest.fixture(scope="module")
def gated_rollouts(pair):
    engine = TorchEngine(*pair, max_batch_size=2000, eos_token_ids=[EOS])
    return sample(engine, gamma=2.0)


def test_colocated_sampling_follows_the_enumerated_mixture(pair, gated_rollouts):
    target = enumerate_mixture(*pair, gamma=2.0, temperature=1.0)
    assert sum(target.values()) == pytest.approx(1.0)
    assert p_value(gated_rollouts, target) > 1e-3


@pytest.mark.parametrize(
    ("gamma", "temperature", "record_mixed"),
    [(0.0, 1.0, False), (1.2, 0.7, True)],
    ids=["always gated", "cool and recorded"],
)
def test_other_gates_follow_their_mixtures(pair, gamma, temperature, record_mixed):
    engine = TorchEngine(*pair, max_batch_size=2000, eos_token_ids=[EOS])
    rollouts = sample(engine, gamma=gamma, temperature=temperature, record_mixed=record_mixed)
    target = enumerate_mixture(*pair, gamma=gamma, temperature=temperature)
    assert p_value(rollouts, target) > 1e-3


def test_a_remote_expert_gives_the_enumerated_mixture_by_thinning(pair):
    policy, expert = pair
    server = ExpertServer(expert, max_sequences=2000)
    engine = TorchEngine(policy, server, max_batch_size=2000, eos_token_ids=[EOS])
    rollouts = sample(engine, gamma=2.0)
    assert p_value(rollouts, enumerate_mixture(*pair, gamma=2.0, temperature=1.0)) > 1e-3
    assert not any(rollout.expert_lost for rollout in rollouts)


def test_the_comparison_rejects_a_first_token_that_comes_from_the_expert(pair, gated_rollouts):
    wrong = enumerate_mixture(*pair, gamma=2.0, temperature=1.0, first_from_expert=True)
    assert p_value(gated_rollouts, wrong) < 1e-12


def test_replacements_happen_at_rate_w_times_total_variation(pair, gated_rollouts):
    """The first token's replacement count is binomial: |z| < 4 fails 1 in 16,000 fresh seeds."""
    policy, expert = pair
    with torch.no_grad():
        prompt = torch.tensor([PROMPT])
        p = policy(prompt).logits[0, -1].double().softmax(-1)
        q = expert(prompt).logits[0, -1].double().softmax(-1)
    weight = float(guidance_weight(token_entropy(p.log()), 2.0))
    rate = weight * 0.5 * float((p - q).abs().sum())
    count = sum(rollout.sources[0] == TokenSource.EXPERT for rollout in gated_rollouts)
    assert abs(count - NUM_SAMPLES * rate) < 4 * (NUM_SAMPLES * rate * (1 - rate)) ** 0.5


def test_all_responses_are_enumerated(pair):
    target = enumerate_mixture(*pair, gamma=2.0, temperature=1.0)
    one = {(EOS,)}
    two = {(a, EOS) for a in range(EOS)}
    three = {(a, b, c) for a, b in itertools.product(range(EOS), repeat=2) for c in range(VOCAB)}
    assert target.keys() == one | two | three
