"""One optimiser step of the learner against TRL's GRPOTrainer and a plain padded step.

    python -m benchmarks.learner_step --threads 1 --json

Groups of 8 on-policy and 4 mixed responses share a prompt of 64 tokens. `ragged`: responses of 16
to 512 tokens; `equal`: all of one length, where packing has nothing to win and the plain step has
no padding. `trl` is the real `GRPOTrainer.compute_loss` (extra `benchmark`); without TRL its
entries say why it was skipped. All compute the same loss and gradient on the same batch, see
`benchmarks/updates.py`. Rates count response tokens; medians over interleaved rounds, by the clock
and by this process's processor time. Peak memory is measured in one process a contender, beyond
the model and its AdamW moments. `vocabulary` is explained in `benchmarks/vocabulary_memory.py`.

Models: `embedded:policy`, and SmolLM2-135M if it is named (see `benchmarks/pairs.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
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
from benchmarks.pairs import SMOLLM2_VARIABLE, add_smollm2_option
from benchmarks.rounds import Timings, run_rounds
from benchmarks.update_batches import BatchShape, num_response_tokens, random_batch
from benchmarks.updates import (
    Step,
    StepMaker,
    TrlUnavailable,
    our_step,
    padded_step,
    timed,
    trl_step,
    trl_version,
)
from benchmarks.vocabulary_memory import measure_vocabularies
from mentor_serve.models.loading import load_model, load_tokenizer

EMBEDDED = "embedded:policy"
OURS, TRL, PADDED = "ours", "trl", "padded"
BATCHES = ("ragged", "equal")
_WARM_UP = BatchShape(num_groups=1, prompt_tokens=4, shortest=4, longest=4)
_MEBIBYTE = 2**20


def measure_batch(
    name: str, batch_name: str, arguments: argparse.Namespace, machine: Machine
) -> dict[str, Any]:
    """All contenders on one batch of one model, as JSON."""
    makers = _makers(name, arguments)
    report_progress(f"{name} {batch_name}: memory")
    # Before this process holds models of its own: together they might not fit.
    memory = {key: _measure_memory(key, name, batch_name, arguments, machine) for key in makers}
    model = load_model(name, dtype=machine.dtype, device=machine.device)
    batch = random_batch(model, _shape(batch_name, name, arguments))
    # Each has a copy of the model: TRL patches the forward of its own.
    steps = {key: make(copy.deepcopy(model)) for key, make in makers.items()}
    timings = run_rounds(
        {key: _contender(step, batch) for key, step in steps.items()},
        rounds=arguments.rounds,
        device=machine.device,
        on_round=lambda number: report_progress(f"{name} {batch_name} round {number}"),
    )
    rates = {key: item.median_rate(_num_tokens) for key, item in timings.items()}
    cpu_rates = {key: _median_cpu_rate(item) for key, item in timings.items()}
    return {
        # A path on this machine is nobody's business, its last part is the model.
        "model": Path(name).name,
        "batch": batch_name,
        "groups": len(batch.groups),
        "response_tokens": num_response_tokens(batch),
        "loss": {key: round(item.results[0].loss, 6) for key, item in timings.items()},
        "tokens_per_s": _rounded(rates),
        "tokens_per_cpu_s": _rounded(cpu_rates),
        "ratio_to_trl": _ratio(rates, TRL),
        "ratio_to_padded": _ratio(rates, PADDED),
        "cpu_ratio_to_trl": _ratio(cpu_rates, TRL),
        "cpu_ratio_to_padded": _ratio(cpu_rates, PADDED),
        "peak_memory_mib": memory,
        "memory_ratio_to_trl": _ratio(memory, TRL),
        "memory_ratio_to_padded": _ratio(memory, PADDED),
    }


def peak_of(
    contender: str, name: str, batch_name: str, arguments: argparse.Namespace, machine: Machine
) -> int:
    """Bytes that one step adds to a model whose moments exist."""
    model = load_model(name, dtype=machine.dtype, device=machine.device)
    batch = random_batch(model, _shape(batch_name, name, arguments))
    small = random_batch(model, _WARM_UP)
    make_step = _makers(name, arguments)[contender](model)
    make_step(small)
    return peak_growth(lambda: make_step(batch), device=machine.device)


def print_tables(report: dict[str, Any]) -> None:
    """The same for people, one table a model and batch."""
    console = Console()
    console.print(report["machine"])
    for measured in report["steps"]:
        title = f"{measured['model']}, {measured['batch']}: {measured['response_tokens']} tokens"
        table = Table(title=title)
        for column in ("step", "tokens/s", "tokens/processor s", "peak memory, MiB"):
            table.add_column(column, justify="left" if column == "step" else "right")
        for key, rate in measured["tokens_per_s"].items():
            cpu_rate, memory = measured["tokens_per_cpu_s"][key], measured["peak_memory_mib"][key]
            table.add_row(key, str(rate), str(cpu_rate), str(memory))
        console.print(table)
    console.print("TRL", report["trl"])
    if "vocabulary" in report:
        console.print("memory by vocabulary", report["vocabulary"]["ratio_to_smallest"])


def _makers(name: str, arguments: argparse.Namespace) -> dict[str, Callable[[Any], StepMaker]]:
    """Contender -> what turns a model into its step, TRL's only where it is installed."""
    tokens = arguments.micro_batch_tokens
    makers: dict[str, Callable[[Any], StepMaker]] = {
        OURS: partial(our_step, max_tokens=tokens),
        PADDED: partial(padded_step, max_tokens=tokens),
    }
    if not isinstance(_trl(), dict):
        makers[TRL] = partial(trl_step, tokenizer=load_tokenizer(name), max_tokens=tokens)
    return makers


def _contender(make_step: StepMaker, batch: Any) -> Callable[[int], Step]:
    # The batch is the same in every round; a round's number is of no use.
    return lambda _number: timed(make_step, batch)


def _trl() -> str | dict[str, str]:
    try:
        return trl_version()
    except TrlUnavailable as error:
        return {"skipped": str(error)}


def _shape(batch_name: str, name: str, arguments: argparse.Namespace) -> BatchShape:
    num_groups = arguments.groups or (4 if name == EMBEDDED else 1)
    if batch_name == "equal":
        length = arguments.equal_length
        return BatchShape(num_groups=num_groups, shortest=length, longest=length)
    return BatchShape(num_groups=num_groups, longest=arguments.longest)


def _measure_memory(
    contender: str, name: str, batch_name: str, arguments: argparse.Namespace, machine: Machine
) -> float:
    """Peak of one contender in a process of its own, MiB."""
    command = [sys.executable, "-m", "benchmarks.learner_step", "--memory-of", contender]
    command += ["--model", name, "--batch", batch_name, "--longest", str(arguments.longest)]
    command += ["--equal-length", str(arguments.equal_length)]
    command += ["--micro-batch-tokens", str(arguments.micro_batch_tokens)]
    command += ["--device", machine.device, "--dtype", machine.dtype]
    command += ["--threads", str(machine.threads)]
    if arguments.groups:
        command += ["--groups", str(arguments.groups)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return round(float(done.stdout) / _MEBIBYTE, 1)


def _num_tokens(step: Step) -> int:
    return step.num_tokens


def _median_cpu_rate(timings: Timings[Step]) -> float:
    return statistics.median(step.num_tokens / step.cpu_s for step in timings.results)


def _ratio(values: Mapping[str, float], other: str) -> float | None:
    return round(values[OURS] / values[other], 3) if other in values else None


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {key: round(value, 1) for key, value in values.items()}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", nargs="+", help="models (default: bundled policy and SmolLM2)")
    parser.add_argument("--batch", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--groups", type=positive_int, help="default: 4 bundled, 1 otherwise")
    parser.add_argument("--longest", type=positive_int, default=512, help="of ragged responses")
    parser.add_argument("--equal-length", type=positive_int, default=256)
    parser.add_argument("--micro-batch-tokens", type=positive_int, default=4096)
    parser.add_argument("--rounds", type=positive_int, default=5)
    parser.add_argument("--no-vocabulary", action="store_true", help="leave out that part")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    add_smollm2_option(parser)
    add_machine_options(parser)
    return parser.parse_args()


def measure(arguments: argparse.Namespace, machine: Machine) -> dict[str, Any]:
    """The whole report, as JSON."""
    models = arguments.model or [EMBEDDED, *([arguments.smollm2] if arguments.smollm2 else [])]
    if not (arguments.model or arguments.smollm2):
        report_progress(f"SmolLM2 skipped: name it by --smollm2 or {SMOLLM2_VARIABLE}")
    report: dict[str, Any] = {"trl": _trl(), "steps": []}
    for name in models:
        for batch_name in arguments.batch:
            measured = measure_batch(name, batch_name, arguments, machine)
            report_progress(json.dumps(measured))
            report["steps"].append(measured)
    if not arguments.no_vocabulary:
        report["vocabulary"] = measure_vocabularies(machine)
    return report | {"rounds": arguments.rounds, "machine": machine.describe()}


def main() -> None:
    """Parse, measure, print."""
    arguments = _options()
    machine = machine_of(arguments)
    # What TRL imports writes on standard output, which belongs to the result.
    with contextlib.redirect_stdout(sys.stderr):
        if arguments.memory_of:
            (name,), (batch_name,) = arguments.model, arguments.batch
            result: Any = peak_of(arguments.memory_of, name, batch_name, arguments, machine)
        else:
            result = measure(arguments, machine)
    if arguments.json or arguments.memory_of:
        print(json.dumps(result, indent=2))
    else:
        print_tables(result)


if __name__ == "__main__":
    main()
