"""`mentor-serve up`: the service in the foreground, its dashboard, and a live status line."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import structlog
from rich.console import Console
from rich.live import Live
from rich.text import Text

from mentor_serve.actors.app import build_application
from mentor_serve.actors.lifecycle import (
    check_port_is_free,
    drain_service,
    start_service,
    stop_service,
)
from mentor_serve.actors.runtime import open_run, open_store, owned_state
from mentor_serve.errors import ConfigError, StoreError
from mentor_serve.settings import ENV_PREFIX, Settings
from mentor_serve.store import TrainingStatus, TrajectoryStore

log = structlog.get_logger(__name__)

LIVE_INTERVAL_S = 2.0
LOG_INTERVAL_S = 30.0


def run_in_foreground(settings: Settings, *, with_dashboard: bool) -> None:
    """Start everything, show how it goes, and stop cleanly on SIGINT or SIGTERM.

    Raises:
        ConfigError: a port is taken, a model is missing, or another service owns the directory.
        SchemaOutOfDate, StoreError: the database cannot be used.
    """
    console = Console(stderr=True)
    # The console belongs to our own lines; every part of the service logs to files and stderr.
    for library in ("ray", "ray.serve", "alembic"):
        logging.getLogger(library).setLevel(logging.ERROR)
    with _handled_signals() as signals, owned_state(settings):
        if not os.environ.get("RAY_ADDRESS"):
            check_port_is_free(settings.gateway.host, settings.gateway.port, setting="gateway.port")
        if with_dashboard:
            check_port_is_free(
                "127.0.0.1", settings.telemetry.dashboard_port, setting="telemetry.dashboard_port"
            )
        started = time.monotonic()
        application = build_application(settings)
        console.print("Starting: policy, expert, collector, learner ...", style="dim")
        dashboard = _start_dashboard(settings) if with_dashboard else None
        try:
            start_service(settings, application)
            signals.install()
            _announce(console, settings, with_dashboard, time.monotonic() - started)
            _watch(console, settings, signals.received)
            console.print("Stopping: requests in flight finish, the queue stays stored ...")
            drain_service(settings)
        finally:
            if dashboard is not None:
                dashboard.terminate()
                dashboard.wait(timeout=10)
            stop_service()
    console.print("Stopped. Start again to go on from the same step.", style="dim")


class _StopSignals:
    """The first SIGINT or SIGTERM sets `received`; a second one interrupts at once."""

    def __init__(self) -> None:
        self.received = threading.Event()

    def install(self) -> None:
        """Also after `ray.init`, which puts a SIGTERM handler of its own in the place of ours."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        del signum, frame
        if self.received.is_set():
            raise KeyboardInterrupt
        self.received.set()


@contextmanager
def _handled_signals() -> Iterator[_StopSignals]:
    """Our handlers while the block runs, the former ones after it."""
    previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    signals = _StopSignals()
    signals.install()
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def dashboard_script() -> Path:
    """The Streamlit entry point, in a checkout or in an installed package."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package.parent / "dashboards" / "app.py", package / "_dashboards" / "app.py"):
        if candidate.is_file():
            return candidate
    raise ConfigError("the dashboard's files are missing; reinstall mentor-serve[dashboard]")


def _start_dashboard(settings: Settings) -> subprocess.Popen[bytes]:
    log_path = settings.logs_dir / "dashboard.log"
    port = settings.telemetry.dashboard_port
    with log_path.open("ab") as output:
        return subprocess.Popen(  # noqa: S603  # fixed arguments
            [
                *(sys.executable, "-m", "streamlit", "run", str(dashboard_script())),
                *("--server.port", str(port), "--server.address", "127.0.0.1"),
                *("--server.headless", "true", "--browser.gatherUsageStats", "false"),
                # The watcher would import every module of transformers to look for changes.
                *("--server.fileWatcherType", "none"),
            ],
            env={**os.environ, **_environment_of(settings)},
            stdout=output,
            stderr=output,
            # A terminal's Ctrl-C goes to the whole group; only we are to react to it.
            start_new_session=True,
        )


def _environment_of(settings: Settings) -> dict[str, str]:
    """What the dashboard must know of the settings that did not come from the environment."""
    return {
        f"{ENV_PREFIX}HOME": str(settings.home.resolve()),
        f"{ENV_PREFIX}RUN_NAME": settings.run_name,
        f"{ENV_PREFIX}STORE__URL": settings.database_url,
        f"{ENV_PREFIX}POLICY__MODEL": settings.policy.model,
    }


def _announce(
    console: Console, settings: Settings, with_dashboard: bool, start_time_s: float
) -> None:
    base = f"http://{settings.gateway.host}:{settings.gateway.port}"
    console.print(f"Serving after {start_time_s:.0f} s.", style="bold")
    console.print(f"  API        {base}/v1   (docs: {base}/docs)")
    if with_dashboard:
        console.print(f"  Dashboard  http://127.0.0.1:{settings.telemetry.dashboard_port}")
    console.print(f"  State      {settings.home.resolve()}")
    console.print("  Ctrl-C stops it; nothing is lost.", style="dim")


def _watch(console: Console, settings: Settings, stop: threading.Event) -> None:
    with open_store(settings) as store:
        run_id = open_run(settings, store)
        if console.is_terminal:
            with Live(console=console, auto_refresh=False) as live:
                while not stop.wait(LIVE_INTERVAL_S):
                    live.update(Text(_status_line(store, run_id)), refresh=True)
        else:
            while not stop.wait(LOG_INTERVAL_S):
                console.print(_status_line(store, run_id), soft_wrap=True)


def _status_line(store: TrajectoryStore, run_id: str) -> str:
    try:
        return format_status(store.training_status(run_id))
    except StoreError as error:
        return f"the store does not answer: {error}"


def format_status(status: TrainingStatus) -> str:
    """One line for people."""
    parts = [f"step {status.step}", f"version {_or_dash(status.live_version)} live"]
    if status.pass_rate_first is not None and status.pass_rate_last is not None:
        gain = 100 * (status.pass_rate_last - status.pass_rate_first)
        parts.append(f"pass rate {status.pass_rate_last:.0%} ({gain:+.0f} points)")
    if status.mean_reward_on_policy is not None:
        mixed = status.mean_reward_mixed
        beside = "" if mixed is None else f", mixed {mixed:.2f}"
        parts.append(f"reward {status.mean_reward_on_policy:.2f}{beside}")
    parts.append(f"{status.groups_per_minute:.0f} groups/min")
    parts.append(f"{status.groups.get('ready', 0)} ready")
    if status.alpha is not None and status.gamma is not None:
        parts.append(f"alpha {status.alpha:.2f}, gamma {status.gamma:.2f}")
    return " | ".join(parts)


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)
