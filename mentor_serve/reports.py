"""What `mentor-serve status` and `mentor-serve eval` compute; the command line only prints it."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mentor_serve.actors.runtime import open_run, open_store, prepare_state
from mentor_serve.actors.workload import task_source, verifier_pool
from mentor_serve.engines import TorchEngine
from mentor_serve.engines.driver import EngineDriver
from mentor_serve.errors import ConfigError
from mentor_serve.evaluation.suite import EvaluationReport, evaluate
from mentor_serve.models.loading import load_model, load_tokenizer
from mentor_serve.rollout.prompts import PromptRenderer
from mentor_serve.settings import Settings
from mentor_serve.store import TrajectoryStore
from mentor_serve.types import Rollout, RolloutRequest
from mentor_serve.weights import snapshot_path

PROBE_TIMEOUT_S = 3.0


def run_status(settings: Settings) -> dict[str, Any]:
    """The run's state from SQL, and whether the service answers now.

    Raises:
        ConfigError: there is no database yet, or no run of that name in it.
    """
    if settings.database_url.startswith("sqlite") and not (
        settings.store.url is not None or (settings.home / "mentor.db").exists()
    ):
        raise ConfigError(
            f"expected a database in {settings.home.resolve()}, found none; start the service "
            "with `mentor-serve up`, or set MENTOR_SERVE_HOME"
        )
    with open_store(settings, mode="read") as store:
        run_id = store.find_run(settings.run_name)
        if run_id is None:
            raise ConfigError(f"the database holds no run named {settings.run_name!r} yet")
        status = asdict(store.training_status(run_id))
    first, last = status["pass_rate_first"], status["pass_rate_last"]
    gain = None if first is None or last is None else last - first
    return {**status, "pass_rate_gain": gain, "service": probe_service(settings)}


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
    for number, error in enumerate(report["errors"], start=1):
        rows[f"error {number}"] = (
            f"{error['created_at']:%H:%M:%S} {error['kind']}: {error['message']}"
        )
    return rows


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def probe_service(settings: Settings) -> dict[str, Any]:
    """What `/health/readiness` says, or that nothing answers."""
    gateway = settings.gateway
    host = "127.0.0.1" if gateway.host == "0.0.0.0" else gateway.host  # noqa: S104
    url = f"http://{host}:{gateway.port}/health/readiness"
    try:
        with urllib.request.urlopen(url, timeout=PROBE_TIMEOUT_S) as response:
            body: dict[str, Any] = json.loads(response.read())
    except urllib.error.HTTPError as error:
        body = json.loads(error.read() or b"{}")
    except (OSError, ValueError) as error:
        return {"is_running": False, "url": url, "reason": str(error)}
    return {"is_running": True, "url": url, **body}


def run_evaluation(
    settings: Settings,
    model: str,
    *,
    num_problems: int,
    num_samples: int,
    temperature: float,
    seed: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate on held-out tasks in this process and store the measures.

    `on_progress` is called with problems done and problems.
    `model` is `live`, `policy@VERSION`, `expert`, or anything `policy.model` may be.
    """
    prepare_state(settings)
    with open_store(settings) as store:
        run_id = open_run(settings, store)
        version, path = _resolve(settings, store, run_id, model)
        report = asyncio.run(
            _evaluate(
                settings,
                path,
                num_problems=num_problems,
                num_samples=num_samples,
                temperature=temperature,
                seed=seed,
                on_progress=on_progress,
            )
        )
        suite = f"{settings.tasks.source}:{settings.tasks.name}"
        measures = report.measures()
        if version is not None:
            for metric, k, value in measures:
                store.add_evaluation(
                    run_id,
                    policy_version=version,
                    suite=suite,
                    metric=metric,
                    k=k,
                    value=value,
                    num_problems=report.num_problems,
                )
    return {"model": model, "policy_version": version, "suite": suite, **report.as_dict()}


def evaluation_rows(report: dict[str, Any]) -> dict[str, str]:
    """The report of `run_evaluation` as label and text, for people."""
    version = report["policy_version"]
    words = {word: share for word, share in report["word_shares"].items() if share > 0}
    rows = {
        "model": report["model"] + ("" if version is None else f" (version {version})"),
        "suite": f"{report['suite']}, {report['num_problems']} held-out problems",
        "sampling": f"{report['num_samples']} a problem, temperature {report['temperature']:g}",
        f"avg@{report['num_samples']}": (
            f"{report['accuracy']:.1%} (95 % interval {report['accuracy_low']:.1%} to "
            f"{report['accuracy_high']:.1%})"
        ),
        "reward": f"{report['mean_reward']:.3f}",
        "well-formed": f"{report['mean_format']:.1%}",
        "entropy": f"{report['mean_entropy']:.3f} nats a token",
        "length": f"{report['mean_tokens']:.1f} tokens, {report['truncated_share']:.1%} cut off",
        "words": ", ".join(f"{word} {share:.0%}" for word, share in words.items()) or "none",
    }
    rows |= {f"pass@{k}": f"{value:.1%}" for k, value in report["pass_at"].items()}
    if report["num_unjudged"]:
        rows["unjudged"] = (
            f"{report['num_unjudged']} responses whose verifier failed count as wrong"
        )
    return rows


def _resolve(
    settings: Settings, store: TrajectoryStore, run_id: str, model: str
) -> tuple[int | None, str]:
    if model == "live":
        live = store.live_version(run_id)
        if live is None:
            return None, settings.policy.model
        return live.version, str(snapshot_path(settings.weights_dir, live.version))
    if model == "expert":
        return None, settings.expert.model
    if model.startswith("policy@"):
        number = model.removeprefix("policy@")
        path = snapshot_path(settings.weights_dir, int(number)) if number.isdecimal() else None
        if path is None or not path.is_dir():
            raise ConfigError(f"{model}: expected a kept version (see GET /v1/weights)")
        return int(number), str(path)
    return None, model


async def _evaluate(
    settings: Settings,
    path: str | Path,
    *,
    num_problems: int,
    num_samples: int,
    temperature: float,
    seed: int,
    on_progress: Callable[[int, int], None] | None,
) -> EvaluationReport:
    tokenizer = load_tokenizer(path)
    policy = settings.policy
    driver = EngineDriver(
        TorchEngine(
            policy=load_model(path, dtype=policy.dtype, device=policy.device),
            tokenizer=tokenizer,
            device=policy.device,
            dtype=policy.dtype,
            max_batch_size=policy.max_batch_size,
            max_model_len=policy.max_model_len,
        )
    )
    pool = verifier_pool(settings)

    async def generate(requests: list[RolloutRequest]) -> list[list[Rollout]]:
        return list(await asyncio.gather(*(driver.generate(request) for request in requests)))

    try:
        return await evaluate(
            generate,
            PromptRenderer(tokenizer, settings.tasks.system_prompt),
            pool,
            task_source(settings).holdout(num_problems),
            num_samples=num_samples,
            temperature=temperature,
            max_new_tokens=settings.rollout.max_new_tokens,
            seed=seed,
            on_progress=on_progress,
        )
    finally:
        await pool.close()
        driver.close(drain_timeout_s=0.0)
