"""What is recorded of each token equals a teacher-forced pass of plain transformers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mentor_serve.engines import RolloutRequest, SamplingParams
from mentor_serve.types import TokenSource

from .cases import each_setup
from .response_tree import Gate, tables_along

PROMPTS = ([4, 14, 5, 18], [7], [9, 3] * 12)


def _requests(setup, **options):
    """Three prompts at different temperatures, gates and lengths: [(request, its gate)]."""
    gates = (Gate(gamma=1.5, temperature=0.8), Gate(gamma=0.0), Gate(gamma=4.0, temperature=1.3))
    requests = [
        RolloutRequest(
            prompt_token_ids=prompt * max(1, setup.case.fewest_prompt_tokens // len(prompt)),
            gamma=gate.gamma,
            num_samples=4,
            seed=seed,
            sampling=SamplingParams(
                temperature=gate.temperature, max_new_tokens=10 + 13 * seed, ignore_eos=True
            ),
            **options,
        )
        for seed, (prompt, gate) in enumerate(zip(PROMPTS, gates, strict=True))
    ]
    return list(zip(requests, gates, strict=True))


def _generate(engine, requests):
    """What the engine gives: [(rollout, its request, its gate)]."""
    answers = engine.generate([request for request, _ in requests])
    assert [len(rollouts) for rollouts in answers] == [4] * len(requests)
    return [
        (rollout, request, gate)
        for (request, gate), rollouts in zip(requests, answers, strict=True)
        for rollout in rollouts
    ]


def _tables(pair, rollout, request, gate):
    prompt = list(request.prompt_token_ids)
    whole = [[*prompt, *rollout.token_ids.tolist()]]
    return tables_along(*pair, whole, gate, start=len(prompt))


def _assert_close(recorded, expected, setup):
    seen = ~np.isnan(recorded)
    tolerance = setup.case.logprob_tolerance
    np.testing.assert_allclose(recorded[seen], expected[seen], atol=tolerance, rtol=0)


@each_setup()
@pytest.mark.parametrize("record_mixed", [False, True], ids=["lazily", "everywhere"])
def test_mixed_records_equal_a_teacher_forced_pass(tiny_pair, setup, record_mixed):
    engine = setup.build(*tiny_pair, max_batch_size=5)
    recorded = _generate(engine, _requests(setup, mixed=True, record_mixed=record_mixed))
    for rollout, request, gate in recorded:
        tables = _tables(tiny_pair, rollout, request, gate)
        emitted = np.arange(rollout.num_tokens), rollout.token_ids
        _assert_close(rollout.policy_logprobs, np.log(tables.policy[emitted]), setup)
        _assert_close(rollout.expert_logprobs, np.log(tables.expert[emitted]), setup)
        _assert_close(rollout.mixed_logprobs, np.log(tables.mixed[emitted]), setup)
        _assert_close(rollout.entropies, tables.entropies, setup)
        _assert_close(rollout.weights, tables.weights, setup)
        for name in ("policy_logprobs", "entropies", "weights"):
            assert np.isfinite(getattr(rollout, name)).all()
        looked = np.isfinite(rollout.expert_logprobs)
        np.testing.assert_array_equal(np.isfinite(rollout.mixed_logprobs), looked)
        assert looked[rollout.sources != TokenSource.POLICY].all()
        assert looked.all() or not record_mixed
        assert not rollout.expert_lost
    if not record_mixed:
        unseen = np.concatenate([np.isnan(rollout.expert_logprobs) for rollout, *_ in recorded])
        assert unseen.any()


@each_setup()
def test_interventions_say_what_was_proposed_and_what_was_chosen(tiny_pair, setup):
    engine = setup.build(*tiny_pair, max_batch_size=5)
    recorded = _generate(engine, _requests(setup, mixed=True))
    tolerance = setup.case.logprob_tolerance
    for rollout, request, gate in recorded:
        tables = _tables(tiny_pair, rollout, request, gate)
        replaced = np.flatnonzero(rollout.sources == TokenSource.EXPERT).tolist()
        assert [item.position for item in rollout.interventions] == replaced
        for item in rollout.interventions:
            at, proposed = item.position, item.proposed_token_id
            assert rollout.token_ids[at] == item.chosen_token_id != proposed
            # Only what the policy likes more than the expert is rejected.
            p, q = tables.policy[at], tables.expert[at]
            assert q[proposed] < p[proposed]
            assert q[item.chosen_token_id] > p[item.chosen_token_id]
            for value, expected in (
                (item.policy_logprob, math.log(p[proposed])),
                (item.expert_logprob, math.log(q[proposed])),
                (item.entropy, tables.entropies[at]),
                (item.weight, tables.weights[at]),
            ):
                assert value == pytest.approx(expected, abs=tolerance)


@each_setup()
def test_counts_of_rollouts_and_engine_agree(tiny_pair, setup):
    """Tokens that were rolled back count nowhere but in `rolled_back_tokens`."""
    engine = setup.build(*tiny_pair, max_batch_size=5)
    recorded = _generate(engine, _requests(setup, mixed=True) + _requests(setup, mixed=False))
    rollouts = [rollout for rollout, *_ in recorded]
    for rollout in rollouts:
        assert rollout.num_gated == np.count_nonzero(rollout.sources)
        assert rollout.num_interventions == len(rollout.interventions)
    stats = engine.stats
    assert stats.policy_tokens == sum(rollout.num_tokens for rollout in rollouts)
    assert stats.gated_tokens == sum(rollout.num_gated for rollout in rollouts) > 0
    assert stats.interventions == sum(rollout.num_interventions for rollout in rollouts) > 0


@each_setup()
def test_rollouts_of_the_policy_alone_have_nothing_of_the_expert(tiny_pair, setup):
    engine = setup.build(*tiny_pair, max_batch_size=5)
    for rollout, request, gate in _generate(engine, _requests(setup, mixed=False)):
        tables = _tables(tiny_pair, rollout, request, gate)
        emitted = np.arange(rollout.num_tokens), rollout.token_ids
        _assert_close(rollout.policy_logprobs, np.log(tables.policy[emitted]), setup)
        _assert_close(rollout.entropies, tables.entropies, setup)
        assert np.isnan(rollout.expert_logprobs).all()
        assert np.isnan(rollout.mixed_logprobs).all()
        assert not rollout.weights.any()
        assert not rollout.sources.any()
        assert rollout.interventions == []
    assert engine.stats.expert_calls == 0
