"""A few rows in every table of every revision of the schema, and what upgrades make of them.

Plain values and plain SQL: what is written here must not change when the package does.
"""

import struct

REVISIONS = ("0001", "0002", "0003", "0004", "0005")
"""Oldest first; a new migration adds itself, its columns in ADDED and its defaults in DEFAULTS."""

AT = "2026-01-31T12:00:00.000001Z"
TABLES = {
    "runs": ("id",),
    "policy_versions": ("run_id", "version"),
    "tasks": ("id",),
    "rollout_groups": ("id",),
    "updates": ("run_id", "step"),
    "trajectories": ("id",),
    "trajectory_tokens": ("trajectory_id",),
    "interventions": ("trajectory_id", "position"),
    "evaluations": ("id",),
    "events": ("id",),
    "version_stats": ("run_id", "kind", "policy_version"),
}
"""Primary keys; parents before their children."""


def array(code, kind, values):
    """An array as revision 0001 stored it: header of format 1, every value."""
    return struct.pack("<BBBxI", 1, kind, 0, len(values)) + struct.pack(
        f"<{len(values)}{code}", *values
    )


def _version(number):
    return {
        "run_id": "run",
        "version": number,
        "step": number,
        "sha256": "0" * 64,
        "path": f"weights/{number}",
        "created_at": AT,
        "is_live": number == 1,
        "parent_version": number - 1 if number else None,
        "alpha": 0.5,
        "gamma": 1.25,
    }


def _group(name, **values):
    row = {
        "id": name,
        "run_id": "run",
        "task_id": "task",
        "policy_version": 0,
        "min_policy_version": 0,
        "step": 0,
        "gamma": 1.25,
        "alpha": 0.5,
        "status": "ready",
        "num_on_policy": 1,
        "num_mixed": 1,
        "lease_owner": None,
        "lease_expires_at": None,
        "consumed_by_step": None,
        "error": None,
        "created_at": AT,
    }
    return row | values


def _response(name, **values):
    row = {
        "id": name,
        "group_id": None,
        "run_id": "run",
        "task_id": "task",
        "kind": "on_policy",
        "sample_index": 0,
        "status": "ok",
        "error": None,
        "reward": 0.1,
        "accuracy": 0.0,
        "format_score": 1.0,
        "text": "<think>1 + 1</think> 3 \N{SNOWMAN}",
        "num_prompt_tokens": 3,
        "num_tokens": 3,
        "num_gated": 0,
        "num_interventions": 0,
        "mean_entropy": None,
        "mean_weight": 0.0,
        "min_policy_version": 0,
        "max_policy_version": 0,
        "stop_reason": "eos",
        "latency_s": 0.5,
        "seed": 2**40,
        "expert_lost": False,
        "created_at": AT,
    }
    return row | values


def _intervention(position):
    return {
        "trajectory_id": "t-2",
        "position": position,
        "proposed_token_id": 7,
        "proposed_text": " wait",
        "chosen_token_id": 9,
        "chosen_text": None,
        "entropy": 2.5,
        "weight": 0.75,
        "policy_logprob": -1.5,
        "expert_logprob": -0.25,
    }


def _evaluation(name, version):
    measured = {"suite": "sums", "metric": "avg_at_k", "k": 8, "value": 0.25, "num_problems": 4}
    return {"id": name, "run_id": "run", "policy_version": version, "created_at": AT} | measured


_UPDATE = {
    "run_id": "run",
    "step": 1,
    "policy_version": 1,
    "num_groups": 1,
    "num_trajectories": 2,
    "num_tokens": 30,
    "loss": 0.125,
    "mean_reward_mixed": None,
    "alpha": 0.5,
    "gamma": 1.25,
    "staleness_max": 0,
    "num_stale": 2,
    "created_at": AT,
}
_TOKENS = {
    "trajectory_id": "t-3",
    "prompt_token_ids": array("i", 1, [1, 2, 3]),
    "token_ids": array("i", 1, [4, 5, 6]),
    "policy_logprobs": array("f", 2, [-0.5, -0.25, -1.0]),
    "expert_logprobs": array("f", 2, [0.0, 0.0, 0.0]),
    "mixed_logprobs": array("f", 2, [0.0, 0.0, 0.0]),
    "entropies": array("f", 2, [0.5, 1.5, 2.5]),
    "weights": array("f", 2, [0.0, 0.0, 0.0]),
    "sources": array("B", 3, [0, 0, 0]),
    "versions": array("i", 1, [1, 1, 1]),
}
_OF_EXPERT = {
    "weights": array("f", 2, [1.0, 1.0, 1.0]),
    "sources": array("B", 3, [2, 2, 2]),
    "versions": array("i", 1, [0, 0, 0]),
}
_MIXED = {"kind": "mixed", "num_tokens": 20, "num_gated": 4, "num_interventions": 2}
_FAILED = {"status": "failed", "error": "no answer", "reward": None, "accuracy": None}

BASE = {
    "runs": [
        {"id": "run", "name": "test", "config_json": "{}", "started_at": AT, "updated_at": AT}
    ],
    "policy_versions": [_version(0), _version(1)],
    "tasks": [
        {
            "id": "task",
            "run_id": "run",
            "source": "test:sums",
            "prompt": "1 + 1 = ?",
            "answer": "2",
            "split": "train",
            "metadata_json": '{"n": 1}',
            "content_key": "k" * 64,
            "created_at": AT,
        }
    ],
    "rollout_groups": [
        _group("g-1", status="consumed", consumed_by_step=1),
        _group("g-2", policy_version=1, min_policy_version=1, num_mixed=0),
        _group("g-3", status="failed", error="no rollout", num_on_policy=0, num_mixed=0),
    ],
    "updates": [_UPDATE],
    "trajectories": [
        _response("t-1", group_id="g-1", num_tokens=10, mean_entropy=0.5)
        | {"accuracy": 1.0, "reward": 1.0},
        _response("t-2", group_id="g-1", mean_entropy=0.25) | _MIXED | {"mean_weight": 0.5},
        _response("t-3", group_id="g-2", min_policy_version=1, max_policy_version=1),
        _response("t-4", group_id="g-2", num_tokens=0) | _FAILED | {"kind": "mixed"},
        _response("t-5", kind="served", task_id=None, accuracy=None, reward=None, num_tokens=5),
        _response("t-6", kind="expert", accuracy=1.0),
    ],
    "trajectory_tokens": [
        _TOKENS,
        _TOKENS | {"trajectory_id": "t-6"} | _OF_EXPERT,
    ],
    "interventions": [_intervention(1), _intervention(3)],
    "evaluations": [_evaluation("e-1", 0), _evaluation("e-2", 1)],
    "events": [
        {
            "id": "v-1",
            "run_id": "run",
            "kind": "expert_down",
            "severity": "warning",
            "message": "no answer",
            "details_json": "{}",
            "created_at": AT,
        }
    ],
}
"""Rows of revision 0001."""

_HINTED = {"method": "questa", "num_expert": 0, "num_hint_tokens": 7, "hint_fraction": 0.5}
_BY_EXPERT = {"demonstration_id": "t-6", "expert_model": "expert"}
_INTERVAL = {
    "evaluation_id": "e",
    "model": "policy",
    "value_low": 0.125,
    "value_high": 0.5,
    "num_samples": 32,
    "temperature": 1.0,
    "seed": 7,
}
DEFAULTS = {
    "0002": {
        "updates": dict.fromkeys(
            (
                "effective_sample_share",
                "truncated_weight_share",
                "num_trained_tokens",
                "num_skipped_steps",
                "token_staleness_mean",
                "num_silent_groups",
                "num_left_out",
            )
        )
    },
    "0003": {
        "rollout_groups": _HINTED
        | {"method": "mentor", "num_hint_tokens": None, "hint_fraction": None},
        "trajectories": dict.fromkeys(_BY_EXPERT),
    },
    "0004": {"evaluations": dict.fromkeys(_INTERVAL) | {"model": "policy"}},
    "0005": {"runs": {"num_pruned_groups": 0}, "rollout_groups": {"num_tokens": 0}},
}
"""Revision and table to the columns that it adds, with their values in rows from before."""

ADDED = {
    "0002": {("updates", 0): {"effective_sample_share": 0.5, "num_left_out": 2}},
    "0003": {
        ("rollout_groups", 1): _HINTED,
        ("trajectories", 2): _BY_EXPERT,
    },
    "0004": {("evaluations", 1): _INTERVAL},
    "0005": {("runs", 0): {"num_pruned_groups": 3}},
}
"""Revision, table and number of a row to values that older revisions cannot hold."""

COMPUTED = {
    "0005": {("rollout_groups", 0): {"num_tokens": 30}, ("rollout_groups", 1): {"num_tokens": 3}}
}
"""What a revision computes for rows from before, as its writers do for new ones."""


def _sums(kind, version, *values):
    names = (
        "num_trajectories num_scored num_passed accuracy_sum reward_sum num_scored_tokens"
        " num_tokens num_gated num_interventions weight_sum entropy_sum num_entropy_tokens"
    )
    key = {"run_id": "run", "kind": kind, "policy_version": version}
    return key | dict(zip(names.split(), values, strict=True))


VERSION_STATS = [
    _sums("mixed", 0, 1, 1, 0, 0.0, 0.1, 20, 20, 4, 2, 10.0, 5.0, 20),
    _sums("on_policy", 0, 1, 1, 1, 1.0, 1.0, 10, 10, 0, 0, 0.0, 5.0, 10),
    _sums("on_policy", 1, 1, 1, 0, 0.0, 0.1, 3, 3, 0, 0, 0.0, 0.0, 0),
]
"""Sums over the rows above by hand: t-1, t-2 and t-3; failed, served and groupless ones are out."""


def rows_at(revision, *, written_at=None):
    """Table to rows at a revision, as they were written at `written_at` (None: at `revision`)."""
    written_at = written_at or revision
    rows = {table: [dict(row) for row in listed] for table, listed in BASE.items()}
    for one in REVISIONS[1 : REVISIONS.index(revision) + 1]:
        for table, defaults in DEFAULTS[one].items():
            rows[table] = [row | defaults for row in rows[table]]
        known = ADDED[one] if one <= written_at else {}
        for values_of in (COMPUTED.get(one, {}), known):
            for (table, number), values in values_of.items():
                rows[table][number] |= values
    if written_at >= "0004":
        rows["evaluations"].append(_evaluation("e-3", None) | _INTERVAL | {"model": "expert"})
    if revision >= "0005":
        rows["version_stats"] = VERSION_STATS
    return rows
