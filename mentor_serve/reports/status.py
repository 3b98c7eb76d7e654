"""What `mentor-serve status` shows: the run from SQL, and whether the service answers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from mentor_serve.actors.runtime import open_store
from mentor_serve.errors import ConfigError
from mentor_serve.reports.service import probe_service
from mentor_serve.settings import Settings
from mentor_serve.store import TrajectoryStore

SOLVED_METRICS = ("greedy_pass_at_k", "avg_at_k", "pass_at_k")


def run_status(settings: Settings) -> dict[str, Any]:
    """The run's state from SQL, and whether the service answers now.

    Raises:
        ConfigError: there is no database yet, or no run of that name in it.
    """
    with open_store(settings, mode="read") as store:
        run_id = existing_run(settings, store)
        status = asdict(store.training_status(run_id))
        evaluation = store.latest_evaluation(run_id)
    first, last = status["pass_rate_first"], status["pass_rate_last"]
    gain = None if first is None or last is None else last - first
    return {
        **status,
        "pass_rate_gain": gain,
        "evaluation": None if evaluation is None else asdict(evaluation),
        "service": probe_service(settings),
    }


def existing_run(settings: Settings, store: TrajectoryStore) -> str:
    """Id of the run that the settings name; writes nothing.

    Raises:
        ConfigError: there is no database yet, or no run of that name in it.
    """
    if settings.store.url is None and not (settings.home / "mentor.db").exists():
        raise ConfigError(
            f"expected a database in {settings.home.resolve()}, found none; start the service "
            "with `mentor-serve up`, or set MENTOR_SERVE_HOME"
        )
    run_id = store.find_run(settings.run_name)
    if run_id is None:
        raise ConfigError(f"the database holds no run named {settings.run_name!r} yet")
    return run_id


def status_rows(report: dict[str, Any]) -> dict[str, str]:
    """The report of `run_status` as label and text, for people."""
    service = report["service"]
    reachable = service.get("status", "answers") if service["is_running"] else "not running"
    groups = {name: count for name, count in report["groups"].items() if count}
    rows = {
        "run": f"{report['run_name']} ({report['run_id']})",
        "service": f"{reachable}, {service['url']}",
        "training": f"step {report['step']}, version {report['live_version']} live",
        "pass rate": "no trained version yet",
        "reward": "no update yet",
        "guidance": f"alpha {_number(report['alpha'])}, gamma {_number(report['gamma'])} nats",
        "groups": ", ".join(f"{count:,} {name}" for name, count in groups.items()) or "none",
        "pace": f"{report['groups_per_minute']:.0f} groups a minute over the last five",
        "trajectories": f"{report['num_trajectories']:,}",
        "last update": str(report["last_update_at"] or "none"),
    }
    if report["pass_rate_gain"] is not None:
        gain = 100 * report["pass_rate_gain"]
        rows["pass rate"] = (
            f"{report['pass_rate_first']:.1%} in the first five versions, "
            f"{report['pass_rate_last']:.1%} in the last five ({gain:+.1f} points)"
        )
    if report["mean_reward_on_policy"] is not None:
        rows["reward"] = (
            f"{_number(report['mean_reward_on_policy'])} on-policy, "
            f"{_number(report['mean_reward_mixed'])} mixed (last ten updates)"
        )
    if report["evaluation"] is not None:
        rows["evaluation"] = _evaluation_line(report["evaluation"])
    for number, error in enumerate(report["errors"], start=1):
        rows[f"error {number}"] = (
            f"{error['created_at']:%H:%M:%S} {error['kind']}: {error['message']}"
        )
    return rows


def _evaluation_line(evaluation: dict[str, Any]) -> str:
    solved = [m for m in evaluation["measures"] if m["metric"] in SOLVED_METRICS]
    numbers = ", ".join(
        f"{m['metric'].removesuffix('_at_k')}@{m['k']} {m['value']:.1%}"
        for m in solved
        if m["value"] is not None
    )
    return (
        f"version {evaluation['policy_version']} on {evaluation['num_problems']} held-out problems "
        f"of {evaluation['suite']}: {numbers}"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
