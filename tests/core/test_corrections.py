"""Importance weights and the effective sample size."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mentor_serve.core.corrections import effective_sample_share, importance_weights


def weights_of(ratios, sequences, *, mask=None, level="token", mode="clamp", cap=4.0):
    log_ratios = torch.tensor(ratios).log()
    counted = torch.ones(len(ratios), dtype=torch.bool) if mask is None else torch.tensor(mask)
    return importance_weights(
        log_ratios - 1.0,
        torch.full_like(log_ratios, -1.0),
        torch.tensor(sequences),
        counted,
        level=level,
        mode=mode,
        cap=cap,
    ).tolist()


@pytest.mark.parametrize(
    ("level", "mode", "cap", "expected"),
    [
        # Sequence 0 has ratios 2 and 3 (product 6), sequence 1 has 0.5 and 5 (product 2.5).
        ("none", "clamp", 4.0, [1, 1, 1, 1]),
        ("token", "clamp", 4.0, [2, 3, 0.5, 4]),
        ("token", "mask", 4.0, [2, 3, 0.5, 0]),
        ("sequence", "clamp", 4.0, [4, 4, 2.5, 2.5]),
        ("sequence", "mask", 4.0, [0, 0, 2.5, 2.5]),
        ("token", "clamp", math.inf, [2, 3, 0.5, 5]),
    ],
)
def test_by_hand(level, mode, cap, expected):
    found = weights_of([2.0, 3.0, 0.5, 5.0], [0, 0, 1, 1], level=level, mode=mode, cap=cap)
    assert found == pytest.approx(expected)


def test_tokens_that_do_not_count_have_no_part_in_their_sequence():
    found = weights_of(
        [2.0, 1e6, 3.0], [0, 0, 0], mask=[True, False, True], level="sequence", cap=9
    )
    assert found == pytest.approx([6, 0, 6])


def test_no_gradient_flows():
    proximal = torch.zeros(2, requires_grad=True)
    weights = importance_weights(
        proximal,
        torch.zeros(2),
        torch.zeros(2, dtype=torch.int64),
        torch.ones(2, dtype=torch.bool),
        level="token",
        mode="clamp",
        cap=2.0,
    )
    assert not weights.requires_grad


@pytest.mark.parametrize("options", [{"cap": 0.5}, {"level": "word"}, {"mode": "drop"}])
def test_nonsense_is_refused(options):
    with pytest.raises(ValueError, match="expected"):
        weights_of([1.0], [0], **options)


def test_effective_sample_share_by_hand():
    assert effective_sample_share(4.0, 10.0, 2) == pytest.approx(0.8)  # weights 1 and 3
    assert math.isnan(effective_sample_share(0.0, 0.0, 0))


@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=20))
def test_effective_sample_share_is_a_share(weights):
    share = effective_sample_share(sum(weights), sum(w * w for w in weights), len(weights))
    assert 1 / len(weights) - 1e-9 <= share <= 1 + 1e-9
