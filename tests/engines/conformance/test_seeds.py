"""A rollout is a function of its prompt, seed and index: neighbours and schedules leave no trace.

Rounding depends on the shape of a batch, and a uniform that falls that close (1e-7) to an edge of
the distribution function gives another token: about once in ten million draws, of which a test here
makes some thousands. The seeds are fixed.
"""

from __future__ import annotations

import math

import pytest

from mentor_serve.engines import RolloutRequest, SamplingParams
from mentor_serve.types import StopReason

from .cases import Setup, each_case, each_setup


def _requests(case, **options):
    """Mixed and plain requests of different prompts, gates and lengths, two samples each."""
    return [
        RolloutRequest(
            prompt_token_ids=[3 + index] * max(case.fewest_prompt_tokens, 1 + 4 * index),
            seed=index,
            num_samples=2,
            gamma=(0.0, 1.0, 3.0)[index % 3],
            sampling=SamplingParams(
                temperature=1.0 + 0.1 * index, max_new_tokens=4 + 6 * index, ignore_eos=True
            ),
            **{"mixed": index % 4 != 3, **options},
        )
        for index in range(4)
    ]


def _tokens(answers):
    return [[rollout.token_ids.tolist() for rollout in rollouts] for rollouts in answers]


@each_setup("is_reproducible")
def test_a_sample_is_the_same_alone_and_in_any_crowd(tiny_pair, setup):
    requests = _requests(setup.case)
    alone = [setup.build(*tiny_pair, max_batch_size=1).generate([asked])[0] for asked in requests]
    assert all(first != second for first, second in _tokens(alone))
    for max_batch_size in (3, 64):
        together = setup.build(*tiny_pair, max_batch_size=max_batch_size).generate(requests)
        assert _tokens(together) == _tokens(alone)


@each_setup("is_reproducible")
def test_cancelled_neighbours_leave_no_trace(tiny_pair, setup):
    doomed = RolloutRequest(
        prompt_token_ids=[8, 2, 8],
        mixed=True,
        gamma=1.0,
        num_samples=5,
        seed=99,
        sampling=SamplingParams(max_new_tokens=60, ignore_eos=True),
    )
    engine = setup.build(*tiny_pair, max_batch_size=9)
    first = engine.submit(doomed)
    kept = {engine.submit(asked): index for index, asked in enumerate(_requests(setup.case))}
    second = engine.submit(doomed)
    finished: dict[int, dict[int, list[int]]] = {request_id: {} for request_id in kept}
    cancelled = 0
    for num_steps in range(10_000):
        if not engine.has_unfinished():
            break
        if num_steps in (3, 7):
            engine.cancel(first if num_steps == 3 else second)
        for output in engine.step():
            if output.finished is None:
                continue
            if output.request_id in kept:
                tokens = output.finished.token_ids.tolist()
                finished[output.request_id][output.sample_index] = tokens
            else:
                assert output.finished.stop_reason is StopReason.CANCELLED
                cancelled += 1
    assert not engine.has_unfinished()
    assert cancelled == 10
    survivors = [[samples[0], samples[1]] for samples in finished.values()]
    assert survivors == _tokens(setup.build(*tiny_pair).generate(_requests(setup.case)))


@each_case("is_reproducible")
def test_the_schedule_changes_no_token(tiny_pair, case):
    outputs = [
        _tokens(Setup(case=case, run_ahead=run_ahead).build(*tiny_pair).generate(_requests(case)))
        for run_ahead in (*case.run_aheads, *(1, 1000) * (len(case.run_aheads) > 1))
    ]
    assert all(tokens == outputs[0] for tokens in outputs)


@each_setup("is_reproducible")
def test_recording_changes_no_token(tiny_pair, setup):
    lazily, everywhere = (
        setup.build(*tiny_pair).generate(
            _requests(setup.case, mixed=True, record_mixed=record_mixed)
        )
        for record_mixed in (False, True)
    )
    assert _tokens(lazily) == _tokens(everywhere)


@each_setup("is_reproducible")
@pytest.mark.parametrize("gamma", [1e30, math.inf])
def test_a_closed_gate_samples_the_policy_token_for_token(tiny_pair, setup, gamma):
    engine = setup.build(*tiny_pair)
    options = {
        "prompt_token_ids": [4, 14, 5],
        "num_samples": 6,
        "seed": 4,
        "sampling": SamplingParams(max_new_tokens=24, ignore_eos=True),
    }
    mixed, plain = engine.generate(
        [RolloutRequest(mixed=True, gamma=gamma, **options), RolloutRequest(**options)]
    )
    assert _tokens([mixed]) == _tokens([plain])
    for rollout in mixed:
        assert rollout.num_gated == 0
        assert rollout.weights == pytest.approx(0.0, abs=1e-29)
    assert engine.stats.expert_calls == 0
