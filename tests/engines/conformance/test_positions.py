"""Every token of longer responses follows pi_mix given what precedes it, at every offset.

Recorded tokens and sources are compared with the teacher-forced tables of plain transformers:
given the prefix, (source, token) has probabilities `Tables.sourced`, however the token came about.
A correct engine fails one of these tests on a fresh seed with probability `FALSE_ALARM` (1e-4), up
to the normal approximation of sums over thousands of draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from mentor_serve.engines import RolloutRequest, SamplingParams
from mentor_serve.types import TokenSource

from .cases import SETUPS
from .comparison import FALSE_ALARM, Ints, by_rank, conditional_p_value
from .response_tree import Gate, Tables, tables_along

NUM_SAMPLES = 4000
LENGTH = 8
VOCAB = 5
PROMPT = (1, 0)
GATE = Gate(gamma=1.6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """Every position of every rollout, [samples, LENGTH] each, and its tables in that order."""

    tokens: Ints
    sources: Ints
    tables: Tables
    rolled_back: int
    run_ahead: object

    def p_values(self, chosen: np.ndarray) -> list[float]:
        """Of the positions chosen [samples, LENGTH] by their past: by token, and by rank."""
        index = np.flatnonzero(chosen)
        assert len(index) > 500
        tables = self.tables[index]
        tokens, sources = self.tokens.ravel()[index], self.sources.ravel()[index]
        values = []
        for cells, sourced in (
            (tokens, tables.sourced),
            self._ranked(tokens, tables),
        ):
            joint = sourced.reshape(len(index), -1)
            values.append(conditional_p_value(sources * VOCAB + cells, joint))
        return values

    @staticmethod
    def _ranked(tokens: Ints, tables: Tables) -> tuple[Ints, np.ndarray]:
        parts = [by_rank(tokens, part, tables.ranks) for part in tables.sourced.swapaxes(0, 1)]
        return parts[0][0], np.stack([ordered for _, ordered in parts], axis=1)


@pytest.fixture(
    scope="module", params=[setup for setup in SETUPS if setup.case.has_float32], ids=str
)
def positions(request, tiny_llama):
    setup = request.param
    pair = tiny_llama(21, vocab_size=VOCAB), tiny_llama(22, vocab_size=VOCAB)
    engine = setup.build(*pair, max_batch_size=setup.case.max_batch_size, eos_token_ids=[])
    asked = RolloutRequest(
        prompt_token_ids=PROMPT,
        mixed=True,
        gamma=GATE.gamma,
        num_samples=NUM_SAMPLES,
        seed=setup.seed,
        sampling=SamplingParams(temperature=GATE.temperature, max_new_tokens=LENGTH),
    )
    (rollouts,) = engine.generate([asked])
    tokens = np.array([rollout.token_ids for rollout in rollouts], np.int64)
    sources = np.array([rollout.sources for rollout in rollouts], np.int64)
    whole = [[*PROMPT, *response] for response in tokens.tolist()]
    tables = tables_along(*pair, whole, GATE, start=len(PROMPT))
    assert not any(rollout.expert_lost for rollout in rollouts)
    return Positions(
        tokens=tokens,
        sources=sources,
        tables=tables,
        rolled_back=engine.stats.rolled_back_tokens,
        run_ahead=setup.run_ahead,
    )


def test_tokens_and_their_sources_follow_the_tables_at_every_offset(positions):
    """2 tests at each of 8 offsets: each compared with FALSE_ALARM / 16 (Bonferroni)."""
    for offset in range(LENGTH):
        chosen = np.zeros_like(positions.tokens, dtype=bool)
        chosen[:, offset] = True
        assert min(positions.p_values(chosen)) > FALSE_ALARM / (2 * LENGTH), offset


@pytest.mark.parametrize("source", list(TokenSource), ids=lambda source: source.name)
@pytest.mark.parametrize("distance", [1, 2, 3])
def test_tokens_after_each_source_follow_the_tables(positions, source, distance):
    """2 tests, FALSE_ALARM / 2 each.

    Right behind a replacement (source EXPERT) lies what a policy that ran on had drafted after the
    rejected token, and rolled back.
    """
    chosen = np.zeros_like(positions.tokens, dtype=bool)
    chosen[:, distance:] = positions.sources[:, :-distance] == source
    assert min(positions.p_values(chosen)) > FALSE_ALARM / 2


def test_tokens_after_several_replacements_follow_the_tables(positions):
    """2 tests, FALSE_ALARM / 2 each: what two or more roll-backs leave behind."""
    replaced = positions.sources == TokenSource.EXPERT
    before = replaced.cumsum(axis=1) - replaced
    assert min(positions.p_values(before >= 2)) > FALSE_ALARM / 2


def test_the_policy_ran_ahead_as_far_as_it_was_told(positions):
    """Otherwise nothing above was about roll-backs."""
    if positions.run_ahead == 0:
        assert positions.rolled_back == 0
    elif isinstance(positions.run_ahead, int):
        assert positions.rolled_back > NUM_SAMPLES
