"""A small run whose answers to the questions of docs/sql.md can be counted by hand."""

from datetime import UTC, datetime

from sqlalchemy import insert

from mentor_serve.store import models
from mentor_serve.store.connection import open_engine, writing
from mentor_serve.store.rollup import add_to_version_stats

DAY = datetime(2026, 1, 31, tzinfo=UTC)

GROUPS = {
    # id: run, task, policy version, step that consumed it, time
    "g1": ("new", "easy", 0, 1, DAY.replace(hour=12, minute=10)),
    "g2": ("new", "hard", 0, 1, DAY.replace(hour=12, minute=59, second=59, microsecond=999999)),
    "g3": ("new", "hard", 1, 2, DAY.replace(hour=13)),
    "g4": ("new", "open", 1, None, DAY.replace(hour=15)),
    "g5": ("new", "easy", 0, 2, DAY.replace(hour=13, minute=30)),
    "g6": ("new", "rare", 1, None, DAY.replace(hour=15, minute=1)),
    "g0": ("a-older", "old", 0, None, DAY.replace(hour=9)),
}
RESPONSES = [
    # group, kind, accuracy (None: failed), tokens, mean entropy, positions replaced, text
    ("g1", "on_policy", 1, 10, 1.0, (), "so I verify"),
    ("g1", "on_policy", 0, 20, 0.25, (), "so it is"),
    ("g1", "mixed", 1, 20, 0.4, (0, 17), ""),
    ("g1", "mixed", 1, 8, 0.4, (3,), ""),
    ("g1", "mixed", None, 0, None, (), None),
    ("g2", "on_policy", 0, 10, 0.5, (), "VERIFY"),
    ("g2", "on_policy", 0, 10, None, (), None),
    ("g2", "mixed", 1, 40, 0.4, (1, 2, 33), ""),
    ("g2", "mixed", 0, 16, 0.4, (), ""),
    ("g3", "on_policy", 0, 10, 0.2, (), "verifying"),
    ("g3", "on_policy", 0, 10, 0.2, (), "no"),
    ("g3", "mixed", 0, 5, 0.3, (0,), ""),
    ("g4", "on_policy", 1, 10, 0.2, (), "no"),
    *[("g4", "on_policy", 0, 10, 0.2, (), "no")] * 5,
    ("g5", "on_policy", 1, 10, 0.5, (), "no"),
    ("g5", "on_policy", 1, 10, 0.5, (), "no"),
    ("g5", "mixed", 1, 16, 0.4, (), ""),
    ("g5", "mixed", 0, 16, 0.4, (), ""),
    *[("g6", "on_policy", 0, 10, 0.2, (), "no")] * 3,
    ("g0", "on_policy", 1, 7, 3.0, (), "verify verify"),
    ("g0", "mixed", 1, 7, 3.0, (5,), "verify verify"),
]
REPLACED = {
    # group and position: what the policy proposed, what the expert chose
    ("g1", 0): (" Wait", " verify"),
    ("g1", 17): ("wait ", "Verify"),
    ("g1", 3): (" wait", " check"),
    ("g2", 1): (" so", " verify"),
    ("g2", 2): (" so", " verify"),
    ("g2", 33): (None, " thus"),
    ("g3", 0): (" wait", " verify"),
    ("g0", 5): (" old", " older"),
}


def write(url, table, rows):
    """Insert rows; those of trajectories count in the running sums."""
    engine = open_engine(url)
    with writing(engine, url, doing="seeding") as connection:
        connection.execute(insert(table), rows)
        if table is models.Trajectory:
            add_to_version_stats(connection, [row for row in rows if row["group_id"]])
    engine.dispose()


def run(name, at):
    return {"id": name, "name": name, "config_json": {}, "started_at": DAY, "updated_at": at}


def task(name, run):
    text = {"source": "test", "prompt": f"{name}?", "answer": "1", "split": "train"}
    key = {"id": name, "run_id": run, "content_key": name, "created_at": DAY}
    return text | key | {"metadata_json": {}}


def version(number):
    parent = number - 1 if number else None
    weights = {"run_id": "new", "version": number, "step": number, "parent_version": parent}
    return weights | {"created_at": DAY, "is_live": number == 2, "alpha": 0.5, "gamma": 1.5}


def update(step):
    counts = {"num_groups": 2, "num_trajectories": 8, "num_tokens": 90, "num_stale": 0}
    key = {"run_id": "new", "step": step, "policy_version": step, "created_at": DAY}
    return key | counts | {"alpha": 0.5, "gamma": 1.5}


def group(name):
    run, task, version, step, at = GROUPS[name]
    members = [one for one in RESPONSES if one[0] == name]
    kinds = [kind for _, kind, accuracy, *_ in members if accuracy is not None]
    return {
        "id": name,
        "run_id": run,
        "task_id": task,
        "policy_version": version,
        "min_policy_version": version,
        "step": version,
        "gamma": 1.5,
        "alpha": 0.5,
        "status": "ready" if step is None else "consumed",
        "num_on_policy": kinds.count("on_policy"),
        "num_mixed": kinds.count("mixed"),
        "num_tokens": sum(one[3] for one in members),
        "consumed_by_step": step,
        "created_at": at,
    }


def response(index, group, kind, accuracy, num_tokens, entropy, replaced, text):
    run, task, version, _, at = GROUPS[group]
    is_scored = accuracy is not None
    return {
        "id": f"{group}-{kind}-{index:02d}",
        "group_id": group,
        "run_id": run,
        "task_id": task,
        "kind": kind,
        "sample_index": index,
        "status": "ok" if is_scored else "failed",
        "reward": 0.9 * accuracy + 0.1 if is_scored else None,
        "accuracy": float(accuracy) if is_scored else None,
        "text": text,
        "num_prompt_tokens": 3,
        "num_tokens": num_tokens,
        "num_gated": len(replaced),
        "num_interventions": len(replaced),
        "mean_entropy": entropy,
        "mean_weight": 0.1,
        "min_policy_version": version,
        "max_policy_version": version,
        "expert_lost": False,
        "created_at": at,
    }


def interventions(row):
    group, index = row["group_id"], row["sample_index"]
    return [
        {
            "trajectory_id": row["id"],
            "position": position,
            "proposed_token_id": 1,
            "proposed_text": REPLACED[group, position][0],
            "chosen_token_id": 2,
            "chosen_text": REPLACED[group, position][1],
        }
        for position in RESPONSES[index][5]
    ]


def write_everything(url):
    """The rows above; run `new` was active last."""
    write(url, models.Run, [run("a-older", DAY.replace(hour=10)), run("new", DAY.replace(hour=16))])
    tasks = sorted({(owner, name) for owner, name, *_ in GROUPS.values()})
    write(url, models.TaskRow, [task(name, owner) for owner, name in tasks])
    write(url, models.PolicyVersion, [version(number) for number in (0, 1, 2)])
    write(url, models.Update, [update(step) for step in (1, 2)])
    write(url, models.RolloutGroup, [group(name) for name in GROUPS])
    rows = [response(index, *one) for index, one in enumerate(RESPONSES)]
    write(url, models.Trajectory, rows)
    write(url, models.InterventionRow, [one for row in rows for one in interventions(row)])
    attempt = {"id": "attempt", "group_id": None, "kind": "expert", "expert_model": "expert"}
    write(url, models.Trajectory, [rows[0] | attempt])
    warned = {"id": "e1", "kind": "expert_down", "severity": "warning", "message": "no answer"}
    write(url, models.Event, [warned | {"run_id": "new", "details_json": {}, "created_at": DAY}])
