"""Old log-probabilities, importance weights and expert tokens through the whole step."""

import math

import numpy as np
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

from mentor_serve.learner import AdvantageConfig, UpdateConfig, build_batch
from mentor_serve.types import StopReason

PROMPT = [1, 2, 3]


def batch_of(groups, **config):
    return build_batch(groups, alpha=0.5, policy_version=0, config=AdvantageConfig(**config))


def group_with_ratios(good, bad):
    """Two one-token rollouts whose current over recorded probability is `good` and `bad`."""
    model = tiny_model().eval()
    with torch.no_grad():
        exact = [reference_logprobs(model, PROMPT, [token]) for token in (4, 5)]
    return leased_group(
        [
            leased([4], reward=1.0, logprobs=(exact[0] - math.log(good)).numpy()),
            leased([5], reward=0.0, logprobs=(exact[1] - math.log(bad)).numpy(), index=1),
        ]
    )


def expected_gradient(weight_good, weight_bad):
    """Of -(w_good A log pi(good) - w_bad A log pi(bad)) / 2 with A = sqrt(0.5) (Eq. 10)."""
    model = tiny_model().eval()
    advantage = math.sqrt(0.5)
    good, bad = (reference_logprobs(model, PROMPT, [token])[0] for token in (4, 5))
    (-(weight_good * advantage * good - weight_bad * advantage * bad) / 2).backward()
    return {name: item.grad for name, item in model.named_parameters()}


def assert_same(found, expected, tolerance=1e-5):
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=tolerance, rtol=1e-3, msg=name)


def test_recomputed_equals_recorded_on_fresh_rollouts():
    groups = random_groups(tiny_model().eval(), noise=0.0)
    recorded, metrics = parameter_change(tiny_model().eval(), batch_of(groups))
    recomputed, other = parameter_change(
        tiny_model().eval(), batch_of(groups), old_logprobs="recomputed", importance="token"
    )
    assert_same(recomputed, recorded)
    assert other.loss == pytest.approx(metrics.loss, abs=1e-6)
    assert metrics.effective_sample_share == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        # Recorded: ratios 3 (good: clipped) and 0.5 (bad: clipped): no gradient at all.
        ({}, (0.0, 0.0)),
        # Recomputed: both ratios are 1 at the first step, nothing is clipped.
        ({"old_logprobs": "recomputed"}, (1.0, 1.0)),
        # Decoupled: the same, weighted by proximal / behaviour, at most 2.
        ({"old_logprobs": "recomputed", "importance": "token"}, (2.0, 0.5)),
        (
            {"old_logprobs": "recomputed", "importance": "token", "importance_mode": "mask"},
            (0.0, 0.5),
        ),
        (
            {"old_logprobs": "recomputed", "importance": "sequence", "importance_cap": 8.0},
            (3.0, 0.5),
        ),
    ],
)
def test_corrections_by_hand(options, weights):
    batch = batch_of([group_with_ratios(3.0, 0.5)])
    found, metrics = parameter_change(tiny_model().eval(), batch, **options)
    assert_same(found, expected_gradient(*weights))
    # Ratios 3 and 0.5: (3.5)^2 / (2 * 9.25) = 0.66216.
    assert metrics.effective_sample_share == pytest.approx(0.66216, abs=1e-4)
    truncated = options.get("importance", "none") != "none" and weights[0] < 3.0
    assert metrics.truncated_weight_share == pytest.approx(0.5 if truncated else 0.0)


def test_proximal_weights_stay_those_before_the_update():
    """The second mini-batch's ratio is against the weights before the first one's step."""
    groups = random_groups(tiny_model().eval(), count=2, noise=0.5)
    found, _ = parameter_change(
        tiny_model().eval(), batch_of(groups), mini_batch_prompts=1, old_logprobs="recomputed"
    )
    model = tiny_model().eval()
    exact = []
    for group in groups:
        items = []
        for item in group.trajectories:
            with torch.no_grad():
                now = reference_logprobs(model, item.prompt_token_ids, item.token_ids.tolist())
            values = {"kind": item.kind.value, "reward": item.reward, "index": item.sample_index}
            items.append(
                leased(item.token_ids, logprobs=now, prompt=item.prompt_token_ids, **values)
            )
        exact.append(leased_group(items, prompt=group.prompt_token_ids))
    expected, _ = parameter_change(tiny_model().eval(), batch_of(exact), mini_batch_prompts=1)
    assert_same(found, expected)


def test_the_ratio_of_mixed_tokens_can_be_against_the_mixture():
    model = tiny_model().eval()
    with torch.no_grad():
        exact = reference_logprobs(model, PROMPT, [6]).numpy()
    mixed = leased([6], kind="mixed", reward=1.0, logprobs=exact, index=2)
    mixed.mixed_logprobs[:] = exact - math.log(1.1)
    group = leased_group([leased([4], reward=0.0), leased([5], reward=0.0, index=1), mixed])
    # Advantage 0.5 * (1 - 0) = 0.5, three tokens; loss -0.5 r / 3 with r = 1 or r = 1.1.
    _, against_policy = parameter_change(tiny_model().eval(), batch_of([group]))
    assert against_policy.loss == pytest.approx(-0.5 / 3, abs=1e-5)
    for options in ({}, {"old_logprobs": "recomputed", "importance": "token"}):
        _, against_mixture = parameter_change(
            tiny_model().eval(), batch_of([group], mixed_ratio="mixed"), **options
        )
        assert against_mixture.loss == pytest.approx(-0.55 / 3, abs=1e-5)


def test_mixed_tokens_without_a_mixed_logprob_do_not_count():
    mixed = leased([6, 7], kind="mixed", reward=1.0, index=1)
    mixed.mixed_logprobs[1] = np.nan
    batch = batch_of([leased_group([leased([4]), mixed])], mixed_ratio="mixed")
    assert batch.metrics.num_tokens == 2


def test_expert_tokens_are_shaped_and_not_clipped():
    group = leased_group(
        [
            leased([4], reward=0.0),
            leased([6, 7], kind="expert", reward=1.0, logprobs=[math.nan] * 2, index=1),
        ]
    )
    model = tiny_model().eval()
    probs = reference_logprobs(model, PROMPT, [6, 7]).exp()
    own = reference_logprobs(model, PROMPT, [4])[0]
    advantage = math.sqrt(0.5)
    shaped = (probs / (probs + 0.1)).sum()
    # The recorded log-probability of token 4 is -2.5; its advantage is negative.
    loss = -(advantage * shaped - advantage * (own + 2.5).exp().clamp(min=0.8)) / 3
    loss.backward()
    log_ratio = own.item() + 2.5
    found, metrics = parameter_change(tiny_model().eval(), batch_of([group]))
    assert metrics.loss == pytest.approx(loss.item(), abs=1e-5)
    assert_same(found, {name: item.grad for name, item in model.named_parameters()})
    assert metrics.mismatch_kl == pytest.approx(math.expm1(log_ratio) - log_ratio, abs=1e-4)


def test_truncated_rollouts_can_be_left_out():
    cut = leased([4, 5], reward=0.0, stop_reason=StopReason.LENGTH)
    ended = leased([6], reward=1.0, index=1)
    batch = batch_of([leased_group([cut, ended])], mask_truncated=True)
    assert (batch.metrics.num_tokens, batch.metrics.num_left_out) == (1, 1)
    # Its reward still belongs to the mean: the other one's advantage is not 0.
    (group,) = batch.groups
    assert group.trajectories[1].advantage == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("grpo", [2, -1, -1]), ("leave_one_out", [1, -0.5, -0.5]), ("dr_grpo", [2, -1, -1])],
)
def test_advantage_estimators(estimator, expected):
    rewards = [1.0, 0.0, 0.0]
    group = leased_group([leased([4], reward=r, index=i) for i, r in enumerate(rewards)])
    (found,) = batch_of([group], estimator=estimator).groups
    scale = {"grpo": 1 / math.sqrt(3), "leave_one_out": 1.0, "dr_grpo": 1 / 3}[estimator]
    assert [item.advantage for item in found.trajectories] == pytest.approx(
        [scale * value for value in expected]
    )


def test_importance_needs_recomputed_values():
    with pytest.raises(ValueError, match="recomputed"):
        UpdateConfig(importance="token")
