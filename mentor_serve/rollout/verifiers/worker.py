"""The verifier process: reads batches as JSON lines, answers one JSON line a response.

Started by `VerifierPool` as `python -m mentor_serve.rollout.verifiers.worker SPEC_JSON`. Verifiers
run in the main thread, so `signal.alarm` works. What a verifier prints goes to standard error. The
process ends when its standard input closes, so it does not outlive its parent. It enforces no time
limit: the parent does, by killing it.

Input, one line a batch: `{"limit_s", "tasks": [...], "items": [[task index, text], ...]}`.
Output: `{"ready": true}` or `{"fatal": reason}` once; then for a batch `{"prepared": true}` and for
each item `{"reward", "accuracy", "format_score"}` or `{"error": reason}`.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import queue
import resource
import sys
import threading
from typing import IO, Any

from mentor_serve.errors import ConfigError
from mentor_serve.rollout.verifiers.base import Verifier, VerifierSpec, build_verifier
from mentor_serve.types import Task

MAX_REASON = 2000
"""Longest reason, in characters, that is sent back."""


def main() -> int:
    """Serve batches until standard input closes."""
    options = json.loads(sys.argv[1])
    output = _protect_output()
    if options["memory_limit_bytes"] is not None:
        _limit_memory(options["memory_limit_bytes"])
    try:
        verifier = build_verifier(VerifierSpec(**options["spec"]))
    except ConfigError as error:
        _send(output, {"fatal": str(error)})
        return 2
    _send(output, {"ready": True})
    batches = _read_in_background()
    while True:
        batch = batches.get()
        # A verifier stuck in C code holds the interpreter lock, so the reading thread could not
        # end an orphan: this watchdog runs outside the interpreter. The parent kills far earlier.
        slack_s = 120.0
        faulthandler.dump_traceback_later(
            slack_s + 2 * batch["limit_s"] * len(batch["items"]), exit=True
        )
        _serve(verifier, batch, output)
        faulthandler.cancel_dump_traceback_later()


def _protect_output() -> IO[str]:
    """Return the pipe to the parent, and send everything else that is printed to stderr."""
    pipe = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    return pipe


def _limit_memory(limit_bytes: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = limit_bytes if hard == resource.RLIM_INFINITY else min(limit_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _read_in_background() -> queue.SimpleQueue[Any]:
    batches: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            batches.put(json.loads(line))
        os._exit(0)  # the parent closed the pipe or died

    threading.Thread(target=read, name="read-batches", daemon=True).start()
    return batches


def _serve(verifier: Verifier, batch: dict[str, Any], output: IO[str]) -> None:
    tasks = [Task(**fields) for fields in batch["tasks"]]
    broken: dict[int, str] = {}
    for index, task in enumerate(tasks):
        try:
            verifier.prepare(task)
        except Exception as error:  # boundary: a verifier may raise anything
            broken[index] = _reason(error)
    _send(output, {"prepared": True})
    for task_index, text in batch["items"]:
        if task_index in broken:
            _send(output, {"error": broken[task_index]})
            continue
        try:
            reply = dataclasses.asdict(verifier.score(tasks[task_index], text))
        except Exception as error:  # boundary: a verifier may raise anything
            reply = {"error": _reason(error)}
        _send(output, reply)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:MAX_REASON]


def _send(output: IO[str], message: dict[str, Any]) -> None:
    output.write(json.dumps(message) + "\n")
    output.flush()


if __name__ == "__main__":
    sys.exit(main())
