"""Starts the service as a user would: a process of its own, real ports, a real database."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.ports import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 150.0
SMALL_GROUPS = {
    "MENTOR_SERVE_ROLLOUT__NUM_ON_POLICY": "4",
    "MENTOR_SERVE_ROLLOUT__NUM_MIXED": "2",
    "MENTOR_SERVE_LEARNER__PROMPTS_PER_STEP": "4",
    "MENTOR_SERVE_LEARNER__MINI_BATCH_PROMPTS": "4",
    "MENTOR_SERVE_LEARNER__EVAL_EVERY": "0",
}


class RunningService:
    """One process tree on one state directory."""

    def __init__(self, home: Path, command: list[str], port: int, env: dict[str, str]) -> None:
        self.home = home
        self.port = port
        self.base_url = f"http://127.0.0.1:{port}"
        self.output = home / "output.txt"
        self._descendants: list[psutil.Process] = []
        home.mkdir(parents=True, exist_ok=True)
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=_environment(home, port) | env,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def get(self, path: str, *, timeout_s: float = 20.0) -> Any:
        with urllib.request.urlopen(self.base_url + path, timeout=timeout_s) as response:
            return json.loads(response.read())

    def wait_until_ready(self, *, timeout_s: float = START_TIMEOUT_S) -> None:
        def is_ready() -> bool:
            assert self.process.poll() is None, f"the service ended:\n{self.output.read_text()}"
            try:
                return bool(self.get("/health/readiness", timeout_s=5.0))
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                return False

        self.wait_for(is_ready, "readiness", timeout_s=timeout_s)
        self._descendants = psutil.Process(self.process.pid).children(recursive=True)

    def wait_for(
        self, condition: Callable[[], bool], what: str, *, timeout_s: float = 90.0
    ) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, (
                f"no {what} within {timeout_s:g} s; output:\n{self.output.read_text()[-3000:]}"
            )
            time.sleep(0.3)

    def step(self) -> int:
        return int(self.get("/v1/training")["step"])

    def wait_for_step(self, step: int, *, timeout_s: float = 90.0) -> None:
        self.wait_for(lambda: self.step() >= step, f"update {step}", timeout_s=timeout_s)

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """What a user sees with plain SQL, beside the running service."""
        connection = sqlite3.connect(f"file:{self.home / 'mentor.db'}?mode=ro", uri=True)
        try:
            return connection.execute(sql).fetchall()
        finally:
            connection.close()

    def interrupt(self, number: int = signal.SIGINT, *, timeout_s: float = 90.0) -> int:
        """Stop it as Ctrl-C or a service manager would; returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=timeout_s)

    def kill_tree(self) -> None:
        """kill -9 of every process at once: a power cut."""
        victims = self._living()
        for victim in victims:
            try:
                victim.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(victims, timeout=20)
        self.process.wait(timeout=20)

    def kill_process(self, name: str) -> int:
        """kill -9 of the processes with `name` in their command line; returns how many."""
        victims = self._named(name)
        for victim in victims:
            victim.kill()
        return len(victims)

    def has_loaded(self, library: str, name: str) -> bool:
        """Whether the one process with `name` in its command line has mapped a file like that."""
        (process,) = self._named(name)
        return any(library in file.path for file in process.memory_maps())

    def _named(self, name: str) -> list[psutil.Process]:
        tree = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in tree if name in " ".join(process.cmdline())]

    def _living(self) -> list[psutil.Process]:
        known = {process.pid: process for process in self._descendants if process.is_running()}
        if self.process.poll() is None:
            root = psutil.Process(self.process.pid)
            known |= {process.pid: process for process in [root, *root.children(recursive=True)]}
        return list(known.values())

    def close(self) -> None:
        if self._living():
            self.kill_tree()


def _environment(home: Path, port: int) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MENTOR_SERVE_")}
    return {
        **inherited,
        # The directory of this interpreter holds the `serve` and `mentor-serve` commands.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's default of 15 leaves a service next to no time beside other tests on two cores.
        "RAY_worker_niceness": "0",
        "MENTOR_SERVE_HOME": str(home),
        "MENTOR_SERVE_GATEWAY__PORT": str(port),
        "MENTOR_SERVE_TELEMETRY__DASHBOARD_PORT": str(free_port()),
        **SMALL_GROUPS,
    }


@pytest.fixture(scope="module")
def start_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """`start_service(home=None, command=None, env=None)`, ready when it returns."""
    services: list[RunningService] = []

    def start(
        home: Path | None = None,
        command: list[str] | None = None,
        env: dict[str, str] | None = None,
        port: int | None = None,
        timeout_s: float = START_TIMEOUT_S,
    ) -> RunningService:
        service = RunningService(
            home or tmp_path_factory.mktemp("service"),
            command or [sys.executable, "-m", "mentor_serve.cli", "up", "--no-dashboard"],
            port or free_port(),
            env or {},
        )
        services.append(service)
        service.wait_until_ready(timeout_s=timeout_s)
        return service

    yield start
    for service in services:
        service.close()
