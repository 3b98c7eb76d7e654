"""The engines under test, where their expert sits, and how far they run ahead of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from mentor_serve.engines import Engine, TorchEngine
from mentor_serve.engines.expert import ExpertServer

from .vllm_models import build_vllm

RunAhead = Literal["auto"] | int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCase:
    """One engine with one placement of its expert, and what may be expected of it."""

    name: str
    build: Callable[..., Engine]
    """`build(policy, expert=None, **options)` of models in this process. Options: max_batch_size,
    max_model_len, eos_token_ids, tokenizer, and run_ahead where `run_aheads` names values."""
    run_aheads: tuple[RunAhead | None, ...] = (0, 3, "auto")
    """Settings of run_ahead to test; (None,) for an engine without that option."""
    has_float32: bool = True
    """Its probabilities are those of float32 models; the statistical tests need that."""
    can_swap_weights: bool = True
    """`load_weights` takes effect while rollouts run."""
    is_reproducible: bool = True
    """A seed gives the same tokens whatever else is in the batch."""
    num_scenarios: int = 4
    """How many scenarios of `test_responses` it samples; the last ones may be left to another case
    that drafts by the same code."""
    num_samples: int = 50_000
    """Of each scenario."""
    fewest_prompt_tokens: int = 1
    """Of mixed requests."""
    max_batch_size: int = 50_000
    """How many rollouts of a few tokens it does best at once, for the tests with many samples."""
    logprob_tolerance: float = 1e-4
    """Largest difference of a recorded log-probability from plain float32 transformers, nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One engine with one setting of run_ahead."""

    case: EngineCase
    run_ahead: RunAhead | None

    def build(self, policy: Any, expert: Any = None, **options: Any) -> Engine:
        """The engine over these models."""
        if self.run_ahead is not None:
            options["run_ahead"] = self.run_ahead
        return self.case.build(policy, expert, **options)

    @property
    def seed(self) -> int:
        """Another one for each setup, so that their samples are independent."""
        return 1 + SETUPS.index(self)

    def __str__(self) -> str:
        return self.case.name if self.run_ahead is None else f"{self.case.name}-{self.run_ahead}"


def _colocated(policy: Any, expert: Any = None, **options: Any) -> Engine:
    return TorchEngine(policy, expert, **options)


def _remote(policy: Any, expert: Any = None, **options: Any) -> Engine:
    if expert is not None:
        expert = ExpertServer(expert, max_sequences=options.get("max_batch_size", 64))
    return TorchEngine(policy, expert, **options)


CASES = (
    EngineCase(name="torch-colocated", build=_colocated),
    EngineCase(name="torch-remote", build=_remote, num_scenarios=2, max_batch_size=2000),
    EngineCase(
        name="vllm",
        build=build_vllm,
        run_aheads=(None,),
        num_scenarios=2,
        num_samples=20_000,
        fewest_prompt_tokens=2,
        max_batch_size=256,
    ),
)
SETUPS = tuple(Setup(case=case, run_ahead=value) for case in CASES for value in case.run_aheads)


def each_setup(*needs: str) -> pytest.MarkDecorator:
    """Parametrise a test by `setup`: every setup whose case has all the capabilities named."""
    able = [setup for setup in SETUPS if all(getattr(setup.case, need) for need in needs)]
    return pytest.mark.parametrize("setup", able, ids=str)


def each_case(*needs: str) -> pytest.MarkDecorator:
    """Parametrise a test by `case`: every case that has all the capabilities named."""
    able = [case for case in CASES if all(getattr(case, need) for need in needs)]
    return pytest.mark.parametrize("case", able, ids=lambda case: case.name)
