"""How long `mentor-serve up` takes until it answers and until it has learned once.

    python -m benchmarks.service_start --json
    python -m benchmarks.service_start --checkout ../older --json

Each round starts one after the other: Ray with an application that only says hello, this checkout,
and `--checkout`, another one, for instance of an older commit (`git worktree add`). Times of
different rounds are not compared: ratios are taken within a round, and their median is given.
Each service has a state directory of its own, one rollout group under way, and updates of four.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import positive_int, processor, report_progress

EMPTY = "empty"
SERVICE = "service"
OTHER = "checkout"
TIMEOUT_S = 300.0
_PORTS = range(20_000, 32_000)
"""Below those that Linux gives to whoever names none, above those of Ray's workers: what is free
now still is when the service listens."""
_HERE = Path(__file__).resolve().parents[1]
_EMPTY_APPLICATION = """
import sys, time
import ray
from ray import serve

@serve.deployment
class Hello:
    def __call__(self, request):
        return "hello"

ray.init(include_dashboard=False, _node_ip_address="127.0.0.1")
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
serve.run(Hello.bind())
time.sleep(3600)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start: up to the first answer, and for a service up to its first update."""

    ready_s: float
    cpu_s: float
    """Processor time, user and system, of all processes that were alive at that answer."""
    update_s: float | None = None
    """When `/v1/training` told of an update, counted from the same moment."""
    update_cpu_s: float | None = None
    update_memory_mib: float | None = None
    """What the processes had to themselves then: memory shared between them is not counted."""


def main() -> None:
    """Run the benchmark; the result goes to standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--rounds", type=positive_int, default=3)
    parser.add_argument("--checkout", type=Path, help="another checkout to start in each round")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    arguments = parser.parse_args()
    starts = measure(arguments.rounds, arguments.checkout)
    result: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "rounds": {name: [asdict(start) for start in of] for name, of in starts.items()},
        "times_empty": {name: ratio(of, starts[EMPTY]) for name, of in starts.items()},
    }
    if OTHER in starts:
        result["times_checkout"] = {SERVICE: ratio(starts[SERVICE], starts[OTHER])}
    print(json.dumps(result, indent=2) if arguments.json else table(result))


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def measure(rounds: int, checkout: Path | None) -> dict[str, list[Start]]:
    """Starts by what was started, one a round.

    Raises:
        RuntimeError: something ended before it answered, or did not answer in time.
    """
    places = {EMPTY: _HERE, SERVICE: _HERE}
    if checkout is not None:
        places[OTHER] = checkout.resolve()
    starts: dict[str, list[Start]] = {name: [] for name in places}
    for number in range(rounds):
        for name, place in places.items():
            starts[name].append(start_once(name, place))
            seconds = starts[name][-1].ready_s
            report_progress(f"round {number + 1} of {rounds}: {name} after {seconds:.1f} s")
    return starts


def start_once(name: str, place: Path) -> Start:
    """Start it, wait for its first answer (and a service's first update), and stop it."""
    port = _free_port()
    with tempfile.TemporaryDirectory() as home:
        path, command = "/health/readiness", ["-m", "mentor_serve.cli", "up", "--no-dashboard"]
        if name == EMPTY:
            path, command = "/", ["-c", _EMPTY_APPLICATION, str(port)]
        output = Path(home) / "output.txt"
        began = time.monotonic()
        with output.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=place,
                env=_environment(home, port) | {"PYTHONPATH": str(place)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        with _stopped_at_the_end(process):

            def wait(condition: Callable[[], bool]) -> float:
                while not condition():
                    if process.poll() is not None or time.monotonic() > began + TIMEOUT_S:
                        said = output.read_text(errors="replace")[-2000:]
                        raise RuntimeError(f"expected an answer of {name}; it said:\n{said}")
                    time.sleep(0.05)
                return round(time.monotonic() - began, 2)

            url = f"http://127.0.0.1:{port}"
            start = Start(
                ready_s=wait(lambda: _get(url + path) is not None), cpu_s=_cpu_s(process.pid)
            )
            if name == EMPTY:
                return start
            return replace(
                start,
                update_s=wait(lambda: _step(url) > 0),
                update_cpu_s=_cpu_s(process.pid),
                update_memory_mib=_memory_mib(process.pid),
            )


def ratio(starts: list[Start], others: list[Start]) -> dict[str, float]:
    """Median over rounds of how many times as much the first took, of all that both have."""
    pairs = [(asdict(a), asdict(b)) for a, b in zip(starts, others, strict=True)]
    return {
        name: round(statistics.median(a[name] / b[name] for a, b in pairs), 3)
        for name in pairs[0][0]
        if all(a[name] is not None and b[name] is not None for a, b in pairs)
    }


def table(result: dict[str, Any]) -> str:
    """What people read: medians, and ratios to the empty application."""
    names = [field.name for field in fields(Start)]
    lines = [f"{'':10} " + " ".join(f"{name:>17}" for name in names) + f" {'ready x empty':>14}"]
    for label, starts in result["rounds"].items():
        columns = [[start[name] for start in starts] for name in names]
        cells = [
            "-" if None in column else f"{statistics.median(column):.1f}" for column in columns
        ]
        lines.append(
            f"{label:10} "
            + " ".join(f"{cell:>17}" for cell in cells)
            + f" {result['times_empty'][label]['ready_s']:14.2f}"
        )
    return "\n".join(lines)


def _environment(home: str, port: int) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MENTOR_")}
    return {
        **kept,
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "MENTOR_SERVE_HOME": home,
        "MENTOR_SERVE_GATEWAY__PORT": str(port),
        "MENTOR_SERVE_ROLLOUT__CONCURRENT_GROUPS": "1",
        "MENTOR_SERVE_LEARNER__PROMPTS_PER_STEP": "4",
        "MENTOR_SERVE_LEARNER__MINI_BATCH_PROMPTS": "4",
    }


@contextmanager
def _stopped_at_the_end(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        tree = _tree(process.pid)
        # Not SIGINT: what a shell starts in the background ignores it.
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for one in tree:
            with suppress(psutil.NoSuchProcess):
                one.kill()


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _cpu_s(pid: int) -> float:
    total = 0.0
    for process in _tree(pid):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            # Those of children are of the ones that ended and were waited for.
            total += times.user + times.system + times.children_user + times.children_system
    return round(total, 2)


def _memory_mib(pid: int) -> float:
    total = 0
    for process in _tree(pid):
        with suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().uss
    return round(total / 2**20, 1)


def _step(url: str) -> int:
    training = _get(f"{url}/v1/training")
    return 0 if training is None else int(json.loads(training)["step"])


def _get(url: str) -> bytes | None:
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            content: bytes = answer.read()
            return content if answer.status == 200 else None
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError):
        return None


def _free_port() -> int:
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"no free port in {_PORTS}")


if __name__ == "__main__":
    main()
