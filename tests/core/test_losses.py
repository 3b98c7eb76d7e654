"""The clipped surrogate of Eq. 9."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mentor_serve.core.losses import clipped_surrogate_loss, shaped_surrogate_loss


def loss_of(ratios, advantages, mask=None, **options):
    ratios_BT = torch.tensor(ratios, dtype=torch.float64)
    mask_BT = torch.ones_like(ratios_BT) if mask is None else torch.tensor(mask)
    return clipped_surrogate_loss(
        ratios_BT.log(),
        torch.zeros_like(ratios_BT),
        torch.tensor(advantages, dtype=torch.float64),
        mask_BT,
        0.2,
        0.28,
        **options,
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.0, 2.0, -2.0),  # on policy
        (1.5, 1.0, -1.28),  # raised enough: clipped at 1 + 0.28
        (0.5, 1.0, -0.5),  # lowered although good: not clipped
        (0.5, -1.0, 0.8),  # lowered enough: clipped at 1 - 0.2
        (1.5, -1.0, 1.5),  # raised although bad: not clipped
    ],
)
def test_one_token_by_hand(ratio, advantage, expected):
    loss, _ = loss_of([[ratio]], [advantage])
    assert loss.item() == pytest.approx(expected)


def test_tokens_of_all_sequences_share_one_denominator():
    # Sequence 1 has two tokens, sequence 2 one: -(1 * 2 + 1 * 2 + 1 * (-1)) / 3 = -1.
    loss, metrics = loss_of([[1.0, 1.0], [1.0, 1.0]], [2.0, -1.0], [[1, 1], [1, 0]])
    assert loss.item() == pytest.approx(-1.0)
    assert metrics["num_tokens"].item() == 3


def test_metrics_by_hand():
    _, metrics = loss_of([[1.5, 0.5, 1.0, 1.0], [0.5, 1.5, 1.0, 1.0]], [1.0, -1.0])
    # One of eight tokens is cut above (1.5 with A > 0), one below (0.5 with A < 0).
    assert metrics["clip_fraction_high"].item() == pytest.approx(1 / 8)
    assert metrics["clip_fraction_low"].item() == pytest.approx(1 / 8)
    # 2 * (0.5 - ln 1.5) + 2 * (-0.5 - ln 0.5) over 8 tokens.
    expected = (2 * (0.5 - math.log(1.5)) + 2 * (-0.5 + math.log(2))) / 8
    assert metrics["approx_kl"].item() == pytest.approx(expected)


def test_the_gradient_stops_where_the_clip_bites():
    logprobs = torch.tensor([[math.log(1.5), 0.0]], requires_grad=True)
    old = torch.zeros(1, 2, requires_grad=True)
    loss, _ = clipped_surrogate_loss(logprobs, old, torch.ones(1), torch.ones(1, 2), 0.2, 0.28)
    loss.backward()
    # d(-r A / 2) / d log p = -r A / 2 at r = 1.
    assert logprobs.grad.tolist() == [[0.0, -0.5]]
    assert old.grad is None


def test_padding_may_hold_anything_even_nan():
    logprobs = torch.tensor([[0.0, math.nan, -math.inf]], requires_grad=True)
    old = torch.tensor([[0.0, 0.0, math.nan]])
    loss, metrics = clipped_surrogate_loss(
        logprobs, old, torch.ones(1), torch.tensor([[True, False, False]]), 0.2, 0.28
    )
    loss.backward()
    assert loss.item() == -1.0
    assert logprobs.grad.tolist() == [[-1.0, 0.0, 0.0]]
    assert all(math.isfinite(value) for value in metrics.values())


@given(st.integers(0, 2**32 - 1))
def test_micro_batches_sum_to_the_whole(seed):
    generator = torch.Generator().manual_seed(seed)
    logprobs, old = (torch.randn(4, 5, generator=generator).double() for _ in range(2))
    advantages = torch.randn(4, generator=generator).double()
    mask = torch.rand(4, 5, generator=generator) < 0.7
    whole, metrics = clipped_surrogate_loss(logprobs, old, advantages, mask, 0.2, 0.28)
    parts = [
        clipped_surrogate_loss(
            logprobs[rows],
            old[rows],
            advantages[rows],
            mask[rows],
            0.2,
            0.28,
            normalizer=max(int(mask.sum()), 1),
        )
        for rows in (slice(0, 1), slice(1, 4))
    ]
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole.item())
    for name, value in metrics.items():
        assert sum(part[name].item() for _, part in parts) == pytest.approx(value.item())


def test_advantages_may_be_given_per_token():
    by_sequence, _ = loss_of([[1.1, 0.9]], [0.5])
    by_token, _ = loss_of([[1.1, 0.9]], [[0.5, 0.5]])
    assert by_token.item() == by_sequence.item()


def test_a_batch_without_tokens_has_loss_zero():
    loss, _ = loss_of([[1.0]], [1.0], [[0]])
    assert loss.item() == 0.0


def test_shapes_that_disagree_are_refused():
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        loss_of([[1.0, 1.0]], [1.0], [[1]])
    with pytest.raises(ValueError, match="advantages"):
        loss_of([[1.0, 1.0]], [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="clip"):
        clipped_surrogate_loss(
            *(torch.zeros(1, 1),) * 2, torch.ones(1), torch.ones(1, 1), 1.0, 0.28
        )


def test_token_weights_scale_the_surrogate_and_leave_the_count():
    # -(2 * 1.28 + 0.5 * 1.0) / 2: the clipped token weighs 2, the other one half.
    loss, metrics = loss_of([[1.5, 1.0]], [1.0], token_weights_BT=torch.tensor([[2.0, 0.5]]))
    assert loss.item() == pytest.approx(-(2 * 1.28 + 0.5) / 2)
    assert metrics["num_tokens"].item() == 2


def shaped(probs, advantages, mask=None, **options):
    logprobs_BT = torch.tensor(probs, dtype=torch.float64).log().requires_grad_()
    counted = torch.ones_like(logprobs_BT) if mask is None else torch.tensor(mask)
    loss, _ = shaped_surrogate_loss(
        logprobs_BT, torch.tensor(advantages, dtype=torch.float64), counted, **options
    )
    loss.backward()
    return loss.item(), logprobs_BT.grad


def test_shaped_loss_by_hand():
    # f(0.1) = 0.1 / 0.2 = 0.5 and f(0.9) = 0.9 / 1.0 = 0.9; d f / d log p = 0.1 p / (p + 0.1)^2:
    # 0.01 / 0.04 = 0.25 and 0.09 / 1.0 = 0.09.
    loss, gradient = shaped([[0.1, 0.9]], [1.0])
    assert loss == pytest.approx(-(0.5 + 0.9) / 2)
    assert gradient.flatten().tolist() == pytest.approx([-0.125, -0.045])


def test_shaped_loss_ignores_what_is_masked():
    loss, gradient = shaped([[0.1, 0.5]], [2.0], [[1, 0]], normalizer=4)
    assert loss == pytest.approx(-2 * 0.5 / 4)
    assert gradient[0, 1] == 0


def test_shaping_must_be_positive():
    with pytest.raises(ValueError, match="shaping"):
        shaped([[0.1]], [1.0], shaping=0.0)
