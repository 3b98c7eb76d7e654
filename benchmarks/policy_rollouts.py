"""The policy alone: the engine's continuous batching against `transformers.generate`.

    python -m benchmarks.policy_rollouts --json

64 requests whose prompts (8 to 96 tokens) and responses (16 to 112 tokens) have ragged lengths;
only tokens that were asked for count. `generate` gets all of them in one call, and also in batches
of 32 and 16 sorted by the length of their response (which nobody knows beforehand): the engine is
compared with the one call and with the best of all. Peak memory is measured in one process a
sampler, beyond the loaded model that has run once. The engine's overhead is the share of a step
that is not spent in the model's forward.

Models: `embedded:policy`, and SmolLM2-135M if it is named (see `benchmarks/pairs.py`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import (
    Machine,
    add_machine_options,
    machine_of,
    positive_int,
    report_progress,
)
from benchmarks.memory import peak_growth
from benchmarks.overhead import step_overhead
from benchmarks.pairs import SMOLLM2_VARIABLE, add_smollm2_option
from benchmarks.ragged import (
    RaggedRequest,
    answer_by_engine,
    answer_by_generate,
    longest,
    num_new_tokens,
    ragged_requests,
)
from benchmarks.rounds import run_rounds
from mentor_serve.engines import TorchEngine
from mentor_serve.models.loading import load_model

ENGINE = "engine"
OVERHEAD_BATCHES = (1, 8, 32)
EMBEDDED = "embedded:policy"
_MEBIBYTE = 2**20


def measure_model(name: str, arguments: argparse.Namespace, machine: Machine) -> dict[str, Any]:
    """Everything about one model, as JSON."""
    policy = load_model(name, dtype=machine.dtype, device=machine.device)
    requests = _requests(name, arguments.requests)
    samplers = _samplers(policy, requests, arguments.generate_batch)
    timings = run_rounds(
        samplers,
        rounds=arguments.rounds,
        device=machine.device,
        on_round=lambda number: report_progress(f"{name} round {number}"),
    )
    rates = {key: round(timing.median_rate(int), 1) for key, timing in timings.items()}
    whole = f"generate_{max(arguments.generate_batch)}"
    best = max(rates.keys() - {ENGINE}, key=rates.__getitem__)
    report_progress(f"{name}: {rates}")
    report_progress(f"{name}: memory")
    memory = {key: measure_memory(key, name, arguments, machine) for key in samplers}
    report_progress(f"{name}: overhead")
    return {
        # A path on this machine is nobody's business, its last part is the model.
        "model": Path(name).name,
        "requests": len(requests),
        "requested_tokens": num_new_tokens(requests),
        "tokens_per_s": rates,
        "best_generate": best,
        "ratio_to_generate": round(rates[ENGINE] / rates[whole], 3),
        "ratio_to_best_generate": round(rates[ENGINE] / rates[best], 3),
        "peak_memory_mib": memory,
        "memory_ratio_to_generate": round(memory[ENGINE] / memory[whole], 3),
        "overhead": _overheads(policy, requests, arguments.overhead_tokens, machine),
    }


def measure_memory(
    sampler: str, name: str, arguments: argparse.Namespace, machine: Machine
) -> float:
    """Peak of one sampler in a process of its own, MiB."""
    command = [sys.executable, "-m", "benchmarks.policy_rollouts", "--memory-of", sampler]
    command += ["--model", name, "--requests", str(arguments.requests)]
    command += ["--device", machine.device, "--dtype", machine.dtype]
    command += ["--threads", str(machine.threads)]
    command += ["--generate-batch", *map(str, arguments.generate_batch)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return round(float(done.stdout) / _MEBIBYTE, 2)


def peak_of(sampler: str, name: str, arguments: argparse.Namespace, machine: Machine) -> int:
    """Bytes that one round of a sampler adds to a loaded model that has run once."""
    policy = load_model(name, dtype=machine.dtype, device=machine.device)
    requests = _requests(name, arguments.requests)
    batches = arguments.generate_batch
    _samplers(policy, requests[:1], batches)[sampler](0)
    return peak_growth(
        lambda: _samplers(policy, requests, batches)[sampler](1), device=machine.device
    )


def print_tables(report: dict[str, Any]) -> None:
    """The same for people, one table a model."""
    console = Console()
    console.print(report["machine"])
    for measured in report["models"]:
        table = Table(title=f"{measured['model']}, {measured['requests']} ragged requests")
        for title in ("sampler", "tokens/s", "peak memory, MiB"):
            table.add_column(title, justify="left" if title == "sampler" else "right")
        for name, rate in measured["tokens_per_s"].items():
            table.add_row(name, str(rate), str(measured["peak_memory_mib"][name]))
        console.print(table)
        for overhead in measured["overhead"]:
            share = f"{overhead['overhead_share']:.1%}"
            console.print(
                f"batch {overhead['batch']}: {overhead['step_ms']} ms a step, {share} outside "
                "the model"
            )


def _requests(name: str, count: int) -> list[RaggedRequest]:
    return ragged_requests(name, count=count, uses_chat=name == EMBEDDED, seed=0)


def _samplers(
    policy: Any, requests: Sequence[RaggedRequest], generate_batches: Sequence[int]
) -> dict[str, Callable[[int], int]]:
    """Each answers all requests, given a seed, and returns the number of wanted tokens."""
    engine: list[TorchEngine] = []

    def by_engine(seed: int) -> int:
        if not engine:
            engine.append(
                TorchEngine(policy, max_batch_size=len(requests), max_model_len=longest(requests))
            )
        return answer_by_engine(engine[0], requests, seed=seed)

    def by_generate(seed: int, *, batch: int) -> int:
        return answer_by_generate(policy, requests, batch=batch, seed=seed)

    return {
        ENGINE: by_engine,
        **{f"generate_{batch}": partial(by_generate, batch=batch) for batch in generate_batches},
    }


def _overheads(
    policy: Any, requests: Sequence[RaggedRequest], new_tokens: int, machine: Machine
) -> list[dict[str, float]]:
    prompt = requests[0].prompt
    return [
        step_overhead(
            TorchEngine(policy, max_batch_size=batch, max_model_len=len(prompt) + new_tokens),
            prompt,
            batch=batch,
            new_tokens=new_tokens,
            device=machine.device,
        )
        for batch in OVERHEAD_BATCHES
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", nargs="+", help="models (default: bundled policy and SmolLM2)")
    parser.add_argument("--requests", type=positive_int, default=64)
    parser.add_argument("--rounds", type=positive_int, default=5)
    parser.add_argument(
        "--generate-batch",
        nargs="+",
        type=positive_int,
        default=[64, 32, 16],
        help="batch sizes of generate; the largest is the one compared with",
    )
    parser.add_argument(
        "--overhead-tokens", type=positive_int, default=96, help="steps of that part"
    )
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    add_smollm2_option(parser)
    add_machine_options(parser)
    return parser.parse_args()


def main() -> None:
    """Parse, measure, print."""
    arguments = _options()
    machine = machine_of(arguments)
    if arguments.memory_of:
        print(peak_of(arguments.memory_of, arguments.model[0], arguments, machine))
        return
    models = arguments.model or [EMBEDDED, *([arguments.smollm2] if arguments.smollm2 else [])]
    if not (arguments.model or arguments.smollm2):
        report_progress(f"SmolLM2 skipped: name it by --smollm2 or {SMOLLM2_VARIABLE}")
    report = {
        "models": [measure_model(name, arguments, machine) for name in models],
        "rounds": arguments.rounds,
        "machine": machine.describe(),
    }
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print_tables(report)


if __name__ == "__main__":
    main()
