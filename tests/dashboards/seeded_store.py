"""A store as a healthy run of the embedded pair leaves it: rows for the dashboard's tests."""

from __future__ import annotations

import math
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import insert

from mentor_serve.models.reference.tokenizer import QUESTION, build_tokenizer
from mentor_serve.store import models as tables
from mentor_serve.store import schema
from mentor_serve.store.connection import open_engine, writing
from mentor_serve.store.encoding import encode
from mentor_serve.store.rollup import add_to_version_stats

RUN_ID = "run-1"
HOSTILE_TEXT = "<script>alert('x')</script> & <b>bold</b>"


def sqlite_url(path: Path) -> str:
    return f"sqlite:///{path}"


def empty_store(path: Path) -> str:
    url = sqlite_url(path)
    schema.upgrade(url)
    return url


def write_rows(url: str, rows: dict[Any, list[dict[str, Any]]]) -> None:
    """Insert rows by table, in the order given."""
    engine = open_engine(url)
    try:
        with writing(engine, url, doing="seeding") as connection:
            for table, entries in rows.items():
                if entries:
                    connection.execute(insert(table), entries)
            of_groups = [row for row in rows.get(tables.Trajectory, []) if row["group_id"]]
            add_to_version_stats(connection, of_groups)
    finally:
        engine.dispose()


def run_row(run_id: str = RUN_ID, *, name: str = "default", at: datetime) -> dict[str, Any]:
    return {"id": run_id, "name": name, "config_json": {}, "started_at": at, "updated_at": at}


def save_tokenizer(directory: Path) -> Path:
    """A directory that `load_tokenizer` takes: the embedded pair's tokenizer and a config."""
    directory.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save_pretrained(directory)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return directory


class SeededRun:
    """Makes the rows of one run; deterministic in `seed`."""

    def __init__(
        self,
        *,
        num_updates: int = 40,
        groups_per_update: int = 3,
        num_on_policy: int = 4,
        num_mixed: int = 2,
        now: datetime | None = None,
        seconds_per_update: float = 30.0,
        seed: int = 0,
    ) -> None:
        self.random = random.Random(seed)
        self.numpy = np.random.default_rng(seed)
        self.tokenizer = build_tokenizer()
        self.proposals = [
            self.tokenizer.encode(text, add_special_tokens=False)[0]
            for text in ("okay", "wait", "7", "3", " + ", ", ")
        ]
        self.num_updates = num_updates
        self.groups_per_update = groups_per_update
        self.num_on_policy = num_on_policy
        self.num_mixed = num_mixed
        self.now = now or datetime.now(UTC)
        self.seconds = seconds_per_update
        self.rows: dict[Any, list[dict[str, Any]]] = {
            table: []
            for table in (
                tables.Run,
                tables.PolicyVersion,
                tables.TaskRow,
                tables.RolloutGroup,
                tables.Trajectory,
                tables.TrajectoryTokens,
                tables.InterventionRow,
                tables.Update,
                tables.Evaluation,
                tables.Event,
            )
        }

    def write(self, url: str) -> None:
        start = self._time(0)
        self.rows[tables.Run].append(run_row(at=start) | {"updated_at": self.now})
        self.rows[tables.PolicyVersion].append(self._version(0))
        for step in range(1, self.num_updates + 1):
            self._groups(step)
            self.rows[tables.PolicyVersion].append(self._version(step))
            self.rows[tables.Update].append(self._update(step))
        self._queue()
        self._evaluations()
        self._events()
        write_rows(url, self.rows)

    def _time(self, step: float) -> datetime:
        return self.now - timedelta(seconds=5 + (self.num_updates - step) * self.seconds)

    def _progress(self, step: float) -> float:
        return 1 - math.exp(-3 * step / max(1, self.num_updates))

    def _gamma(self, step: float) -> float:
        return 999.0 if step < 1 else 2.4 - 1.3 * self._progress(step)

    def _alpha(self, step: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, self.num_updates * 1.2))))

    def _version(self, version: int) -> dict[str, Any]:
        return {
            "run_id": RUN_ID,
            "version": version,
            "step": version,
            "sha256": f"{version:064x}",
            "path": f"weights/{version}",
            "created_at": self._time(version),
            "is_live": version == self.num_updates,
            "parent_version": version - 1 if version else None,
            "alpha": self._alpha(version),
            "gamma": self._gamma(version),
        }

    def _groups(self, step: int) -> None:
        for index in range(self.groups_per_update):
            stale_by = self.random.choice([0, 0, 0, 1, 1, 2])
            version = max(0, step - 1 - stale_by)
            self._group(
                f"g-{step:05d}-{index:02d}",
                version=version,
                status="consumed",
                step=step,
                at=self._time(step - self.random.random()),
            )

    def _queue(self) -> None:
        for index, status in enumerate(["ready"] * 5 + ["leased"] * 3 + ["stale"] * 2 + ["failed"]):
            self._group(
                f"h-{index:05d}",
                version=self.num_updates,
                status=status,
                step=None,
                at=self.now - timedelta(seconds=65 + index),
            )

    def _group(
        self, group_id: str, *, version: int, status: str, step: int | None, at: datetime
    ) -> None:
        a, b, c = (self.random.randint(0, 9) for _ in range(3))
        task_id = f"task-{group_id}"
        self.rows[tables.TaskRow].append(
            {
                "id": task_id,
                "run_id": RUN_ID,
                "source": "reasoning_gym:chain_sum",
                "prompt": QUESTION.format(expression=f"{a} + {b} - {c}"),
                "answer": str(a + b - c),
                "split": "train",
                "metadata_json": {},
                "content_key": f"{task_id:0>64}",
                "created_at": at,
            }
        )
        self.rows[tables.RolloutGroup].append(
            {
                "id": group_id,
                "run_id": RUN_ID,
                "task_id": task_id,
                "policy_version": version,
                "min_policy_version": version,
                "step": version,
                "gamma": self._gamma(version),
                "alpha": self._alpha(version),
                "status": status,
                "num_on_policy": self.num_on_policy,
                "num_mixed": self.num_mixed,
                "lease_owner": "learner" if status == "leased" else None,
                "lease_expires_at": self.now if status == "leased" else None,
                "consumed_by_step": step,
                "error": "verifier timed out" if status == "failed" else None,
                "created_at": at,
            }
        )
        if status == "failed":
            return
        for index in range(self.num_on_policy + self.num_mixed):
            is_mixed = index >= self.num_on_policy
            self._trajectory(
                f"t-{group_id}-{index:02d}",
                group_id=group_id,
                version=version,
                kind="mixed" if is_mixed else "on_policy",
                sample_index=index,
                numbers=(a, b, c),
                at=at,
            )

    def _trajectory(
        self,
        trajectory_id: str,
        *,
        group_id: str,
        version: int,
        kind: str,
        sample_index: int,
        numbers: tuple[int, int, int],
        at: datetime,
    ) -> None:
        a, b, c = numbers
        chance = 0.12 + 0.6 * self._progress(version) + (0.12 if kind == "mixed" else 0.0)
        correct = self.random.random() < chance
        answer = a + b - c + (0 if correct else self.random.choice([-1, 1, 2]))
        middle = f", let me verify: {a + b} - {c} = {answer}" if kind == "mixed" else ""
        text = (
            f"<think>{a} + {b} = {a + b}, {a + b} - {c} = {answer}{middle}</think>\n"
            f"\\boxed{{{answer}}}"
        )
        ids = np.asarray(self.tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)
        arrays = self._arrays(ids, version=version, mixed=kind == "mixed")
        sources = arrays["sources"]
        self.rows[tables.TrajectoryTokens].append(
            {"trajectory_id": trajectory_id}
            | {name: encode(values) for name, values in arrays.items()}
        )
        self.rows[tables.Trajectory].append(
            {
                "id": trajectory_id,
                "group_id": group_id,
                "run_id": RUN_ID,
                "task_id": f"task-{group_id}",
                "kind": kind,
                "sample_index": sample_index,
                "status": "ok",
                "error": None,
                "reward": 0.9 * correct + 0.1,
                "accuracy": float(correct),
                "format_score": 1.0,
                "text": text,
                "num_prompt_tokens": len(arrays["prompt_token_ids"]),
                "num_tokens": len(ids),
                "num_gated": int(np.count_nonzero(sources)),
                "num_interventions": int(np.count_nonzero(sources == 2)),
                "mean_entropy": float(arrays["entropies"].mean()),
                "mean_weight": float(arrays["weights"].mean()),
                "min_policy_version": version,
                "max_policy_version": version,
                "stop_reason": "eos",
                "latency_s": 0.4,
                "seed": sample_index,
                "expert_lost": False,
                "created_at": at,
            }
        )
        self._interventions(trajectory_id, arrays)

    def _arrays(self, ids: np.ndarray, *, version: int, mixed: bool) -> dict[str, np.ndarray]:
        size = len(ids)
        scale = 0.55 - 0.35 * self._progress(version)
        entropies = self.numpy.exponential(scale, size).astype(np.float32)
        weights = np.minimum(1.0, entropies / self._gamma(version)).astype(np.float32)
        if not mixed:
            weights = np.zeros_like(weights)
        gated = self.numpy.random(size) < weights
        replaced = gated & (self.numpy.random(size) < 0.45)
        looked = np.where(gated, self.numpy.normal(-1.5, 0.5, size), np.nan)
        return {
            "prompt_token_ids": np.arange(12, dtype=np.int32),
            "token_ids": ids,
            "policy_logprobs": (-entropies).astype(np.float32),
            "expert_logprobs": looked.astype(np.float32),
            "mixed_logprobs": looked.astype(np.float32),
            "entropies": entropies,
            "weights": weights,
            "sources": (gated.astype(np.uint8) + replaced.astype(np.uint8)),
            "versions": np.full(size, version, dtype=np.int32),
        }

    def _interventions(self, trajectory_id: str, arrays: dict[str, np.ndarray]) -> None:
        for position in np.flatnonzero(arrays["sources"] == 2).tolist():
            chosen = int(arrays["token_ids"][position])
            others = [token for token in self.proposals if token != chosen]
            proposed = self.random.choice(others)
            self.rows[tables.InterventionRow].append(
                {
                    "trajectory_id": trajectory_id,
                    "position": position,
                    "proposed_token_id": proposed,
                    "proposed_text": self.tokenizer.decode([proposed]),
                    "chosen_token_id": chosen,
                    "chosen_text": self.tokenizer.decode([chosen]),
                    "entropy": float(arrays["entropies"][position]),
                    "weight": float(arrays["weights"][position]),
                    "policy_logprob": -0.7,
                    "expert_logprob": -4.2,
                }
            )

    def _update(self, step: int) -> dict[str, Any]:
        noise = self.random.gauss
        progress = self._progress(step)
        reward = 0.1 + 0.9 * (0.12 + 0.6 * progress)
        return {
            "run_id": RUN_ID,
            "step": step,
            "policy_version": step,
            "num_groups": self.groups_per_update,
            "num_trajectories": self.groups_per_update * (self.num_on_policy + self.num_mixed),
            "num_tokens": int(900 + noise(0, 60)),
            "loss": noise(-0.004, 0.01),
            "grad_norm": abs(noise(0.5 - 0.2 * progress, 0.12)),
            "entropy": max(0.02, noise(0.55 - 0.35 * progress, 0.02)),
            "clip_fraction_low": abs(noise(0.002, 0.001)),
            "clip_fraction_high": abs(noise(0.004, 0.002)),
            "mismatch_kl": abs(noise(1e-5, 5e-6)),
            "learning_rate": 1e-4,
            "mean_reward_on_policy": min(1.0, max(0.0, noise(reward, 0.06))),
            "mean_reward_mixed": min(1.0, max(0.0, noise(reward + 0.1, 0.07))),
            "mean_accuracy_on_policy": reward,
            "mean_accuracy_mixed": reward,
            "frac_reward_zero_std": min(1.0, abs(noise(0.2 + 0.2 * progress, 0.08))),
            "mean_response_tokens": 38.0,
            "truncated_share": 0.0,
            "mean_weight": 0.2,
            "gated_share": 0.2,
            "intervention_rate": 0.09,
            "alpha": self._alpha(step - 1),
            "gamma": self._gamma(step),
            "staleness_mean": abs(noise(0.7, 0.2)),
            "staleness_max": 2,
            "num_stale": 0,
            "step_time_s": abs(noise(6.0, 0.8)),
            "wait_time_s": abs(noise(4.0, 1.5)),
            "created_at": self._time(step),
        }

    def _evaluations(self) -> None:
        for version in range(0, self.num_updates + 1, max(1, self.num_updates // 8)):
            for metric, bonus in (("avg_at_k", 0.0), ("pass_at_k", 0.2)):
                self.rows[tables.Evaluation].append(
                    {
                        "id": f"v-{version:05d}-{metric}",
                        "run_id": RUN_ID,
                        "policy_version": version,
                        "suite": "chain_sum",
                        "metric": metric,
                        "k": 8,
                        "value": 0.12 + 0.6 * self._progress(version) + bonus,
                        "num_problems": 200,
                        "created_at": self._time(version),
                    }
                )

    def _events(self) -> None:
        events = [
            ("run_started", "info", "run default started with embedded:policy"),
            ("expert_unavailable", "warning", "the expert did not answer within 10.0 s"),
            ("weights_swapped", "info", f"version {self.num_updates} is live"),
        ]
        for index, (kind, severity, message) in enumerate(events):
            self.rows[tables.Event].append(
                {
                    "id": f"e-{index:04d}",
                    "run_id": RUN_ID,
                    "kind": kind,
                    "severity": severity,
                    "message": message,
                    "details_json": {},
                    "created_at": self._time(self.num_updates * index / len(events)),
                }
            )


if __name__ == "__main__":
    import sys

    target = Path(sys.argv[1])
    save_tokenizer(target / "policy")
    SeededRun(
        num_updates=int(sys.argv[2]), groups_per_update=4, num_on_policy=8, num_mixed=4
    ).write(empty_store(target / "mentor.db"))
