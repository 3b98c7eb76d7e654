"""Rows of a run that looks like a real one: a pure function of a seed and a number of groups.

Groups of eight on-policy and four mixed responses, policy versions 0 to 2000, one update a version,
about four interventions in a mixed response (fewer as the policy learns), texts of about five
characters a token, one demonstration of the expert for every tenth task.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mentor_serve.store.encoding import encode
from mentor_serve.store.records import trajectory_id
from mentor_serve.types import TokenSource, TrajectoryKind

NUM_VERSIONS = 2001
NUM_ON_POLICY, NUM_MIXED = 8, 4
GROUPS_PER_TASK = 8
MEAN_INTERVENTIONS = 4.0
START = datetime(2026, 1, 1, tzinfo=UTC)
GROUP_INTERVAL = timedelta(seconds=5)

_TEXT = (
    "so the answer is then we add two and five to get seven next step but wait maybe check verify "
    "again because first second carry digit sum number equals minus times left right both sides "
    "let us see if this holds therefore hence however think about each case now try another way"
)
_WORDS = _TEXT.split()

Row = dict[str, Any]


class SeededRun:
    """Table name and rows in the order that foreign keys ask for, as SQLite stores values."""

    def __init__(self, *, seed: int, num_groups: int) -> None:
        self.seed = seed
        self.name = f"seed-{seed}"
        self.num_groups = num_groups
        rng = np.random.default_rng(seed)
        self.run_id = _time_ordered_id(START, rng)
        num_tasks = max(1, num_groups // GROUPS_PER_TASK)
        self.task_ids = [_time_ordered_id(START, rng) for _ in range(num_tasks)]
        self.task_ids.sort()
        self.difficulties = rng.normal(0.0, 2.0, num_tasks)
        # 2 % are too old when their turn comes, 1 % fail.
        self._fates = rng.random(num_groups)
        versions = np.arange(num_groups) * NUM_VERSIONS // max(1, num_groups)
        self._num_consumed = np.bincount(versions[self._fates >= 0.03], minlength=NUM_VERSIONS)
        self.sentences = [" ".join(rng.choice(_WORDS, 8)) for _ in range(4096)]

    def before_groups(self, *, with_tokens: bool) -> Iterator[tuple[str, list[Row]]]:
        """Everything that groups refer to, and the updates."""
        at = _stored(START)
        end = _stored(START + self.num_groups * GROUP_INTERVAL)
        run = {"id": self.run_id, "name": self.name, "config_json": "{}"}
        yield "runs", [run | {"started_at": at, "updated_at": end}]
        yield "policy_versions", [self._version(number) for number in range(NUM_VERSIONS)]
        yield "updates", [self._update(step) for step in range(1, NUM_VERSIONS)]
        yield "tasks", [self._task(number) for number in range(len(self.task_ids))]
        rng = np.random.default_rng([self.seed, 1])
        attempts = [self._attempt(one, rng) for one in self.task_ids[::10]]
        yield "trajectories", attempts
        if with_tokens:
            yield "trajectory_tokens", [_tokens(one, [], rng) for one in attempts]
        yield "events", [self._event(number) for number in range(self.num_groups // 50)]

    def groups(self, numbers: range, *, with_tokens: bool) -> dict[str, list[Row]]:
        """Table to rows for the groups of these numbers."""
        rng = np.random.default_rng([self.seed, 2, numbers.start])
        token_rng = np.random.default_rng([self.seed, 4, numbers.start])
        rows: dict[str, list[Row]] = {
            "rollout_groups": [],
            "trajectories": [],
            "interventions": [],
            "trajectory_tokens": [],
        }
        for number in numbers:
            group = self._group(number, rng, with_tokens=with_tokens)
            rows["rollout_groups"].append(group)
            for index in range(NUM_ON_POLICY + NUM_MIXED):
                response = self._response(number, index, group, rng)
                group["num_tokens"] += response["num_tokens"]
                replaced = _interventions(response, rng)
                rows["trajectories"].append(response)
                rows["interventions"].extend(replaced)
                if with_tokens:
                    rows["trajectory_tokens"].append(_tokens(response, replaced, token_rng))
        return rows

    def _version(self, number: int) -> Row:
        return {
            "run_id": self.run_id,
            "version": number,
            "step": number,
            "created_at": self._time_of(number),
            "is_live": number == NUM_VERSIONS - 1,
            "parent_version": number - 1 if number else None,
            "alpha": max(0.0, 1 - number / 120),
            "gamma": 1.5,
        }

    def _update(self, step: int) -> Row:
        progress = step / NUM_VERSIONS
        num_groups = int(self._num_consumed[step - 1])
        measured = {"loss": 0.1 - 0.05 * progress, "entropy": 1.2 - progress, "grad_norm": 0.5}
        return measured | {
            "run_id": self.run_id,
            "step": step,
            "policy_version": step,
            "num_groups": num_groups,
            "num_trajectories": 12 * num_groups,
            "num_tokens": 1440 * num_groups,
            "mean_reward_on_policy": 0.3 + 0.5 * progress,
            "mean_reward_mixed": 0.5 + 0.3 * progress,
            "alpha": max(0.0, 1 - step / 120),
            "gamma": 1.5,
            "num_stale": 0,
            "created_at": self._time_of(step),
        }

    def _task(self, number: int) -> Row:
        return {
            "id": self.task_ids[number],
            "run_id": self.run_id,
            "source": f"seed:level-{number % 4}",
            "prompt": f"Problem {number}: {self.sentences[number % len(self.sentences)]}?",
            "answer": str(number),
            "split": "train",
            "metadata_json": "{}",
            "content_key": f"{self.seed:024x}{number:040x}",
            "created_at": _stored(START),
        }

    def _attempt(self, task_id: str, rng: np.random.Generator) -> Row:
        row = self._measured(rng, num_tokens=200, passes=bool(rng.random() < 0.8))
        return row | {
            "id": _time_ordered_id(START, rng),
            "run_id": self.run_id,
            "task_id": task_id,
            "kind": TrajectoryKind.EXPERT.value,
            "sample_index": 0,
            "min_policy_version": 0,
            "max_policy_version": 0,
            "mean_weight": 1.0,
            "expert_model": "seed:expert",
            "created_at": _stored(START),
        }

    def _event(self, number: int) -> Row:
        rng = np.random.default_rng([self.seed, 3, number])
        at = START + 50 * number * GROUP_INTERVAL
        return {
            "id": _time_ordered_id(at, rng),
            "run_id": self.run_id,
            "kind": "seeded",
            "severity": "info" if number % 20 else "warning",
            "message": "an event",
            "details_json": "{}",
            "created_at": _stored(at),
        }

    def _group(self, number: int, rng: np.random.Generator, *, with_tokens: bool) -> Row:
        at = START + number * GROUP_INTERVAL
        version = self._version_of(number)
        is_last = version == NUM_VERSIONS - 1
        fate = self._fates[number]
        status = "stale" if fate < 0.02 else "failed" if fate < 0.03 else "consumed"
        if status == "consumed" and is_last:
            status = "ready" if with_tokens else "stale"
        return {
            "id": _time_ordered_id(at, rng),
            "run_id": self.run_id,
            "task_id": self.task_ids[number % len(self.task_ids)],
            "policy_version": version,
            "min_policy_version": max(0, version - int(rng.choice(3, p=(0.7, 0.2, 0.1)))),
            "step": version,
            "gamma": 1.5,
            "alpha": max(0.0, 1 - version / 120),
            "status": status,
            "num_on_policy": NUM_ON_POLICY,
            "num_mixed": NUM_MIXED,
            "num_tokens": 0,
            "consumed_by_step": version + 1 if status == "consumed" else None,
            "created_at": _stored(at),
        }

    def _response(self, number: int, index: int, group: Row, rng: np.random.Generator) -> Row:
        is_mixed = index >= NUM_ON_POLICY
        progress = group["policy_version"] / NUM_VERSIONS
        difficulty = self.difficulties[number % len(self.task_ids)]
        skill = 3.0 * progress - 1.5 - difficulty + (0.8 if is_mixed else 0.0)
        num_tokens = int(np.clip(rng.lognormal(4.6, 0.6), 8, 1024))
        asked = rng.poisson(MEAN_INTERVENTIONS * (1.5 - progress)) if is_mixed else 0
        kind = TrajectoryKind.MIXED if is_mixed else TrajectoryKind.ON_POLICY
        sample_index = index - NUM_ON_POLICY if is_mixed else index
        num_interventions = min(int(asked), num_tokens)
        row = self._measured(
            rng, num_tokens=num_tokens, passes=bool(rng.random() < 1 / (1 + np.exp(-skill)))
        )
        return row | {
            "id": trajectory_id(group["id"], kind=kind, sample_index=sample_index),
            "group_id": group["id"],
            "run_id": self.run_id,
            "task_id": group["task_id"],
            "kind": kind.value,
            "sample_index": sample_index,
            "num_gated": min(2 * num_interventions, num_tokens),
            "num_interventions": num_interventions,
            "mean_weight": 0.2 if is_mixed else 0.0,
            "mean_entropy": 1.2 - progress,
            "min_policy_version": group["min_policy_version"],
            "max_policy_version": group["policy_version"],
            "created_at": group["created_at"],
        }

    def _measured(self, rng: np.random.Generator, *, num_tokens: int, passes: bool) -> Row:
        """What does not depend on the kind: every column, so that all rows have the same."""
        first = int(rng.integers(0, len(self.sentences) - 128))
        return {
            "id": None,
            "group_id": None,
            "status": "ok",
            "reward": 0.9 * passes + 0.1,
            "accuracy": float(passes),
            "format_score": 1.0,
            "text": " ".join(self.sentences[first : first + 1 + num_tokens // 8]),
            "num_prompt_tokens": 40,
            "num_tokens": num_tokens,
            "num_gated": 0,
            "num_interventions": 0,
            "mean_entropy": None,
            "mean_weight": None,
            "stop_reason": "eos",
            "latency_s": num_tokens / 50,
            "seed": 1,
            "expert_lost": False,
        }

    def _version_of(self, number: int) -> int:
        return number * NUM_VERSIONS // self.num_groups

    def _time_of(self, version: int) -> str:
        return _stored(START + version * self.num_groups * GROUP_INTERVAL / NUM_VERSIONS)


def _interventions(response: Row, rng: np.random.Generator) -> list[Row]:
    count = response["num_interventions"]
    if not count:
        return []
    positions = np.sort(rng.permutation(response["num_tokens"])[:count])
    # Squares of uniform numbers: a few replacements are frequent and most are rare.
    proposed, chosen = (len(_WORDS) * rng.random((2, count)) ** 2).astype(int).tolist()
    return [
        {
            "trajectory_id": response["id"],
            "position": position,
            "proposed_token_id": old,
            "proposed_text": f" {_WORDS[old]}",
            "chosen_token_id": new,
            "chosen_text": f" {_WORDS[new]}",
            "entropy": 2.0,
            "weight": 0.8,
            "policy_logprob": -1.5,
            "expert_logprob": -0.5,
        }
        for position, old, new in zip(positions.tolist(), proposed, chosen, strict=True)
    ]


def _tokens(response: Row, replaced: list[Row], rng: np.random.Generator) -> Row:
    length = response["num_tokens"]
    is_expert = response["kind"] == TrajectoryKind.EXPERT.value
    sources = np.full(length, TokenSource.EXPERT if is_expert else TokenSource.POLICY, np.uint8)
    looked = np.full(length, np.nan, np.float32)
    for one in replaced:
        sources[one["position"]] = TokenSource.EXPERT
        looked[one["position"]] = one["expert_logprob"]
    arrays: dict[str, NDArray[Any]] = {
        "prompt_token_ids": np.arange(response["num_prompt_tokens"], dtype=np.int32),
        "token_ids": rng.integers(0, 32_000, (length,)).astype(np.int32),
        "policy_logprobs": -rng.random((length,)).astype(np.float32),
        "expert_logprobs": looked,
        "mixed_logprobs": looked,
        "entropies": rng.random((length,)).astype(np.float32),
        "weights": np.full(length, response["mean_weight"], np.float32),
        "sources": sources,
        "versions": np.full(length, response["min_policy_version"], np.int32),
    }
    encoded = {name: encode(values) for name, values in arrays.items()}
    return {"trajectory_id": response["id"]} | encoded


def _stored(at: datetime) -> str:
    """As SQLite stores times, which PostgreSQL reads as well."""
    return at.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _time_ordered_id(at: datetime, rng: np.random.Generator) -> str:
    """A UUID version 7 of that time (RFC 9562)."""
    low, high = rng.integers(0, 1 << 62, 2).tolist()
    milliseconds = int(at.timestamp() * 1000)
    value = milliseconds << 80 | 7 << 76 | (high & 0xFFF) << 64 | 2 << 62 | low
    return str(uuid.UUID(int=value))
