"""Whole responses follow pi_mix, enumerated: 20,000 samples or more of up to three tokens.

Every p-value is compared with `FALSE_ALARM`: a correct engine fails one of these tests on a fresh
seed with that probability (for the chi-square tests up to their approximation), and never on the
seeds given here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from mentor_serve.engines import Rollout, RolloutRequest, SamplingParams
from mentor_serve.types import StopReason, TokenSource

from .cases import CASES, Setup
from .comparison import (
    FALSE_ALARM,
    binomial_z,
    chi_square_p_value,
    total_variation,
    total_variation_bound,
)
from .response_tree import Gate, ResponseTree

LENGTH = 3
EOS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One mixed request of the small pair."""

    name: str
    gate: Gate
    prompt: tuple[int, ...] = (3, 1, 4)
    record_mixed: bool = False
    stop_token_ids: tuple[int, ...] = ()

    def ends(self, response: tuple[int, ...]) -> bool:
        return response[-1] == EOS or response[-1] in self.stop_token_ids

    def request(self, *, seed: int, num_samples: int) -> RolloutRequest:
        return RolloutRequest(
            prompt_token_ids=self.prompt,
            mixed=True,
            gamma=self.gate.gamma,
            num_samples=num_samples,
            seed=seed,
            sampling=SamplingParams(
                temperature=self.gate.temperature,
                max_new_tokens=LENGTH,
                stop_token_ids=self.stop_token_ids,
            ),
            record_mixed=self.record_mixed,
        )


GATED = Scenario(name="gated", gate=Gate(gamma=2.0))
ALWAYS_GATED = Scenario(
    name="always gated after one token", gate=Gate(gamma=0.0, temperature=1.5), prompt=(2,)
)
RECORDED = Scenario(
    name="cool, recorded, with a stop token",
    gate=Gate(gamma=1.2, temperature=0.7),
    record_mixed=True,
    stop_token_ids=(2,),
)
RARELY_GATED = Scenario(name="rarely gated", gate=Gate(gamma=12.0), prompt=(0, 2))

# Each scenario with a setting of run_ahead, by its place in the case; every setting has one. Not
# all products: no setting may change what is sampled, and test_seeds holds engines to that.
_PAIRS = ((GATED, 1), (RECORDED, 2), (ALWAYS_GATED, 1), (RARELY_GATED, 0))


def _sampled_pairs() -> list[tuple[Scenario, Setup]]:
    return [
        (scenario, Setup(case=case, run_ahead=case.run_aheads[place % len(case.run_aheads)]))
        for case in CASES
        for scenario, place in _PAIRS[: case.num_scenarios]
        if case.has_float32
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What an engine gave, and what it should have given."""

    scenario: Scenario
    setup: Setup
    rollouts: list[Rollout]
    tree: ResponseTree

    @property
    def counts(self):
        return self.tree.count(rollout.token_ids.tolist() for rollout in self.rollouts)


@pytest.fixture(
    scope="module",
    params=_sampled_pairs(),
    ids=lambda pair: f"{pair[0].name}, {pair[1]}",
)
def sampled(request, small_pair):
    scenario, setup = request.param
    tree = ResponseTree(
        *small_pair, scenario.prompt, scenario.gate, max_new_tokens=LENGTH, ends=scenario.ends
    )
    engine = setup.build(*small_pair, max_batch_size=setup.case.max_batch_size, eos_token_ids=[EOS])
    asked = scenario.request(seed=setup.seed, num_samples=setup.case.num_samples)
    (rollouts,) = engine.generate([asked])
    assert not any(rollout.expert_lost for rollout in rollouts)
    return Sampled(scenario=scenario, setup=setup, rollouts=rollouts, tree=tree)


def test_responses_follow_the_enumerated_mixture(sampled):
    """Chi-square over all responses."""
    assert len(sampled.rollouts) == sampled.setup.case.num_samples
    assert chi_square_p_value(sampled.counts, sampled.tree.probabilities) > FALSE_ALARM


def test_a_gamma_of_zero_means_the_expert_alone(sampled):
    """So that the chi-square test above compares with the enumerated pi* there."""
    tree = sampled.tree
    is_expert = np.allclose(tree.leaf_probabilities(tree.tables.expert), tree.probabilities)
    assert is_expert == (sampled.scenario.gate.gamma == 0)
    always = all((rollout.weights == 1).all() for rollout in sampled.rollouts)
    assert always == is_expert


def test_total_variation_is_within_its_sampling_bound(sampled):
    """Fails with probability below `FALSE_ALARM` on a fresh seed, without approximation."""
    counts, probabilities = sampled.counts, sampled.tree.probabilities
    bound = total_variation_bound(len(sampled.rollouts), np.count_nonzero(probabilities))
    assert total_variation(counts, probabilities) < bound


def test_the_first_token_and_who_chose_it(sampled):
    """Chi-square over source and token together, at the first position after the prompt."""
    sources = np.array([rollout.sources[0] for rollout in sampled.rollouts], np.int64)
    tokens = np.array([rollout.token_ids[0] for rollout in sampled.rollouts], np.int64)
    expected = sampled.tree.tables[:1].sourced.ravel()
    counts = np.bincount(sources * sampled.tree.vocab_size + tokens, minlength=len(expected))
    assert chi_square_p_value(counts, expected) > FALSE_ALARM


def test_the_first_token_is_replaced_at_rate_w_times_total_variation(sampled):
    """Binomial: |z| < 3.9 fails with probability 1e-4 on a fresh seed."""
    table = sampled.tree.tables[:1]
    rate = table.weights * 0.5 * np.abs(table.policy - table.expert).sum(axis=1)
    count = sum(rollout.sources[0] == TokenSource.EXPERT for rollout in sampled.rollouts)
    assert abs(binomial_z(count, np.repeat(rate, len(sampled.rollouts)))) < 3.9


def test_lengths_follow_the_enumeration(sampled):
    """Chi-square over the number of tokens."""
    expected = np.bincount(sampled.tree.lengths(), weights=sampled.tree.probabilities)
    counts = np.bincount([rollout.num_tokens for rollout in sampled.rollouts], minlength=LENGTH + 1)
    assert chi_square_p_value(counts, expected) > FALSE_ALARM


def test_a_response_ends_where_it_must_and_says_why(sampled):
    for rollout in sampled.rollouts:
        *before, last = rollout.token_ids.tolist()
        assert not {EOS, *sampled.scenario.stop_token_ids} & {*before}
        if last == EOS:
            assert rollout.stop_reason is StopReason.EOS
        elif last in sampled.scenario.stop_token_ids:
            assert rollout.stop_reason is StopReason.STOP
        else:
            assert rollout.stop_reason is StopReason.LENGTH
            assert rollout.num_tokens == LENGTH
