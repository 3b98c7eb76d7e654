"""The log of a trial survives kills, and holds only what JSON can hold."""

from __future__ import annotations

import json
import math
from pathlib import Path

from mentor_serve.experiments.trial_log import TrialLog


def test_entries_come_back_in_order_and_by_kind(tmp_path: Path):
    path = tmp_path / "trials" / "one.jsonl"
    log = TrialLog(path)
    log.add("update", {"step": 1, "loss": 0.5})
    log.add("evaluation", {"step": 1})
    log.add("update", {"step": 2, "loss": math.nan})
    for read in (log, TrialLog(path)):
        assert read.entries("update") == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]
        assert not read.is_complete
    log.add("done", {"num_updates": 2})
    assert TrialLog(path).is_complete


def test_a_line_that_a_kill_cut_off_was_not_written(tmp_path: Path):
    path = tmp_path / "one.jsonl"
    log = TrialLog(path)
    log.add("update", {"step": 1})
    with path.open("a", encoding="utf-8") as file:
        file.write('{"kind": "update", "st')
    again = TrialLog(path)
    assert again.entries("update") == [{"step": 1}]
    again.add("update", {"step": 2})
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
