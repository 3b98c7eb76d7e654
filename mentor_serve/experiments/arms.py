"""What is compared: the paper's methods, and MENTOR with one thing changed.

An arm is a set of ordinary settings, so that whatever it shows can be run as a service, and for
ablations a `Variant` that only experiments have. All arms sample as many rollouts and make as many
updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from mentor_serve.learner.config import MixedAdvantages
from mentor_serve.types import GuidanceMethod

NUM_ROLLOUTS: Final = 12
"""Rollouts of a prompt, whoever samples them (the paper's 8 on-policy and 4 mixed)."""
_FOREVER: Final = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What the service does not offer because the paper's method does not want it."""

    staleness: int = 0
    """Rollouts are sampled by the weights of so many updates ago."""
    gate: Literal["entropy", "matched"] = "entropy"
    """`matched`: w is the same at every token, and as large as the entropy gate's mean on the last
    update's rollouts. A gate at random positions, whatever it draws, is this one: a coin with a
    random weight that depends on nothing is a coin with the mean weight."""
    first_weight: float | None = None
    """w of the first token in place of the gate."""
    mixed_advantages: MixedAdvantages = "positive"
    """Eq. 11, or plain GRPO over all rollouts of the group."""
    loss_scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to train."""

    name: str
    """`experiments.names` says what it is called in tables and figures."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Dotted settings."""
    variant: Variant = Variant()


def _method(method: GuidanceMethod, **settings: Any) -> Arm:
    return Arm(name=method.value, settings={"guidance.method": method.value, **settings})


_ALL_OWN: Final = {"rollout.num_on_policy": NUM_ROLLOUTS}
_MIXTURE: Final = {"rollout.num_on_policy": 8, "rollout.num_mixed": 4}

METHODS: Final[tuple[Arm, ...]] = (
    _method(GuidanceMethod.ON_POLICY, **_ALL_OWN),
    _method(GuidanceMethod.LUFFY, **_ALL_OWN),
    _method(GuidanceMethod.QUESTA, **_ALL_OWN),
    _method(GuidanceMethod.MENTOR, **_MIXTURE),
)
"""The paper's comparison (docs/baselines.md says what each does)."""

MENTOR: Final = METHODS[-1]


def _ablation(name: str, *, variant: Variant | None = None, **settings: Any) -> Arm:
    given = {key.replace("__", "."): value for key, value in settings.items()}
    return Arm(
        name=name,
        settings={**MENTOR.settings, **given},
        variant=variant or Variant(),
    )


_RELEASED_SCALE: Final = 8 / NUM_ROLLOUTS

ABLATIONS: Final[tuple[Arm, ...]] = (
    _ablation("unselective", variant=Variant(gate="matched")),
    _ablation("quantile_80", guidance__entropy_quantile=0.8),
    _ablation("quantile_100", guidance__entropy_quantile=1.0),
    _ablation("constant_alpha", guidance__alpha_steps=_FOREVER),
    _ablation("mixed_2", rollout__num_on_policy=10, rollout__num_mixed=2),
    _ablation("mixed_8", rollout__num_on_policy=4, rollout__num_mixed=8),
    _ablation(
        "plain_grpo",
        variant=Variant(mixed_advantages="group"),
    ),
    _ablation("expert_first", variant=Variant(first_weight=1.0)),
    _ablation("gamma_floor", guidance__gamma_floor=1.5),
    _ablation("loss_scale", variant=Variant(loss_scale=_RELEASED_SCALE)),
    _ablation(
        "released_code",
        variant=Variant(first_weight=1.0, loss_scale=_RELEASED_SCALE),
        guidance__gamma_floor=1.5,
    ),
    _ablation("stale_1", variant=Variant(staleness=1)),
    _ablation("stale_4", variant=Variant(staleness=4)),
)
"""MENTOR with one thing changed (the released code's differences: one by one, then all)."""


def arm_named(name: str) -> Arm:
    """The arm of that name.

    Raises:
        KeyError: there is none.
    """
    return {arm.name: arm for arm in (*METHODS, *ABLATIONS)}[name]
