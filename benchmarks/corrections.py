"""What the learner's options are worth on the bundled task: staleness, corrections, advantages.

    python -m benchmarks.corrections --json

Every option trains the bundled policy beside the bundled expert from the same start, on the same
problems, for the same number of updates, without a service around it: rollouts of update `s` are
sampled by the weights of version `s - staleness`, as a service that lags behind would have it. Then
accuracy on held-out problems is measured with fixed seeds. Rows are printed as they come.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from benchmarks.machine import add_machine_options, machine_of, positive_int, report_progress
from mentor_serve.core.schedules import cosine_alpha
from mentor_serve.engines import TorchEngine
from mentor_serve.learner import (
    AdvantageConfig,
    TorchBackend,
    TrainingOptions,
    UpdateConfig,
    build_batch,
)
from mentor_serve.models.loading import load_model, load_tokenizer
from mentor_serve.rollout.groups import derive_seed, plan_requests
from mentor_serve.rollout.prompts import PromptRenderer
from mentor_serve.rollout.tasks import build_source
from mentor_serve.rollout.verifiers import VerifierSpec, build_verifier
from mentor_serve.store.records import LeasedGroup, LeasedTrajectory
from mentor_serve.types import (
    Guidance,
    Rollout,
    RolloutRequest,
    SamplingParams,
    Task,
    TrajectoryKind,
)

_POLICY, _EXPERT = "embedded:policy", "embedded:expert"
_FIRST_GAMMA = 999.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to train."""

    staleness: int = 0
    update: dict[str, Any] = field(default_factory=dict)
    advantages: dict[str, Any] = field(default_factory=dict)
    keep_silent: bool = True
    record_mixed: bool = False


_STALE = 4
OPTIONS: dict[str, Option] = {
    "fresh": Option(),
    "stale": Option(staleness=_STALE),
    "stale_recomputed": Option(staleness=_STALE, update={"old_logprobs": "recomputed"}),
    "stale_decoupled": Option(
        staleness=_STALE, update={"old_logprobs": "recomputed", "importance": "token"}
    ),
    "stale_sequence_mask": Option(
        staleness=_STALE,
        update={
            "old_logprobs": "recomputed",
            "importance": "sequence",
            "importance_mode": "mask",
            "importance_cap": 3.0,
        },
    ),
    "mixed_ratio": Option(advantages={"mixed_ratio": "mixed"}, record_mixed=True),
    "leave_one_out": Option(advantages={"estimator": "leave_one_out"}),
    "dr_grpo": Option(advantages={"estimator": "dr_grpo"}),
    "mask_truncated": Option(advantages={"mask_truncated": True}),
    "signal_only": Option(keep_silent=False),
}
"""By name; `fresh` is the paper's own, without lag."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What all options share."""

    updates: int
    prompts: int
    """Groups of one update, of eight on-policy and four mixed rollouts; one optimiser step."""
    problems: int
    learning_rate: float
    max_new_tokens: int = 96

    @property
    def sampling(self) -> SamplingParams:
        """Of training rollouts."""
        return SamplingParams(temperature=1.0, max_new_tokens=self.max_new_tokens)


class Trial:
    """One run: an engine that may lag behind the backend that it collects for."""

    def __init__(self, option: Option, plan: Plan, *, seed: int) -> None:
        self._option, self._plan, self._seed = option, plan, seed
        tokenizer = load_tokenizer(_POLICY)
        self._renderer = PromptRenderer(tokenizer)
        self._verifier = build_verifier(VerifierSpec())
        self._source = build_source(source="reasoning_gym", name="embedded", seed=seed)
        self._engine = TorchEngine(
            load_model(_POLICY),
            load_model(_EXPERT),
            tokenizer,
            max_batch_size=12 * plan.prompts,
            max_model_len=256,
        )
        self._backend = TorchBackend(TrainingOptions(learning_rate=plan.learning_rate))
        self._backend.build(load_model(_POLICY))
        self._history = [(self._backend.full_state(), _FIRST_GAMMA)]

    def run(self) -> dict[str, Any]:
        """Train, then measure."""
        kls, shares = [], []
        for step in range(self._plan.updates):
            metrics = self._update(step)
            kls.append(metrics.mismatch_kl)
            shares.append(metrics.effective_sample_share)
        self._engine.load_weights(self._history[-1][0], version=self._plan.updates)
        return {
            "accuracy": self._accuracy(),
            "mismatch_kl": statistics.median(kls),
            "effective_sample_share": statistics.median(shares),
        }

    def _update(self, step: int) -> Any:
        option, plan = self._option, self._plan
        version = max(0, step - option.staleness)
        weights, gamma = self._history[version]
        self._engine.load_weights(weights, version=version)
        alpha = cosine_alpha(version, plan.updates)
        guidance = Guidance(policy_version=version, step=version, alpha=alpha, gamma=gamma)
        tasks = [self._source.next_task() for _ in range(plan.prompts)]
        batch = build_batch(
            self._collect(tasks, guidance, step),
            alpha=cosine_alpha(step, plan.updates),
            policy_version=step,
            config=AdvantageConfig(**option.advantages),
            keep_silent=option.keep_silent,
        )
        config = UpdateConfig(mini_batch_prompts=plan.prompts, **option.update)
        metrics = self._backend.step(batch, config)
        gamma = batch.gamma(0.95, floor=0.0, fallback=gamma)
        self._history.append((self._backend.full_state(), gamma))
        if len(self._history) > option.staleness + 2:
            self._history[len(self._history) - option.staleness - 3] = ({}, 0.0)
        return metrics

    def _collect(self, tasks: Sequence[Task], guidance: Guidance, step: int) -> list[LeasedGroup]:
        planned = [
            plan_requests(
                self._renderer.render(task),
                guidance,
                num_on_policy=8,
                num_mixed=4,
                sampling=self._plan.sampling,
                seed=derive_seed(self._seed, step, number),
                record_mixed=self._option.record_mixed,
            )
            for number, task in enumerate(tasks)
        ]
        rollouts = iter(self._engine.generate([item for items in planned for item in items]))
        return [
            self._group(task, [(request, next(rollouts)) for request in requests], guidance)
            for task, requests in zip(tasks, planned, strict=True)
        ]

    def _group(
        self,
        task: Task,
        answered: Sequence[tuple[RolloutRequest, Sequence[Rollout]]],
        guidance: Guidance,
    ) -> LeasedGroup:
        prompt = np.asarray(answered[0][0].prompt_token_ids, np.int32)
        self._verifier.prepare(task)
        return LeasedGroup(
            group_id=str(task.prompt),
            task_id="",
            policy_version=guidance.policy_version,
            min_policy_version=guidance.policy_version,
            gamma=guidance.gamma,
            alpha=guidance.alpha,
            prompt_token_ids=prompt,
            trajectories=[
                self._trajectory(task, prompt, request, index, rollout)
                for request, rollouts in answered
                for index, rollout in enumerate(rollouts)
            ],
        )

    def _trajectory(
        self, task: Task, prompt: Any, request: RolloutRequest, index: int, rollout: Rollout
    ) -> LeasedTrajectory:
        score = self._score(task, rollout)
        return LeasedTrajectory(
            trajectory_id=f"{request.seed}-{index}",
            kind=TrajectoryKind.MIXED if request.mixed else TrajectoryKind.ON_POLICY,
            sample_index=index,
            reward=score.reward,
            accuracy=score.accuracy,
            format_score=score.format_score,
            prompt_token_ids=prompt,
            token_ids=rollout.token_ids,
            policy_logprobs=rollout.policy_logprobs,
            expert_logprobs=rollout.expert_logprobs,
            mixed_logprobs=rollout.mixed_logprobs,
            entropies=rollout.entropies,
            weights=rollout.weights,
            sources=rollout.sources,
            versions=rollout.policy_versions,
            stop_reason=rollout.stop_reason,
        )

    def _score(self, task: Task, rollout: Rollout) -> Any:
        return self._verifier.score(
            task, self._renderer.response_prefix + self._renderer.decode(rollout)
        )

    def _accuracy(self) -> float:
        """Mean over four samples of each held-out problem, the same for every option and seed."""
        tasks = self._source.holdout(self._plan.problems)
        requests = [
            RolloutRequest(
                prompt_token_ids=tuple(self._renderer.render(task)),
                num_samples=4,
                seed=derive_seed("evaluation", number),
                sampling=self._plan.sampling,
            )
            for number, task in enumerate(tasks)
        ]
        scores = []
        for task, rollouts in zip(tasks, self._engine.generate(requests), strict=True):
            self._verifier.prepare(task)
            scores += [self._score(task, rollout).accuracy for rollout in rollouts]
        return statistics.fmean(scores)


def measure(name: str, plan: Plan, seeds: Sequence[int]) -> dict[str, Any]:
    """One row: the option's runs."""
    runs = [Trial(OPTIONS[name], plan, seed=seed).run() for seed in seeds]
    accuracies = [run["accuracy"] for run in runs]
    return {
        "option": name,
        "accuracy_mean": round(statistics.fmean(accuracies), 4),
        "accuracy_stderr": round(statistics.stdev(accuracies) / len(runs) ** 0.5, 4)
        if len(runs) > 1
        else None,
        "accuracy": [round(value, 4) for value in accuracies],
        "mismatch_kl": float(f"{statistics.fmean(run['mismatch_kl'] for run in runs):.3g}"),
        "effective_sample_share": round(
            statistics.fmean(run["effective_sample_share"] for run in runs), 4
        ),
        **{key: value for key, value in asdict(OPTIONS[name]).items() if value},
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--option", nargs="+", choices=list(OPTIONS), default=list(OPTIONS))
    parser.add_argument("--updates", type=positive_int, default=60)
    parser.add_argument("--prompts", type=positive_int, default=16, help="groups of an update")
    parser.add_argument("--problems", type=positive_int, default=128, help="held-out problems")
    parser.add_argument("--seeds", type=positive_int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    add_machine_options(parser)
    return parser.parse_args()


def main() -> None:
    """Parse, train, print."""
    arguments = _options()
    machine = machine_of(arguments)
    torch.manual_seed(0)
    plan = Plan(
        updates=arguments.updates,
        prompts=arguments.prompts,
        problems=arguments.problems,
        learning_rate=arguments.learning_rate,
    )
    report: dict[str, Any] = {"rows": [], **asdict(plan), "machine": machine.describe()}
    for name in arguments.option:
        row = measure(name, plan, range(arguments.seeds))
        report_progress(json.dumps(row))
        report["rows"].append(row)
    if arguments.json:
        print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
