"""One run of one arm: collect, update, measure, until its updates are made. One process, no Ray.

Contract: every update takes the groups that were collected for it and no others, in the order of
the tasks, so that the same plan and seed give the same numbers, to rounding (which batches the
expert reads depends on measured times). A trial that is killed goes on where the store says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from mentor_serve.core.gate import guidance_weight
from mentor_serve.engines import TorchEngine
from mentor_serve.engines.base import EngineStats
from mentor_serve.errors import MentorError
from mentor_serve.evaluation.plan import SuiteReport
from mentor_serve.evaluation.words import FIGURE_3_WORDS, word_shares
from mentor_serve.experiments.lag import LaggingBroadcaster
from mentor_serve.experiments.measurement import VALIDATION, Evaluator, entry_of
from mentor_serve.experiments.presets import IN_DOMAIN, Preset
from mentor_serve.experiments.rounds import RoundCollector
from mentor_serve.experiments.trial_log import TrialLog
from mentor_serve.learner import Learner
from mentor_serve.rollout.groups import Response
from mentor_serve.store.records import UpdateRecord
from mentor_serve.types import Task, TrajectoryKind


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialPlan:
    """Which arm, which seed, how fast it learns."""

    stage: str
    """`sweep`, `main` or `ablation`."""
    arm: str
    """Name of an arm; or `base` or `expert`, which are measured as they are."""
    seed: int = 0
    learning_rate: float | None = None

    @property
    def key(self) -> str:
        """Unique in a comparison, and a good name for a run or a file."""
        rate = f"-lr{self.learning_rate:g}" if self.stage == "sweep" else ""
        return f"{self.stage}-{self.arm}{rate}-seed{self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a trial works with."""

    learner: Learner
    broadcaster: LaggingBroadcaster
    collector: RoundCollector
    expert: TorchEngine | None
    """Writes whole solutions; its counters are part of the costs."""
    latest_update: Callable[[], UpdateRecord | None]
    """The newest update of the run in the store."""


class EvaluationSink(Protocol):
    """Stores an evaluation of a version of the run (None: of a model that is no version)."""

    def __call__(self, report: SuiteReport, policy_version: int | None) -> None: ...


@dataclass(kw_only=True)
class Measurer:
    """Evaluates once each: what the log has is not measured again."""

    preset: Preset
    evaluator: Evaluator
    problems: Mapping[str, dict[str, list[Task]]]
    store: EvaluationSink
    log: TrialLog
    suites: Sequence[str]
    """Whose test problems count: all; in domain alone for ablations; none in a sweep, so that
    nothing is chosen by them."""
    _known: set[tuple[int, str, str]] = field(init=False)

    def __post_init__(self) -> None:
        self._known = {
            (entry["step"], entry["suite"], entry["split"])
            for entry in self.log.entries("evaluation")
        }

    async def curve(self, step: int, version: int | None) -> None:
        """Greedy responses to the validation problems."""
        await self._measure(step, version, IN_DOMAIN.name, "curve", num_samples=0)

    async def final(self, step: int, version: int | None) -> None:
        """Validation problems, and the test problems of the stage's suites."""
        await self._measure(
            step, version, IN_DOMAIN.name, VALIDATION, num_samples=self.preset.validation_samples
        )
        for suite in self.suites:
            await self._measure(step, version, suite, "test", num_samples=self.preset.num_samples)

    async def _measure(
        self, step: int, version: int | None, suite: str, split: str, *, num_samples: int
    ) -> None:
        if (step, suite, split) in self._known:
            return
        tasks = self.problems[suite][VALIDATION if split == "curve" else split]
        report = await self.evaluator.measure(
            f"{suite}:{split}",
            tasks,
            num_samples=num_samples,
            temperature=self.preset.temperature,
            ks=self.preset.ks,
        )
        self.store(report, version)
        self.log.add("evaluation", entry_of(report, step=step, suite=suite, split=split))
        self._known.add((step, suite, split))


class Trial:
    """Runs a plan to its end."""

    def __init__(
        self,
        *,
        preset: Preset,
        engine: TorchEngine,
        parts: Parts,
        measurer: Measurer,
        log: TrialLog,
    ) -> None:
        self._preset = preset
        self._engine = engine
        self._parts = parts
        self._measurer = measurer
        self._log = log

    async def run(self) -> None:
        """Train and measure.

        Raises:
            MentorError: a rollout, a verifier or the store failed; run the same trial again.
        """
        preset, learner = self._preset, self._parts.learner
        learner.start()
        try:
            step = learner.guidance.step
            self._complete_log(step)
            self._parts.collector.restart_at(step * preset.prompts_per_update)
            while step < preset.num_updates:
                await self._curve(step)
                await self._update(step)
                step = learner.guidance.step
            await self._curve(step)
            with self._parts.broadcaster.newest():
                await self._measurer.final(step, learner.guidance.policy_version)
        finally:
            learner.close()
        self._log.add("done", {"num_updates": preset.num_updates})

    def _complete_log(self, step: int) -> None:
        """Add the update that a process committed and did not live to log; nobody timed it."""
        entries = self._log.entries("update")
        record = self._parts.latest_update()
        if record is None or step <= len(entries):
            return
        nothing = dict.fromkeys(self._costs(), 0)
        self._add_update(record, [], nothing, weight=self._matched_weight(), times_s=(0.0, 0.0))

    async def _curve(self, step: int) -> None:
        if step % self._preset.evaluate_every == 0:
            with self._parts.broadcaster.newest():
                await self._measurer.curve(step, self._parts.learner.guidance.policy_version)

    async def _update(self, step: int) -> None:
        parts = self._parts
        guidance = parts.broadcaster.guidance
        before = self._costs()
        started = time.monotonic()
        responses = await parts.collector.collect(
            self._preset.prompts_per_update, guidance, weight=self._matched_weight()
        )
        collected = time.monotonic()
        record = parts.learner.run_step()
        if record is None:
            raise MentorError(
                f"expected {self._preset.prompts_per_update} groups for update {step + 1}, but too "
                "few are ready; start the comparison again in a new directory"
            )
        times_s = (collected - started, time.monotonic() - collected)
        costs = _difference(self._costs(), before)
        weight = _mean_weight(responses, record.gamma)
        self._add_update(record, responses, costs, weight=weight, times_s=times_s)

    def _add_update(
        self,
        record: UpdateRecord,
        responses: Sequence[Response],
        costs: Mapping[str, int],
        *,
        weight: float,
        times_s: tuple[float, float],
    ) -> None:
        self._log.add(
            "update",
            {
                **_numbers(record),
                **costs,
                **_words(responses),
                "num_rollouts": len(responses),
                "matched_weight": weight,
                "collect_s": round(times_s[0], 4),
                "update_s": round(times_s[1], 4),
            },
        )

    def _matched_weight(self) -> float:
        entries = self._log.entries("update")
        return entries[-1]["matched_weight"] if entries else 0.0

    def _costs(self) -> dict[str, int]:
        """Tokens and passes so far, evaluations included: only differences mean something."""
        stats, expert = self._engine.stats, self._parts.expert
        writer = EngineStats() if expert is None else expert.stats
        return {
            "policy_tokens": stats.policy_tokens,
            "policy_steps": stats.policy_steps,
            # Read beside the policy, or written and read as whole solutions.
            "expert_tokens": stats.expert_tokens + writer.policy_tokens + writer.prefill_tokens,
            "expert_calls": stats.expert_calls + writer.policy_steps,
        }


def _difference(after: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    return {name: value - before[name] for name, value in after.items()}


def _numbers(record: UpdateRecord) -> dict[str, Any]:
    return {name: value for name, value in asdict(record).items() if name != "created_at"}


def _mean_weight(responses: Sequence[Response], gamma: float) -> float:
    """Mean w of the entropy gate over the on-policy tokens of an update, under its own gamma."""
    own = [one.rollout.entropies for one in responses if one.kind is TrajectoryKind.ON_POLICY]
    entropies = torch.from_numpy(np.concatenate(own)) if own else torch.empty(0)
    return float(guidance_weight(entropies, gamma).mean()) if len(entropies) else 0.0


def _words(responses: Sequence[Response]) -> dict[str, dict[str, float]]:
    """Share of an update's on-policy and of its mixed responses with each word."""
    return {
        f"words_{kind.value}": {
            word: round(share, 4)
            for word, share in word_shares(
                (one.text for one in responses if one.kind is kind), FIGURE_3_WORDS
            ).items()
            if share > 0
        }
        for kind in (TrajectoryKind.ON_POLICY, TrajectoryKind.MIXED)
    }
