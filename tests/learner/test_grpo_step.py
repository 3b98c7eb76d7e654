"""Eq. 9 through the whole step: values by hand, gradients by autograd on single sequences."""

import math

import pytest
import torch
from learner_samples import (
    leased,
    leased_group,
    parameter_change,
    random_groups,
    reference_logprobs,
    tiny_model,
)

from mentor_serve.learner import UpdateConfig, build_batch, mixed_grpo_update


def batch_of(groups, alpha=0.5):
    return build_batch(groups, alpha=alpha, policy_version=0)


def assert_same_gradient(found, expected, tolerance=1e-5):
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=tolerance, rtol=1e-3, msg=name)


def old_for_ratios(model, prompt, tokens, ratios):
    """Old log-probabilities that make the ratio of each token the given one."""
    with torch.no_grad():
        return (reference_logprobs(model, prompt, tokens) - torch.tensor(ratios).log()).numpy()


def test_two_sequences_and_a_mixed_one_by_hand():
    model = tiny_model().eval()
    prompt = [1, 2, 3]
    good, bad, mixed = [4, 5], [6, 7], [8]
    group = leased_group(
        [
            leased(good, reward=1.0, logprobs=old_for_ratios(model, prompt, good, [1.0, 1.5])),
            leased(bad, reward=0.0, logprobs=old_for_ratios(model, prompt, bad, [0.5, 1.2])),
            leased(
                mixed,
                kind="mixed",
                reward=1.0,
                logprobs=old_for_ratios(model, prompt, mixed, [1.1]),
            ),
        ]
    )
    # Rewards 1 and 0: mean 0.5, sample std sqrt(0.5), advantages +-0.70711 (Eq. 10).
    # Mixed: 0.5 * (1 - 0.5) / 1 = 0.25 (Eq. 11). Clips 0.2 and 0.28, five tokens (Eq. 9):
    #   0.70711 * (1.0 + min(1.5, 1.28)) = 1.61220   second token clipped
    #  -0.70711 * (max(0.5, 0.8) + 1.2)  = -1.41421  first token clipped
    #   0.25 * 1.1                       = 0.275
    # loss = -(1.61220 - 1.41421 + 0.275) / 5 = -0.094598
    reference = tiny_model().eval()
    kept = (
        0.70711 * 1.0 * reference_logprobs(reference, prompt, good)[0]
        - 0.70711 * 1.2 * reference_logprobs(reference, prompt, bad)[1]
        + 0.25 * 1.1 * reference_logprobs(reference, prompt, mixed)[0]
    )
    (-kept / 5).backward()
    expected = {name: item.grad for name, item in reference.named_parameters()}
    found, metrics = parameter_change(model, batch_of([group]))
    assert metrics.loss == pytest.approx(-0.094598, abs=1e-5)
    assert metrics.clip_fraction_high == pytest.approx(1 / 5)
    assert metrics.clip_fraction_low == pytest.approx(1 / 5)
    assert_same_gradient(found, expected)


def test_clipped_tokens_give_no_gradient():
    model = tiny_model().eval()
    prompt = [1, 2, 3]
    group = leased_group(
        [
            leased([4], reward=1.0, logprobs=old_for_ratios(model, prompt, [4], [1.4])),
            leased([5], reward=0.0, logprobs=old_for_ratios(model, prompt, [5], [0.7])),
        ]
    )
    found, metrics = parameter_change(model, batch_of([group]))
    assert all(not gradient.any() for gradient in found.values())
    assert metrics.clip_fraction_low + metrics.clip_fraction_high == 1.0


def test_no_advantage_gives_no_gradient():
    model = tiny_model().eval()
    group = leased_group([leased([4, 5], reward=1.0), leased([6], reward=1.0)])
    for skip in (True, False):
        found, metrics = parameter_change(model, batch_of([group]), skip_zero_advantage=skip)
        assert all(not gradient.any() for gradient in found.values())
        assert metrics.num_optimizer_steps == 1
        assert metrics.num_trained_tokens == (0 if skip else 3)


def test_the_loss_scale_scales_loss_and_gradient_alike():
    groups = random_groups(tiny_model().eval())
    whole, metrics = parameter_change(tiny_model().eval(), batch_of(groups))
    half, half_metrics = parameter_change(tiny_model().eval(), batch_of(groups), loss_scale=0.5)
    assert half_metrics.loss == pytest.approx(0.5 * metrics.loss, rel=1e-5)
    assert_same_gradient({name: 2 * gradient for name, gradient in half.items()}, whole)
    with pytest.raises(ValueError, match="loss_scale"):
        UpdateConfig(loss_scale=0.0)


def test_micro_batches_do_not_change_the_gradient():
    groups = random_groups(tiny_model().eval())
    whole, metrics = parameter_change(tiny_model().eval(), batch_of(groups))
    for max_tokens in (1, 33, 100):
        parts, part_metrics = parameter_change(
            tiny_model().eval(), batch_of(groups), max_tokens_per_micro_batch=max_tokens
        )
        assert_same_gradient(parts, whole)
        assert part_metrics.loss == pytest.approx(metrics.loss, abs=1e-5)
        assert part_metrics.clip_fraction_low == pytest.approx(metrics.clip_fraction_low)
        assert part_metrics.mismatch_kl == pytest.approx(metrics.mismatch_kl, rel=1e-3)


def test_skipping_zero_advantages_is_exact():
    groups = random_groups(tiny_model().eval())
    with_skip, skip_metrics = parameter_change(tiny_model().eval(), batch_of(groups))
    without, metrics = parameter_change(
        tiny_model().eval(), batch_of(groups), skip_zero_advantage=False
    )
    assert skip_metrics.num_trained_tokens < metrics.num_trained_tokens
    assert_same_gradient(with_skip, without)
    assert skip_metrics.clip_fraction_high == pytest.approx(metrics.clip_fraction_high)


def test_tokens_of_zero_advantage_count_in_the_denominator():
    signal = [leased([4], reward=1.0), leased([5], reward=0.0)]
    short, _ = parameter_change(tiny_model().eval(), batch_of([leased_group(signal)]))
    silent = leased([6] * 6, kind="mixed", reward=0.0)
    long, _ = parameter_change(tiny_model().eval(), batch_of([leased_group([*signal, silent])]))
    # Two tokens against eight: the same surrogate over four times the tokens.
    assert_same_gradient(long, {name: gradient / 4 for name, gradient in short.items()})


def test_tokens_without_a_recorded_logprob_change_nothing():
    plain = leased_group([leased([4], reward=1.0), leased([5], reward=0.0)])
    with_hole = leased_group(
        [leased([4, 9], reward=1.0, logprobs=[-2.5, math.nan]), leased([5], reward=0.0)]
    )
    expected, _ = parameter_change(tiny_model().eval(), batch_of([plain]))
    found, metrics = parameter_change(tiny_model().eval(), batch_of([with_hole]))
    assert_same_gradient(found, expected)
    assert math.isfinite(metrics.loss)


def test_a_mini_batch_is_one_optimiser_step_over_its_own_tokens():
    groups = random_groups(tiny_model().eval())
    model = tiny_model().eval()
    _, metrics = parameter_change(model, batch_of(groups), mini_batch_prompts=2)
    assert metrics.num_optimizer_steps == 2
    by_hand = tiny_model().eval()
    for half in (groups[:2], groups[2:]):
        parameter_change(by_hand, batch_of(half))
    for one, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_gradients_are_clipped_to_the_norm():
    groups = random_groups(tiny_model().eval())
    found, metrics = parameter_change(tiny_model().eval(), batch_of(groups), max_grad_norm=1e-3)
    norm = math.sqrt(sum(float(item.square().sum()) for item in found.values()))
    assert metrics.grad_norm > 1e-3
    assert norm == pytest.approx(1e-3, rel=1e-2)


def test_a_gradient_that_is_not_finite_is_not_applied():
    model = tiny_model().eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[4, 0] = math.inf
    before = [item.detach().clone() for item in model.parameters()]
    group = leased_group([leased([4, 5], reward=1.0), leased([5, 6], reward=0.0)])
    _, metrics = parameter_change(model, batch_of([group]))
    assert (metrics.num_optimizer_steps, metrics.num_skipped_steps) == (0, 1)
    assert math.isnan(metrics.grad_norm)
    assert all(
        torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True)
    )


def test_mismatch_is_zero_on_fresh_data_and_exact_otherwise():
    model = tiny_model().eval()
    fresh = batch_of(random_groups(model, noise=0.0))
    _, metrics = parameter_change(tiny_model().eval(), fresh)
    assert metrics.mismatch_kl == pytest.approx(0.0, abs=1e-6)
    prompt = [1, 2, 3]
    group = leased_group(
        [
            leased([4], reward=1.0, logprobs=old_for_ratios(model, prompt, [4], [1.1])),
            leased([5], reward=0.0, logprobs=old_for_ratios(model, prompt, [5], [0.9])),
        ]
    )
    _, metrics = parameter_change(tiny_model().eval(), batch_of([group]))
    # r - 1 - log r: 0.1 - 0.0953102 = 0.0046898 and -0.1 + 0.1053605 = 0.0053605, mean 0.0050252.
    assert metrics.mismatch_kl == pytest.approx(0.0050252, abs=1e-5)


def test_ascending_the_surrogate_makes_good_responses_likelier():
    model = tiny_model().eval()
    prompt, good, bad = [1, 2, 3], [4, 5, 6], [7, 8, 9]
    old = {tuple(t): reference_logprobs(model, prompt, t).detach() for t in (good, bad)}
    group = leased_group(
        [
            leased(good, reward=1.0, logprobs=old[tuple(good)].numpy()),
            leased(bad, reward=0.0, logprobs=old[tuple(bad)].numpy()),
        ]
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    mixed_grpo_update(model, batch_of([group]), UpdateConfig(), optimizer=optimizer)
    with torch.no_grad():
        assert reference_logprobs(model, prompt, good).sum() > old[tuple(good)].sum()
        assert reference_logprobs(model, prompt, bad).sum() < old[tuple(bad)].sum()
