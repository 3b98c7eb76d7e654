"""Token entropy, its quantile and the gate of Eq. 6."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mentor_serve.core.entropy import entropy_quantile, token_entropy
from mentor_serve.core.gate import guidance_weight

LOGITS = st.lists(st.floats(-50, 50), min_size=2, max_size=9)


def test_entropy_of_known_distributions():
    logits = torch.tensor([[0.5, 0.25, 0.25, 1e-30], [0.25] * 4]).log()
    # 0.5 ln 2 + 2 * 0.25 ln 4 = 1.5 ln 2; uniform over four: 2 ln 2.
    assert token_entropy(logits).tolist() == pytest.approx([1.5 * math.log(2), 2 * math.log(2)])


def test_entropy_ignores_impossible_tokens():
    logits = torch.tensor([0.0, 0.0, -math.inf])
    assert token_entropy(logits).item() == pytest.approx(math.log(2))
    assert token_entropy(torch.tensor([0.0, -math.inf])).item() == 0.0


def test_entropy_of_half_precision_logits_is_evaluated_in_float32():
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert token_entropy(logits).dtype == torch.float32
    assert torch.equal(token_entropy(logits), token_entropy(logits.float()))


@given(LOGITS, st.floats(-20, 20))
def test_entropy_is_bounded_and_ignores_a_shift_of_the_logits(values, shift):
    logits = torch.tensor(values, dtype=torch.float64)
    entropy = token_entropy(logits).item()
    assert -1e-12 <= entropy <= math.log(len(values)) + 1e-12
    assert token_entropy(logits + shift).item() == pytest.approx(entropy, abs=1e-9)


def test_quantile_interpolates_between_ranks():
    entropies = torch.tensor([3.0, 0.0, 2.0, 1.0])
    assert entropy_quantile(entropies, 0.5) == 1.5
    # Rank 0.95 * 3 = 2.85: 2 + 0.85 * (3 - 2).
    assert entropy_quantile(entropies, 0.95) == pytest.approx(2.85)
    assert entropy_quantile(entropies, 0.0) == 0.0
    assert entropy_quantile(entropies, 1.0) == 3.0


@given(st.lists(st.floats(0, 12, width=32), min_size=1, max_size=40), st.floats(0, 1))
def test_quantile_agrees_with_torch(values, q):
    entropies = torch.tensor(values, dtype=torch.float64)
    expected = torch.quantile(entropies, q).item()
    assert entropy_quantile(entropies, q) == pytest.approx(expected, abs=1e-9)


def test_quantile_takes_more_tokens_than_torch_allows():
    entropies = torch.arange(17_000_000, dtype=torch.float32)
    assert entropy_quantile(entropies, 0.5) == pytest.approx(8_499_999.5, abs=1.0)


@pytest.mark.parametrize(
    ("entropies", "q", "message"),
    [([], 0.5, "at least one"), ([1.0], 1.5, r"\[0, 1\]"), ([math.nan], 0.5, "finite")],
)
def test_quantile_refuses_what_has_none(entropies, q, message):
    with pytest.raises(ValueError, match=message):
        entropy_quantile(torch.tensor(entropies), q)


def test_gate_is_the_clipped_ratio():
    entropies = torch.tensor([0.0, 0.4, 0.8, 2.0])
    assert guidance_weight(entropies, 0.8).tolist() == pytest.approx([0.0, 0.5, 1.0, 1.0])


def test_gamma_zero_asks_the_expert_everywhere():
    assert guidance_weight(torch.tensor([0.0, 1.0]), 0.0).tolist() == [1.0, 1.0]


def test_the_papers_initial_gamma_nearly_closes_the_gate():
    assert guidance_weight(torch.tensor([5.0]), 999.0).item() == pytest.approx(0.005005, abs=1e-6)


def test_gamma_may_differ_by_row():
    weights = guidance_weight(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([2.0, 0.0, 0.5]))
    assert weights.tolist() == [0.5, 1.0, 1.0]


@given(st.floats(-1e-6, 20), st.floats(0, 1000))
def test_gate_is_a_probability(entropy, gamma):
    weight = guidance_weight(torch.tensor([entropy]), gamma).item()
    assert 0.0 <= weight <= 1.0


@pytest.mark.parametrize("gamma", [-0.1, math.nan])
def test_gate_refuses_an_impossible_gamma(gamma):
    with pytest.raises(ValueError, match="gamma"):
        guidance_weight(torch.tensor([1.0]), gamma)
