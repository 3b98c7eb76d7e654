"""Weights that change while rollouts run: each token follows the version that it is stamped with.

Running rollouts keep the keys and values of the old weights, so the models here see the last token
only; then pi_theta of every version is known exactly, whatever was read before the swap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from mentor_serve.engines import RolloutRequest, SamplingParams
from mentor_serve.types import TokenSource

from .cases import SETUPS, each_setup
from .comparison import FALSE_ALARM, Ints, conditional_p_value
from .response_tree import Gate, Tables, tables_along

NUM_SAMPLES = 3000
LENGTH = 6
VOCAB = 6
PROMPT = (4, 2)
GATE = Gate(gamma=2.0)
STEPS_BETWEEN_SWAPS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Swapped:
    """Rollouts during which two policies took turns, [samples, LENGTH] each."""

    tokens: Ints
    sources: Ints
    versions: Ints
    by_turn: tuple[Tables, Tables]
    """Under even and under odd versions, position by position of the arrays above."""
    logprobs: np.ndarray

    def p_value(self, chosen: np.ndarray, turn: int) -> float:
        """Of the positions chosen by their past, against the policy of one turn."""
        index = np.flatnonzero(chosen)
        assert len(index) > 500
        joint = self.by_turn[turn][index].sourced.reshape(len(index), -1)
        cells = self.sources.ravel()[index] * VOCAB + self.tokens.ravel()[index]
        return conditional_p_value(cells, joint)


@pytest.fixture(
    scope="module",
    params=[s for s in SETUPS if s.case.has_float32 and s.case.can_swap_weights],
    ids=str,
)
def swapped(request, markov_model):
    setup = request.param
    tables = np.random.default_rng(6).normal(scale=1.5, size=(3, VOCAB, VOCAB))
    *policies, expert = (markov_model(table.tolist()) for table in tables)
    states = [{name: value.clone() for name, value in p.state_dict().items()} for p in policies]
    engine = setup.build(
        markov_model(tables[0].tolist()), expert, max_batch_size=1000, eos_token_ids=[]
    )
    engine.submit(
        RolloutRequest(
            prompt_token_ids=PROMPT,
            mixed=True,
            gamma=GATE.gamma,
            num_samples=NUM_SAMPLES,
            seed=setup.seed,
            sampling=SamplingParams(max_new_tokens=LENGTH),
        )
    )
    finished, num_steps = [], 0
    while engine.has_unfinished():
        finished += [output.finished for output in engine.step() if output.finished is not None]
        num_steps += 1
        if num_steps % STEPS_BETWEEN_SWAPS == 0:
            version = num_steps // STEPS_BETWEEN_SWAPS
            engine.load_weights(states[version % 2], version=version)
            assert engine.policy_version == version
    assert len(finished) == NUM_SAMPLES
    tokens, sources, versions = (
        np.array([getattr(rollout, name) for rollout in finished], np.int64)
        for name in ("token_ids", "sources", "policy_versions")
    )
    whole = [[*PROMPT, *response] for response in tokens.tolist()]
    return Swapped(
        tokens=tokens,
        sources=sources,
        versions=versions,
        by_turn=tuple(tables_along(p, expert, whole, GATE, start=len(PROMPT)) for p in policies),
        logprobs=np.array([rollout.policy_logprobs for rollout in finished]),
    )


def test_tokens_follow_the_version_they_are_stamped_with(swapped):
    """Four tests at `FALSE_ALARM` / 4; with the tables of the other version the answer is no."""
    for turn in (0, 1):
        stamped = swapped.versions % 2 == turn
        assert swapped.p_value(stamped, turn) > FALSE_ALARM / 4
        assert swapped.p_value(stamped, 1 - turn) < 1e-12
        # The first token under a version, behind tokens of the one before.
        is_first = np.zeros_like(stamped)
        is_first[:, 1:] = swapped.versions[:, 1:] != swapped.versions[:, :-1]
        assert swapped.p_value(stamped & is_first, turn) > FALSE_ALARM / 4


def test_no_kind_of_token_is_favoured_around_a_swap(swapped):
    """Two tests at `FALSE_ALARM` / 2: behind a replacement a swap may fall into a roll-back."""
    for turn in (0, 1):
        behind = np.zeros_like(swapped.tokens, dtype=bool)
        behind[:, 1:] = swapped.sources[:, :-1] == TokenSource.EXPERT
        stamped = swapped.versions % 2 == turn
        assert swapped.p_value(stamped & behind, turn) > FALSE_ALARM / 2


def test_versions_never_fall_and_often_rise_within_a_rollout(swapped):
    rises = np.diff(swapped.versions, axis=1)
    assert (rises >= 0).all()
    assert (rises > 0).any(axis=1).mean() > 0.5


def test_recorded_logprobs_are_those_of_the_stamped_version(swapped):
    tables = np.stack([tables.policy for tables in swapped.by_turn])
    index = np.arange(tables.shape[1])
    expected = tables[swapped.versions.ravel() % 2, index, swapped.tokens.ravel()]
    np.testing.assert_allclose(swapped.logprobs.ravel(), np.log(expected), atol=1e-4)


@each_setup("has_float32", "can_swap_weights", "is_reproducible")
def test_a_rollout_that_starts_after_a_swap_is_that_of_an_engine_built_with_the_weights(
    tiny_llama, setup
):
    request = RolloutRequest(
        prompt_token_ids=[3, 9, 4],
        mixed=True,
        gamma=1.5,
        num_samples=5,
        seed=8,
        sampling=SamplingParams(max_new_tokens=12, ignore_eos=True),
    )
    engine = setup.build(tiny_llama(1), tiny_llama(2))
    engine.generate([request])
    engine.load_weights(tiny_llama(3).state_dict(), version=4)
    (swapped,) = engine.generate([request])
    (built,) = setup.build(tiny_llama(3), tiny_llama(2)).generate([request])
    for ours, theirs in zip(swapped, built, strict=True):
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
        assert set(ours.policy_versions.tolist()) == {4}
