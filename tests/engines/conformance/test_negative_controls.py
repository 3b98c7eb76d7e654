"""The statistics see the mistakes that samplers make; without them a pass would mean little."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kstest

from mentor_serve.engines import RolloutRequest, SamplingParams

from .cases import CASES, SETUPS
from .comparison import (
    FALSE_ALARM,
    by_rank,
    chi_square_p_value,
    conditional_p_value,
    total_variation,
    total_variation_bound,
)
from .reference_samplers import Flaw, sample_leaves
from .response_tree import Gate, ResponseTree

NUM_SAMPLES = 50_000
PROMPT = (3, 1, 4)
EOS = 5


@pytest.fixture(scope="module")
def tree(small_pair):
    return ResponseTree(
        *small_pair,
        PROMPT,
        Gate(gamma=2.0),
        max_new_tokens=3,
        ends=lambda response: response[-1] == EOS,
    )


def test_every_response_is_enumerated_once(tree):
    going = [token for token in range(6) if token != EOS]
    expected = {(EOS,)} | {(a, EOS) for a in going}
    expected |= {(a, b, c) for a in going for b in going for c in range(6)}
    assert set(tree.responses) == expected
    assert len(tree.responses) == len(expected)
    assert tree.probabilities.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(tree.tables.sourced.sum(axis=1), tree.tables.mixed, atol=1e-12)


def test_a_correct_lazy_sampler_passes(tree):
    """Fails with probability 2 * `FALSE_ALARM` on a fresh seed."""
    counts = sample_leaves(tree, NUM_SAMPLES, np.random.default_rng(1))
    assert chi_square_p_value(counts, tree.probabilities) > FALSE_ALARM
    bound = total_variation_bound(NUM_SAMPLES, len(counts))
    assert total_variation(counts, tree.probabilities) < bound


@pytest.mark.parametrize("flaw", list(Flaw), ids=lambda flaw: flaw.name)
def test_each_flaw_is_rejected(tree, flaw):
    """At the sample size of the conformance tests, far beyond any doubt."""
    counts = sample_leaves(tree, NUM_SAMPLES, np.random.default_rng(2), flaw)
    assert chi_square_p_value(counts, tree.probabilities) < 1e-12


def test_an_engine_is_rejected_where_the_first_token_should_have_come_from_the_expert(
    small_pair, tree
):
    setup = SETUPS[0]
    assert setup.case is CASES[0]
    engine = setup.build(*small_pair, max_batch_size=setup.case.max_batch_size, eos_token_ids=[EOS])
    request = RolloutRequest(
        prompt_token_ids=PROMPT,
        mixed=True,
        gamma=2.0,
        num_samples=NUM_SAMPLES // 5,
        sampling=SamplingParams(max_new_tokens=3),
    )
    (rollouts,) = engine.generate([request])
    counts = tree.count(rollout.token_ids.tolist() for rollout in rollouts)
    wrong = tree.tables.mixed.copy()
    wrong[0] = tree.tables.expert[0]
    assert chi_square_p_value(counts, tree.probabilities) > FALSE_ALARM
    assert chi_square_p_value(counts, tree.leaf_probabilities(wrong)) < 1e-12


@pytest.mark.parametrize("flaw", list(Flaw), ids=lambda flaw: flaw.name)
def test_each_flaw_is_rejected_token_by_token(tree, flaw):
    """By the statistic for responses that are too long to enumerate."""
    counts = sample_leaves(tree, NUM_SAMPLES, np.random.default_rng(3), flaw)
    nodes, tokens = tree.steps(counts)
    tables = tree.tables[nodes]
    assert conditional_p_value(*by_rank(tokens, tables.mixed, tables.ranks)) < 1e-12


def test_the_token_by_token_statistic_has_the_distribution_that_it_claims(tree):
    """100 p-values of a correct sampler against the uniform: fails with `FALSE_ALARM` on a fresh
    seed (Kolmogorov and Smirnov, exact).
    """
    rng = np.random.default_rng(4)
    p_values = []
    for _ in range(100):
        nodes, tokens = tree.steps(sample_leaves(tree, 1000, rng))
        tables = tree.tables[nodes]
        p_values.append(conditional_p_value(*by_rank(tokens, tables.mixed, tables.ranks)))
    assert kstest(p_values, "uniform").pvalue > FALSE_ALARM
