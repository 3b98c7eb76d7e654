"""Log-probabilities, entropies and weights of stored rollouts, computed again from kept weights.

A token is computed again under the version that it is stamped with. Where the weights were swapped
while a response grew, the keys and values of its earlier tokens stayed those of older weights: from
the first such token on nothing can be reproduced exactly from one version, and nothing is judged.
Shape: T response tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from mentor_serve.core.gate import guidance_weight
from mentor_serve.learner.batch import TrainingTrajectory, build_batch
from mentor_serve.learner.config import AdvantageConfig
from mentor_serve.learner.logprobs import ResponseScorer
from mentor_serve.learner.packing import build_micro_batch, plan_micro_batches
from mentor_serve.learner.replay.comparison import FieldComparison, Floats, ReplayReport
from mentor_serve.store.records import LeasedGroup, LeasedTrajectory, TrajectoryRecord
from mentor_serve.types import TokenSource, TrajectoryKind

LoadVersion = Callable[[int], PreTrainedModel]
"""Gives the model of a version; raises `WeightsError` naming one that is not kept."""

MAX_TOKENS = 4096
"""Tokens of one forward pass."""
_BY_TOKEN = ("policy_logprobs", "entropies", "weights")
_SUMMARIES = (
    "num_tokens",
    "num_gated",
    "num_interventions",
    "mean_entropy",
    "mean_weight",
    "min_policy_version",
    "max_policy_version",
)
_SWAPPED = "after a swap of weights inside the response (older keys and values)"
_UNRECORDED = "not recorded when it was sampled"
_EXPERT_LOST = "gate closed because the expert was away"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One trajectory to replay, and what its row says beyond its arrays."""

    trajectory: LeasedTrajectory
    row: TrajectoryRecord


def replay_rollouts(
    group: LeasedGroup,
    sampled: Sequence[Sampled],
    *,
    subject: str,
    load_version: LoadVersion,
    temperature: float,
    alpha: float,
    advantages: AdvantageConfig,
    tolerance: float,
) -> ReplayReport:
    """Compute trajectories of a group again and compare them with what is stored.

    Args:
        group: the whole group: advantages depend on all its rewards.
        sampled: the trajectories to replay; on-policy and mixed ones have arrays to compare.
        subject: what the report is about.
        load_version: gives the model of a kept version, in the type it generated in.
        temperature: that the rollouts were sampled at.
        alpha: weight of the mixed advantages (Eq. 11).
        advantages: how rewards become advantages.
        tolerance: values agree within `tolerance * max(1, |stored|)`, and weights, which are
            entropies over gamma, within that over min(1, gamma).

    Raises:
        WeightsError: a version that is needed is not kept, or damaged.
    """
    recomputed = _Recomputed(sampled)
    versions = recomputed.versions()
    for version in versions:
        recomputed.compute(version, load_version(version), temperature=temperature)
    verdict = _Verdict(gamma=group.gamma, tolerance=tolerance)
    for item in sampled:
        verdict.add_summaries(item)
        verdict.add_tokens(item, *recomputed.of(item.trajectory.trajectory_id))
    return ReplayReport(
        subject=subject,
        versions=tuple(versions),
        tolerance=tolerance,
        fields=tuple(verdict.fields.values()),
        skipped={reason: count for reason, count in verdict.skipped.items() if count},
        derived=_advantages(group, sampled, alpha=alpha, config=advantages),
    )


class _Verdict:
    """Comparisons of all trajectories, by field."""

    def __init__(self, *, gamma: float, tolerance: float) -> None:
        self._gamma = gamma
        self._tolerance = tolerance
        self.fields = {name: FieldComparison(field=name) for name in (*_BY_TOKEN, *_SUMMARIES)}
        self.skipped: Counter[str] = Counter()

    def add_summaries(self, item: Sampled) -> None:
        """Columns of `trajectories` beside what the stored arrays give."""
        for name, stored, value in _summaries(item):
            self.fields[name].add(
                np.array([np.nan if stored is None else stored]),
                np.array([value]),
                np.array([stored is not None]),
                tolerance=self._tolerance,
                version=item.row.min_policy_version,
                trajectory_id=item.row.id,
                is_by_token=False,
            )

    def add_tokens(self, item: Sampled, logprobs: Floats, entropies: Floats) -> None:
        """Stored arrays beside those computed again, [T] each."""
        stored = item.trajectory
        is_exact, is_recorded = exact_prefix(stored.versions), _is_recorded(stored)
        judged = is_exact & is_recorded
        open_gate = judged & ~_is_closed(item)
        self.skipped[_UNRECORDED] += int(np.count_nonzero(~is_recorded))
        self.skipped[_SWAPPED] += int(np.count_nonzero(is_recorded & ~is_exact))
        self.skipped[_EXPERT_LOST] += int(np.count_nonzero(judged & ~open_gate))
        # A weight is an entropy over gamma, so that is what its error is over, too.
        slack = 1.0 / self._gamma if 0 < self._gamma < 1 else 1.0
        weights = _weights(stored, entropies, gamma=self._gamma)
        for name, values, counts, tolerance in (
            ("policy_logprobs", logprobs, judged, self._tolerance),
            ("entropies", entropies, judged, self._tolerance),
            ("weights", weights, open_gate, self._tolerance * slack),
        ):
            self.fields[name].add(
                getattr(stored, name).astype(np.float64),
                values,
                counts,
                tolerance=tolerance,
                version=int(stored.versions[0]),
                trajectory_id=stored.trajectory_id,
            )


def exact_prefix(versions: NDArray[np.int32]) -> NDArray[np.bool_]:
    """[T]: the tokens before the first that another version produced.

    Worked value: versions (3, 3, 4, 4) give (True, True, False, False).
    """
    is_first = versions == versions[:1]
    prefix: NDArray[np.bool_] = np.logical_and.accumulate(is_first)
    return prefix


class _Recomputed:
    """Arrays of all trajectories, filled version by version: one model in memory at a time."""

    def __init__(self, sampled: Sequence[Sampled]) -> None:
        self._items = {item.trajectory.trajectory_id: item.trajectory for item in sampled}
        self._values = {
            name: np.full((2, len(item.token_ids)), np.nan) for name, item in self._items.items()
        }

    def versions(self) -> list[int]:
        """Versions that some token with a verdict was produced by."""
        found = {
            int(item.versions[0])
            for item in self._items.values()
            if len(item.versions) and _is_recorded(item).any()
        }
        return sorted(found)

    def compute(self, version: int, model: PreTrainedModel, *, temperature: float) -> None:
        """Fill in the tokens that `version` produced."""
        scorer = ResponseScorer(model, temperature=temperature)
        wanted = [item for item in self._items.values() if (item.versions == version).any()]
        blocks = [[_as_training(item)] for item in wanted]
        for rows in plan_micro_batches(blocks, max_tokens=MAX_TOKENS):
            micro_batch = build_micro_batch(rows).to(model.device)
            logprobs, entropies = scorer.with_entropies(micro_batch)
            both = torch.stack([logprobs, entropies]).double().cpu().numpy()
            start = 0
            for item in (item for row in rows for block in row for item in block):
                stop = start + len(item.token_ids)
                chosen = self._items[item.trajectory_id].versions == version
                self._values[item.trajectory_id][:, chosen] = both[:, start:stop][:, chosen]
                start = stop

    def of(self, trajectory_id: str) -> tuple[Floats, Floats]:
        """Log-probabilities and entropies, [T] each; NaN where nothing was computed."""
        logprobs, entropies = self._values[trajectory_id]
        return logprobs, entropies


def _as_training(item: LeasedTrajectory) -> TrainingTrajectory:
    """In the learner's form; old log-probabilities, mask and advantage are not read."""
    count = len(item.token_ids)
    return TrainingTrajectory(
        trajectory_id=item.trajectory_id,
        kind=item.kind,
        prompt_token_ids=item.prompt_token_ids,
        token_ids=item.token_ids,
        old_logprobs=np.zeros(count, np.float32),
        keeps_old=False,
        mask=np.ones(count, np.bool_),
        advantage=0.0,
    )


def _is_recorded(item: LeasedTrajectory) -> NDArray[np.bool_]:
    recorded: NDArray[np.bool_] = np.isfinite(item.policy_logprobs) & np.isfinite(item.entropies)
    return recorded


def _weights(item: LeasedTrajectory, entropies: Floats, *, gamma: float) -> Floats:
    """`w = min(1, H / gamma)` for mixed rollouts, 0 for the policy's own."""
    if item.kind is not TrajectoryKind.MIXED:
        return np.zeros_like(entropies)
    weights: Floats = guidance_weight(torch.from_numpy(entropies), gamma).numpy()
    return weights


def _is_closed(item: Sampled) -> NDArray[np.bool_]:
    """Tokens whose weight was set to 0 because nobody could be asked."""
    closed: NDArray[np.bool_] = np.logical_and(item.row.expert_lost, item.trajectory.weights == 0)
    return closed


def _summaries(item: Sampled) -> list[tuple[str, float | None, float]]:
    """Columns of `trajectories` beside what the stored arrays give."""
    row, stored = item.row, item.trajectory
    pairs: list[tuple[str, float | None, float]] = [
        ("num_tokens", row.num_tokens, len(stored.token_ids)),
        ("num_gated", row.num_gated, int(np.count_nonzero(stored.sources))),
        (
            "num_interventions",
            row.num_interventions,
            int(np.count_nonzero(stored.sources == TokenSource.EXPERT)),
        ),
        ("mean_entropy", row.mean_entropy, np.mean(stored.entropies, dtype=np.float64)),
        ("mean_weight", row.mean_weight, np.mean(stored.weights, dtype=np.float64)),
        ("min_policy_version", row.min_policy_version, stored.versions.min()),
        ("max_policy_version", row.max_policy_version, stored.versions.max()),
    ]
    return [(name, left, float(right)) for name, left, right in pairs]


def _advantages(
    group: LeasedGroup, sampled: Sequence[Sampled], *, alpha: float, config: AdvantageConfig
) -> dict[str, dict[str, float]]:
    batch = build_batch([group], alpha=alpha, policy_version=group.policy_version, config=config)
    found = {item.trajectory_id: item.advantage for item in batch.groups[0].trajectories}
    return {
        item.trajectory.trajectory_id: {
            "reward": item.trajectory.reward,
            "advantage": found[item.trajectory.trajectory_id],
        }
        for item in sampled
        if item.trajectory.trajectory_id in found
    }
