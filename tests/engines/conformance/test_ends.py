"""Where responses end: never too late, never because of a token that was rolled back."""

from __future__ import annotations

import numpy as np
import pytest

from mentor_serve.engines import RolloutRequest, SamplingParams
from mentor_serve.types import StopReason, TokenSource

from .cases import each_setup
from .comparison import FALSE_ALARM, chi_square_p_value
from .response_tree import Gate, ResponseTree

A, B, C, D, E, EOS = range(6)
SURE = 40.0
"""A logit that leaves every other token a probability of 1e-17."""


@each_setup("has_float32")
def test_lengths_with_a_stop_string_follow_the_enumeration(small_pair, small_tokenizer, setup):
    """3000 samples; chi-square fails on a fresh seed with probability `FALSE_ALARM`.

    "bb" and "ca" each straddle two tokens, so that the policy may run past their first halves.
    """
    stops = {(B, B), (C, A)}
    tree = ResponseTree(
        *small_pair,
        (D, B),
        Gate(gamma=2.0),
        max_new_tokens=4,
        ends=lambda response: response[-1] == EOS or response[-2:] in stops,
    )
    engine = setup.build(
        *small_pair,
        tokenizer=small_tokenizer,
        max_batch_size=setup.case.max_batch_size,
        eos_token_ids=[EOS],
    )
    request = RolloutRequest(
        prompt_token_ids=(D, B),
        mixed=True,
        gamma=2.0,
        num_samples=3000,
        seed=setup.seed,
        sampling=SamplingParams(max_new_tokens=4, stop=("bb", "ca")),
    )
    (rollouts,) = engine.generate([request])
    responses = [tuple(rollout.token_ids.tolist()) for rollout in rollouts]
    # Raises if a response goes on after its end, or ends before it.
    tree.count(responses)
    for response, rollout in zip(responses, rollouts, strict=True):
        stopped = response[-2:] in stops
        expected = StopReason.LENGTH if response[-1] != EOS else StopReason.EOS
        assert rollout.stop_reason is (StopReason.STOP if stopped else expected)
    observed = [(len(response), response[-2:] in stops) for response in responses]
    predicted = [(len(response), response[-2:] in stops) for response in tree.responses]
    cells = sorted(set(predicted))
    counts = np.array([observed.count(cell) for cell in cells])
    expected = np.zeros(len(cells))
    np.add.at(expected, [cells.index(cell) for cell in predicted], tree.probabilities)
    assert chi_square_p_value(counts, expected) > FALSE_ALARM


def _logits(follower: dict[int, int]) -> list[list[float]]:
    """A Markov chain that goes from each token surely to its follower, by default to B."""
    return [[SURE * (token == follower.get(last, B)) for token in range(6)] for last in range(6)]


# The prompt ends in A, the expert goes to B for ever, and it is always asked.
TRAPS = {
    "an end token in the tail": ({A: C, C: EOS}, {}),
    "an end token far down the tail": ({A: C, C: D, D: EOS}, {}),
    "a stop token in the tail": ({A: C, C: D}, {"stop_token_ids": (D,)}),
    "a stop string in the tail": ({A: C, C: D, D: E}, {"stop": ("de",)}),
    "a stop string half in the tail": ({A: C, C: D}, {"stop": ("cd",)}),
    "an end token that is itself rejected": ({A: EOS}, {}),
}


@each_setup("has_float32")
@pytest.mark.parametrize("name", list(TRAPS))
def test_an_end_that_is_rolled_back_ends_nothing(markov_model, small_tokenizer, setup, name):
    follower, ends = TRAPS[name]
    engine = setup.build(
        markov_model(_logits(follower)),
        markov_model(_logits({})),
        tokenizer=small_tokenizer,
        max_batch_size=8,
        eos_token_ids=[EOS],
    )
    request = RolloutRequest(
        prompt_token_ids=(E, A),
        mixed=True,
        gamma=0.0,
        num_samples=16,
        seed=5,
        sampling=SamplingParams(max_new_tokens=6, **ends),
    )
    (rollouts,) = engine.generate([request])
    for rollout in rollouts:
        assert rollout.token_ids.tolist() == [B] * 6
        assert rollout.stop_reason is StopReason.LENGTH
        assert rollout.sources[0] == TokenSource.EXPERT
        assert rollout.text == "b" * 6
        assert rollout.interventions[0].proposed_token_id == follower[A]
    if setup.run_ahead == 3 and "tail" in name:
        assert engine.stats.rolled_back_tokens >= len(rollouts)


@each_setup("has_float32")
def test_an_end_chosen_by_the_expert_drops_the_tail(markov_model, setup):
    """The policy would go on for ever, and has run on; the expert ends at once."""
    engine = setup.build(
        markov_model(_logits({})),
        markov_model(_logits({A: EOS})),
        max_batch_size=8,
        eos_token_ids=[EOS],
    )
    request = RolloutRequest(
        prompt_token_ids=(A,) * setup.case.fewest_prompt_tokens,
        mixed=True,
        gamma=0.0,
        num_samples=16,
        sampling=SamplingParams(max_new_tokens=6),
    )
    (rollouts,) = engine.generate([request])
    for rollout in rollouts:
        assert rollout.token_ids.tolist() == [EOS]
        assert rollout.stop_reason is StopReason.EOS
        for name in ("policy_logprobs", "expert_logprobs", "weights", "sources", "policy_versions"):
            assert len(getattr(rollout, name)) == 1


@each_setup("has_float32")
def test_the_end_of_the_context_is_a_limit_like_another(small_pair, setup):
    """3000 samples; chi-square fails on a fresh seed with probability `FALSE_ALARM`."""
    prompt, gate = (D, B, E, A), Gate(gamma=1.0)
    tree = ResponseTree(*small_pair, prompt, gate, max_new_tokens=3, ends=lambda response: False)
    engine = setup.build(
        *small_pair,
        max_batch_size=setup.case.max_batch_size,
        max_model_len=len(prompt) + 3,
        eos_token_ids=[],
    )
    request = RolloutRequest(
        prompt_token_ids=prompt,
        mixed=True,
        gamma=gate.gamma,
        num_samples=3000,
        seed=setup.seed,
        sampling=SamplingParams(max_new_tokens=50),
    )
    (rollouts,) = engine.generate([request])
    counts = tree.count(rollout.token_ids.tolist() for rollout in rollouts)
    assert chi_square_p_value(counts, tree.probabilities) > FALSE_ALARM
    assert {rollout.stop_reason for rollout in rollouts} == {StopReason.LENGTH}


@each_setup()
def test_streams_carry_every_token_of_a_rollout_once_and_in_order(small_pair, setup):
    """What was streamed is never taken back, though the policy runs ahead."""
    engine = setup.build(*small_pair, max_batch_size=64, eos_token_ids=[EOS])
    engine.submit(
        RolloutRequest(
            prompt_token_ids=(D, B),
            mixed=True,
            gamma=1.0,
            num_samples=100,
            seed=3,
            sampling=SamplingParams(max_new_tokens=12),
        )
    )
    streamed: dict[int, list[int]] = {}
    finished = {}
    while engine.has_unfinished():
        for output in engine.step():
            tokens = streamed.setdefault(output.sample_index, [])
            tokens += output.new_token_ids
            assert output.num_tokens == len(tokens)
            assert output.sample_index not in finished
            if output.finished is not None:
                finished[output.sample_index] = output.finished
    assert len(finished) == 100
    for sample, rollout in finished.items():
        assert rollout.token_ids.tolist() == streamed[sample]
