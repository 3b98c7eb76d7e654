"""The benchmark of starting waits for the first answer, stops what it started, and says why not."""

import time
from pathlib import Path

import psutil
import pytest

from benchmarks import service_start
from benchmarks.service_start import EMPTY, Start, ratio, start_once

SLOW_SERVER = """
import subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

open(MARK, "w").write(str(subprocess.Popen(["sleep", "600"]).pid))
until = time.process_time() + 0.3
while time.process_time() < until:
    pass
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_a_start_ends_with_the_first_answer_and_leaves_no_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mark = tmp_path / "pid"
    monkeypatch.setattr(
        service_start, "_EMPTY_APPLICATION", SLOW_SERVER.replace("MARK", repr(str(mark)))
    )
    start = start_once(EMPTY, tmp_path)
    assert start.cpu_s >= 0.3
    assert start.ready_s >= 0.3
    deadline = time.monotonic() + 10.0
    while is_running(int(mark.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_ends_before_it_answers_is_an_error_with_its_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(service_start, "_EMPTY_APPLICATION", "raise SystemExit('no room')")
    with pytest.raises(RuntimeError, match="no room"):
        start_once(EMPTY, tmp_path)


def test_ratios_are_medians_within_rounds() -> None:
    fast = [Start(ready_s=seconds, cpu_s=1.0) for seconds in (1.0, 2.0, 9.0)]
    slow = [Start(ready_s=seconds, cpu_s=4.0, update_s=1.0) for seconds in (2.0, 8.0, 10.0)]
    assert ratio(slow, fast) == {"ready_s": 2.0, "cpu_s": 4.0}
    assert ratio(slow, slow) == {"ready_s": 1.0, "cpu_s": 1.0, "update_s": 1.0}
