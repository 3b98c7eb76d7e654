"""Drawing tokens: inverse CDF, truncation against references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from mentor_serve.core.entropy import token_entropy
from mentor_serve.engines.sampler import distribution, draw, truncated

MASSES = st.lists(st.integers(0, 5), min_size=1, max_size=12).filter(any)


def test_the_inverse_cdf_by_hand():
    masses = torch.tensor([[0.0, 1.0, 0.0, 3.0]])
    uniforms = torch.tensor([[0.0, 0.2499, 0.25, 0.9999]], dtype=torch.float64)
    assert draw(masses, uniforms).tolist() == [[1, 1, 3, 3]]


@given(MASSES, st.floats(0, 1, exclude_max=True))
def test_a_token_without_mass_is_never_drawn(masses, uniform):
    for mass in (torch.tensor([masses]), torch.tensor([masses * 700])):
        token = draw(mass.float(), torch.tensor([uniform], dtype=torch.float64)).item()
        assert mass[0, token] > 0


def test_extreme_uniforms_draw_tokens_with_mass_from_a_large_vocabulary():
    masses = torch.zeros(2, 150_000)
    masses[0, 149_000], masses[1, 700] = 1e-6, 0.3
    masses[1, 70_000] = 0.7
    edge = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64).expand(2, 2)
    assert draw(masses, edge).tolist() == [[149_000, 149_000], [700, 70_000]]


def test_block_search_agrees_with_the_whole_cdf():
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(8, 20_000, generator=generator).mul(3).softmax(-1)
    uniforms = torch.rand(8, 64, generator=generator, dtype=torch.float64)
    whole = probs.cumsum(-1, dtype=torch.float64)
    expected = torch.searchsorted(whole, uniforms * whole[:, -1:], right=True)
    # The sums are ordered differently, so a uniform on an edge may fall on either side of it.
    assert (draw(probs, uniforms) == expected).double().mean() > 0.99


@pytest.mark.parametrize("num_tokens", [50, 10_000])
def test_draws_follow_the_distribution(num_tokens):
    """Chi-square over 50 groups of tokens at a fixed seed, p > 1e-3."""
    generator = torch.Generator().manual_seed(1)
    probs = torch.rand(num_tokens, generator=generator)
    uniforms = torch.rand(1, 50_000, generator=generator, dtype=torch.float64)
    group = num_tokens // 50
    counts = torch.bincount(draw(probs[None], uniforms)[0] // group, minlength=50)
    expected = probs.view(50, group).sum(-1).double()
    assert chisquare(counts.numpy(), (expected / expected.sum() * 50_000).numpy()).pvalue > 1e-3


def reference_truncation(probs, top_p, top_k):
    order = sorted(range(len(probs)), key=lambda token: (-probs[token], token))
    if top_k:
        order = order[:top_k]
    total, mass, kept = sum(probs[token] for token in order), 0.0, []
    for token in order:
        if kept and top_p < 1 and mass >= top_p * total:
            break
        kept.append(token)
        mass += probs[token]
    return set(kept)


@given(
    st.lists(st.integers(1, 64), min_size=2, max_size=9),
    st.sampled_from([0.01, 0.3, 0.5, 0.77, 0.99, 1.0]),
    st.integers(0, 10),
)
def test_truncation_agrees_with_a_loop(masses, top_p, top_k):
    probs = torch.tensor([masses], dtype=torch.float64)
    cut = truncated(probs, top_p=torch.tensor([top_p]).double(), top_k=torch.tensor([top_k]))
    kept = reference_truncation([float(mass) for mass in masses], top_p, top_k)
    assert set(cut[0].nonzero().flatten().tolist()) == kept
    assert torch.equal(cut[0, list(kept)], probs[0, list(kept)])


def test_a_distribution_is_at_each_rows_temperature():
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(2))
    temperatures = torch.tensor([1.0, 0.5, 2.0])
    scaled = distribution(logits.clone(), temperatures)
    expected = (logits / temperatures[:, None]).softmax(-1)
    assert torch.allclose(scaled.probs, expected)
    assert torch.allclose(scaled.entropies(), token_entropy(expected.log()))
