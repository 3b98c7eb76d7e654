"""Cost against length: is a response of 4096 tokens as cheap per token as a short one?

    python -m benchmarks.long_responses --json --figure docs/images/cost_linear.svg

A random pair (13 million parameters each, one key-value head, so that weights outweigh the cache as
in models of practical size) generates long responses, on-policy and mixed; the time at which the
rows reach each multiple of 512 tokens is noted, and a line is fitted to it. Attention alone grows
with the length, so the last bin is a little slower than the first; anything else that grew
(records, rollbacks, expert calls that read again) would show.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.calibration import calibrate
from benchmarks.chart import line_chart
from benchmarks.machine import add_machine_options, machine_of, positive_int, report_progress
from benchmarks.random_models import Character, Shape, random_pair
from benchmarks.rounds import run_rounds
from mentor_serve.engines import RolloutRequest, SamplingParams, TorchEngine

BIN_TOKENS = 512
MIN_BINS = 3
"""Through two points any line fits."""
_PROMPT_TOKENS = 32
_SHAPE = Shape(hidden_size=384, num_layers=8, intermediate_size=1024, num_heads=6, num_kv_heads=1)
_CHARACTER = Character(sharpness=30.0, context=0.0135)
_CALIBRATION_TOKENS = 256


def reach_times(
    engine: TorchEngine,
    prompt: tuple[int, ...],
    *,
    mixed: bool,
    gamma: float,
    batch: int,
    new_tokens: int,
    seed: int,
) -> list[float]:
    """Seconds from submission until the rows have 512, 1024, ... settled tokens on average."""
    engine.submit(
        RolloutRequest(
            prompt_token_ids=prompt,
            mixed=mixed,
            gamma=gamma,
            num_samples=batch,
            seed=seed,
            sampling=SamplingParams(max_new_tokens=new_tokens, ignore_eos=True),
        )
    )
    times: list[float] = []
    num_tokens = 0
    started = time.perf_counter()
    while engine.has_unfinished():
        num_tokens += sum(len(output.new_token_ids) for output in engine.step())
        while num_tokens >= (len(times) + 1) * BIN_TOKENS * batch:
            times.append(time.perf_counter() - started)
    return times


def linear_fit(tokens: list[int], seconds: list[float]) -> dict[str, float]:
    """Least squares of seconds on tokens: slope in milliseconds a token, intercept, R squared."""
    x, y = np.array(tokens, np.float64), np.array(seconds, np.float64)
    slope, intercept = np.polyfit(x, y, 1)
    residual = float(((y - slope * x - intercept) ** 2).sum())
    total = float(((y - y.mean()) ** 2).sum())
    return {
        "ms_per_token": round(1e3 * float(slope), 4),
        "intercept_s": round(float(intercept), 4),
        "r_squared": round(1.0 - residual / total, 6),
    }


def summarise(rounds: list[list[float]]) -> dict[str, Any]:
    """Medians over rounds of the times, [rounds][bins], and what they say about linearity."""
    seconds = [statistics.median(times) for times in zip(*rounds, strict=True)]
    tokens = [BIN_TOKENS * (i + 1) for i in range(len(seconds))]
    bins = np.diff([0.0, *seconds])
    return {
        "tokens": tokens,
        "seconds": [round(value, 4) for value in seconds],
        "seconds_per_bin": [round(float(value), 4) for value in bins],
        "last_bin_to_first": round(float(bins[-1] / bins[0]), 3),
        "linear_fit": linear_fit(tokens, seconds),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both kinds in turns, on one pair."""
    machine = machine_of(arguments)
    policy, expert = random_pair(
        _SHAPE, _SHAPE, _CHARACTER, dtype=machine.dtype, device=machine.device
    )
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(_CHARACTER.vocab_size, (4, _PROMPT_TOKENS), generator=generator).tolist()
    prompts = [tuple(row) for row in drawn]
    max_tokens = _PROMPT_TOKENS + arguments.new_tokens
    calibration = calibrate(
        policy, expert, prompts, new_tokens=_CALIBRATION_TOKENS, max_tokens=max_tokens
    )
    engine = TorchEngine(
        policy, expert, max_batch_size=arguments.batch, max_model_len=max_tokens, eos_token_ids=()
    )
    run = partial(
        _reach_times,
        engine,
        prompts[0],
        gamma=calibration.gamma,
        batch=arguments.batch,
        new_tokens=arguments.new_tokens,
    )
    contenders: dict[str, Callable[[int], list[float]]] = {
        "on_policy": partial(run, mixed=False),
        "mixed": partial(run, mixed=True),
    }
    timings = run_rounds(
        contenders,
        rounds=arguments.rounds,
        device=machine.device,
        on_round=lambda number: report_progress(f"round {number}"),
    )
    return {
        "batch": arguments.batch,
        "rounds": arguments.rounds,
        "mean_weight": round(calibration.mean_weight, 4),
        "total_variation": round(calibration.total_variation, 4),
        **{name: summarise(timing.results) for name, timing in timings.items()},
        "machine": machine.describe(),
    }


def write_figure(report: dict[str, Any], path: Path) -> None:
    """Seconds against tokens, both kinds."""
    series = {}
    for name, title in (("on_policy", "on-policy"), ("mixed", "mixed")):
        times, fit = report[name], report[name]["linear_fit"]
        label = f"{title} (a line fits with R2 = {fit['r_squared']:.4f})"
        series[label] = [(0.0, 0.0), *zip(times["tokens"], times["seconds"], strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    chart = line_chart(
        series,
        title=f"Time to generate a long response, {report['batch']} at a time",
        x_label="tokens of each response",
        y_label="seconds",
    )
    path.write_text(chart, encoding="utf-8")


def print_table(report: dict[str, Any]) -> None:
    """The same for people."""
    console = Console()
    console.print(report["machine"])
    table = Table(title=f"seconds for each {BIN_TOKENS} tokens, {report['batch']} at a time")
    for title in ("tokens", "on-policy", "mixed"):
        table.add_column(title, justify="right")
    columns = (report["on_policy"], report["mixed"])
    for number, tokens in enumerate(columns[0]["tokens"]):
        table.add_row(str(tokens), *(str(column["seconds_per_bin"][number]) for column in columns))
    console.print(table)
    for name in ("on_policy", "mixed"):
        console.print(name, report[name]["linear_fit"])


def _reach_times(engine: TorchEngine, prompt: tuple[int, ...], seed: int, **keywords: Any) -> Any:
    return reach_times(engine, prompt, seed=seed, **keywords)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=positive_int, default=1)
    parser.add_argument("--new-tokens", type=positive_int, default=4096)
    parser.add_argument("--rounds", type=positive_int, default=3)
    parser.add_argument("--figure", type=Path, help="also write an SVG file")
    add_machine_options(parser)
    arguments = parser.parse_args()
    if arguments.new_tokens < MIN_BINS * BIN_TOKENS:
        parser.error(f"--new-tokens: expected at least {MIN_BINS * BIN_TOKENS}")
    return arguments


def main() -> None:
    """Parse, measure, print."""
    arguments = _options()
    report = measure(arguments)
    if arguments.figure:
        write_figure(report, arguments.figure)
        report_progress(f"wrote {arguments.figure}")
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print_table(report)


if __name__ == "__main__":
    main()
