"""How large a comparison is: seeds, updates, problems. Nothing else differs between presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from mentor_serve.experiments.arms import ABLATIONS, METHODS


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """Problems to evaluate on: a data set of reasoning-gym, or those that are trained on."""

    name: str
    label: str
    generator: str | None
    """None: held-out problems of the tasks that the settings name."""
    config: Mapping[str, Any] = field(default_factory=dict)


def _chain(num_terms: int, *, num_digits: int = 1) -> dict[str, int]:
    return {
        "min_terms": num_terms,
        "max_terms": num_terms,
        "min_digits": 1,
        "max_digits": num_digits,
    }


IN_DOMAIN: Final = Suite(name="in_domain", label="in domain", generator=None)
SUITES: Final[tuple[Suite, ...]] = (
    IN_DOMAIN,
    Suite(name="harder_8", label="8 terms", generator="chain_sum", config=_chain(8)),
    Suite(name="harder_9", label="9 terms", generator="chain_sum", config=_chain(9)),
    Suite(
        name="calculate",
        label="out of domain: basic_arithmetic",
        generator="basic_arithmetic",
        config={
            "min_terms": 3,
            "max_terms": 6,
            "min_digits": 1,
            "max_digits": 1,
            "operators": ["+", "-"],
            "allow_parentheses": False,
            "allow_negation": False,
            "format_style": "simple",
        },
    ),
    Suite(
        name="complex",
        label="out of domain: complex_arithmetic",
        generator="complex_arithmetic",
        config={
            "min_real": 1,
            "max_real": 9,
            "min_imag": 1,
            "max_imag": 9,
            "operations_weights": [0.5, 0.5, 0.0, 0.0],
        },
    ),
)
"""Of the bundled pair. Both generators out of domain were in what the models were first taught, and
none of their problems is ever trained on here."""


PRETRAINED_SUITES: Final[tuple[Suite, ...]] = (
    IN_DOMAIN,
    Suite(name="longer", label="7 terms", generator="chain_sum", config=_chain(7, num_digits=2)),
    Suite(
        name="calculate",
        label="out of domain: basic_arithmetic",
        generator="basic_arithmetic",
        config={
            "min_terms": 2,
            "max_terms": 5,
            "min_digits": 1,
            "max_digits": 2,
            "operators": ["+", "-"],
            "allow_parentheses": True,
            "allow_negation": False,
        },
    ),
    Suite(
        name="decimal",
        label="out of domain: decimal_chain_sum",
        generator="decimal_chain_sum",
        config={**_chain(3), "min_decimal_places": 1, "max_decimal_places": 1},
    ),
)
"""Of a pretrained model whose tasks are short chains of numbers of one and two digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Sizes of a comparison."""

    name: str
    num_updates: int
    prompts_per_update: int
    seeds: tuple[int, ...]
    """Of the methods that are compared."""
    learning_rates: tuple[float, ...]
    """Tried for each method; the best on the validation problems is used."""
    sweep_seeds: tuple[int, ...]
    """Runs of each method and learning rate; none in common with `seeds`."""
    ablation_seeds: tuple[int, ...]
    """A part of `seeds`: each ablation is compared with MENTOR's runs of the same seeds."""
    evaluate_every: int
    """Updates between two greedy evaluations on the validation problems."""
    num_validation: int
    num_test: int
    """Problems of each suite."""
    num_samples: int
    """Sampled responses to a test problem; pass@k for every k up to this."""
    methods: tuple[str, ...] = tuple(arm.name for arm in METHODS)
    ablations: tuple[str, ...] = tuple(arm.name for arm in ABLATIONS)
    suites: tuple[Suite, ...] = SUITES
    validation_samples: int = 8
    temperature: float = 0.6
    """Of sampled test responses (paper: 0.6)."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Dotted settings that all arms share."""

    @property
    def ks(self) -> tuple[int, ...]:
        """Values of k in pass@k: powers of two up to `num_samples`."""
        return tuple(2**power for power in range(self.num_samples.bit_length()))


_ONE_WAVE: Final = {"policy.max_batch_size": 192}
"""All rollouts of an update decode together."""

PRESETS: Final[dict[str, Preset]] = {
    preset.name: preset
    for preset in (
        Preset(
            name="laptop",
            num_updates=60,
            prompts_per_update=16,
            seeds=(0, 1, 2, 3, 4),
            learning_rates=(5e-5, 1e-4, 2e-4, 4e-4),
            sweep_seeds=(100, 101),
            ablation_seeds=(0, 1),
            evaluate_every=10,
            num_validation=100,
            num_test=200,
            num_samples=32,
            settings=_ONE_WAVE,
        ),
        Preset(
            name="smoke",
            num_updates=10,
            prompts_per_update=8,
            seeds=(0, 1),
            learning_rates=(2e-4,),
            sweep_seeds=(),
            ablation_seeds=(0,),
            evaluate_every=5,
            num_validation=32,
            num_test=32,
            num_samples=8,
            ablations=("unselective",),
        ),
        Preset(
            name="pretrained",
            num_updates=60,
            prompts_per_update=16,
            seeds=(0, 1),
            learning_rates=(1e-5, 3e-5),
            sweep_seeds=(100,),
            ablation_seeds=(),
            evaluate_every=10,
            num_validation=100,
            num_test=100,
            num_samples=32,
            ablations=(),
            suites=PRETRAINED_SUITES,
        ),
    )
}
"""`laptop` is what docs/results.md shows; `smoke` only shows that everything runs; `pretrained` is
for models of your own (docs/recipes.md)."""
