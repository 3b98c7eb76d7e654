"""Rounds, fits, charts, clocks: what the benchmarks measure with."""

from __future__ import annotations

import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks.chart import line_chart
from benchmarks.long_responses import BIN_TOKENS, linear_fit, reach_times, summarise
from benchmarks.memory import peak_growth
from benchmarks.overhead import Clock, model_clock, step_overhead
from benchmarks.ragged import RaggedRequest, answer_by_engine, answer_by_generate, num_new_tokens
from benchmarks.rounds import Timings, run_rounds
from mentor_serve.engines import TorchEngine
from mentor_serve.engines.slots.slot_model import SlotModel


def test_contenders_run_in_turns_and_the_first_round_is_not_kept():
    calls = []
    contenders = {name: lambda seed, name=name: calls.append((seed, name)) or seed for name in "ab"}
    timings = run_rounds(contenders, rounds=2)
    assert calls == [(seed, name) for seed in range(3) for name in "ab"]
    assert timings["a"].results == [1, 2]
    assert len(timings["b"].seconds) == 2


def test_the_median_rate_ignores_one_disturbed_round():
    timings = Timings(seconds=[1.0, 1.0, 50.0], results=[100, 110, 100])
    assert timings.median_rate(int) == 100.0


def test_a_straight_line_fits_exactly_and_a_parabola_does_not():
    tokens = [BIN_TOKENS * i for i in range(1, 9)]
    straight = linear_fit(tokens, [0.5 + 0.002 * count for count in tokens])
    assert straight == {"ms_per_token": 2.0, "intercept_s": 0.5, "r_squared": 1.0}
    assert linear_fit(tokens, [1e-6 * count**2 for count in tokens])["r_squared"] < 0.96


def test_times_are_summarised_by_medians_and_bins():
    summary = summarise([[1.0, 2.0, 4.0], [1.0, 2.5, 4.0], [9.0, 9.5, 9.9]])
    assert summary["seconds"] == [1.0, 2.5, 4.0]
    assert summary["seconds_per_bin"] == [1.0, 1.5, 1.5]
    assert summary["last_bin_to_first"] == 1.5


def test_the_time_of_every_full_bin_is_noted(tiny_llama):
    policy = tiny_llama(1, max_position_embeddings=2048)
    engine = TorchEngine(policy, max_batch_size=2, max_model_len=1100, eos_token_ids=())
    times = reach_times(
        engine, (3, 4), mixed=False, gamma=1.0, batch=2, new_tokens=2 * BIN_TOKENS + 5, seed=0
    )
    assert len(times) == 2
    assert 0 < times[0] < times[1]


def test_a_chart_is_xml_with_one_line_and_one_label_a_series():
    chart = line_chart(
        {"first & second": [(0, 0), (512, 1.5)], "b": [(0, 0), (512, 3.0)]},
        title="cost < time",
        x_label="tokens",
        y_label="seconds",
    )
    root = ElementTree.fromstring(chart)
    names = [element.tag.rpartition("}")[2] for element in root]
    texts = [element.text for element in root.iter() if element.text and element.text.strip()]
    assert names.count("polyline") == 2
    assert {"first & second", "b", "cost < time", "tokens", "seconds"} <= set(texts)


def test_a_chart_without_extent_is_refused():
    with pytest.raises(ValueError, match="expected points beyond 0"):
        line_chart({"a": [(0, 0)]}, title="", x_label="", y_label="")


def test_the_model_clock_counts_forwards_and_puts_them_back(tiny_llama):
    original = SlotModel.decode
    engine = TorchEngine(tiny_llama(1), max_batch_size=4, eos_token_ids=())
    overhead = step_overhead(engine, (3, 4, 5), batch=4, new_tokens=8, device="cpu")
    assert SlotModel.decode is original
    assert 0 < overhead["model_ms"] < overhead["step_ms"]
    assert 0 < overhead["overhead_share"] < 1


def test_the_model_clock_closes_after_an_error():
    original = SlotModel.read
    with pytest.raises(RuntimeError, match="stop"), model_clock(Clock(), device="cpu"):
        raise RuntimeError("stop")
    assert SlotModel.read is original


def test_both_ways_answer_exactly_what_was_asked_for(tiny_llama):
    policy = tiny_llama(1)
    requests = [
        RaggedRequest(prompt=tuple(range(2, 5 + i)), new_tokens=3 + 4 * i, seed=i) for i in range(3)
    ]
    engine = TorchEngine(policy, max_batch_size=3)
    wanted = 3 + 7 + 11
    assert num_new_tokens(requests) == wanted
    assert answer_by_engine(engine, requests, seed=0) == wanted
    assert answer_by_generate(policy, requests, batch=2, seed=0) == wanted


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_peak_memory_counts_what_was_freed_again():
    size = 64 * 2**20

    def work():
        block = np.ones(size, np.uint8)
        return int(block[-1])

    assert 0.9 * size < peak_growth(work, device="cpu") < 2 * size
