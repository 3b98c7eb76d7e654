"""What an update costs on each training backend, beside plain torch in one process.

    python -m benchmarks.training_backends --threads 1 --json

Two batches of the bundled policy: `small`, one group of 4-token responses, where the time is what
the backend itself costs; `usual`, 16 groups of 8 on-policy and 4 mixed responses of 8 to 64 tokens,
the size of a default update. `start_s` is from nothing to ranks that hold the model, `publish_s` a
consolidated copy of all weights, `save_s` a checkpoint. Medians over `--rounds`; each round times
plain torch too (`torch_s`), so that other load on the machine falls on both. Every rank has
`--threads` threads: on a machine with fewer cores than ranks these wait for each other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
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
from benchmarks.update_batches import BatchShape, random_batch
from mentor_serve.learner import TrainingBatch, TrainingOptions, UpdateConfig
from mentor_serve.learner.backends import BackendName, RankOptions, build_backend
from mentor_serve.models.loading import load_model

_MODEL = "embedded:policy"
_SHAPES = {
    "small": BatchShape(num_groups=1, prompt_tokens=4, shortest=4, longest=4),
    "usual": BatchShape(num_groups=16, prompt_tokens=16, shortest=8, longest=64),
}


@dataclass(frozen=True, slots=True)
class Contender:
    """One backend with its ranks."""

    name: BackendName
    num_learners: int = 0
    zero_stage: Any = 2

    def __str__(self) -> str:
        stage = f" ZeRO-{self.zero_stage}" if self.name == "deepspeed" else ""
        return f"{self.name}{stage}, {self.num_learners or 'no'} ranks"


CONTENDERS = (
    Contender("torch"),
    Contender("rllib", 0),
    Contender("rllib", 1),
    Contender("rllib", 2),
    *(Contender("deepspeed", 2, stage) for stage in range(4)),
)


def measure(
    contender: Contender, batches: dict[str, TrainingBatch], machine: Machine, *, rounds: int
) -> dict[str, Any]:
    """Seconds of one backend, as JSON."""
    ranks = RankOptions(
        num_learners=contender.num_learners,
        num_threads=machine.threads,
        zero_stage=contender.zero_stage,
    )
    backend = build_backend(contender.name, TrainingOptions(device=machine.device), ranks)
    start_s = _seconds(lambda: backend.build(load_model(_MODEL)))
    reference = build_backend("torch", TrainingOptions(device=machine.device))
    reference.build(load_model(_MODEL))
    config = UpdateConfig(max_tokens_per_micro_batch=4096)
    update_s, torch_s = {}, {}
    for name, batch in batches.items():
        steps = [partial(item.step, batch, config) for item in (backend, reference)]
        for step in steps:
            step()  # the first allocates what later ones use again
        pairs = [[_seconds(step) for step in steps] for _ in range(rounds)]
        columns = [round(statistics.median(column), 4) for column in zip(*pairs, strict=True)]
        update_s[name], torch_s[name] = columns
    with tempfile.TemporaryDirectory() as directory:
        save_s = _seconds(lambda: backend.save(Path(directory)))
    publish_s = _median(backend.full_state, rounds)
    backend.close()
    return {
        "backend": str(contender),
        "start_s": round(start_s, 1),
        "update_s": update_s,
        "torch_s": torch_s,
        "publish_s": round(publish_s, 4),
        "save_s": round(save_s, 3),
    }


def _median(call: Callable[[], Any], rounds: int) -> float:
    return statistics.median(_seconds(call) for _ in range(rounds))


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def print_table(report: dict[str, Any]) -> None:
    """The same for people."""
    names = [f"{name}, torch s" for name in _SHAPES]
    table = Table("backend", "start s", *names, "publish s", "save s")
    for item in report["backends"]:
        updates = (f"{item['update_s'][name]}, {item['torch_s'][name]}" for name in _SHAPES)
        row = (item["start_s"], *updates, item["publish_s"], item["save_s"])
        table.add_row(item["backend"], *map(str, row))
    console = Console()
    console.print(report["machine"])
    console.print(table)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_machine_options(parser)
    parser.add_argument("--rounds", type=positive_int, default=9)
    arguments = parser.parse_args()
    machine = machine_of(arguments)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray

    ray.init(include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    model = load_model(_MODEL)
    batches = {name: random_batch(model, shape) for name, shape in _SHAPES.items()}
    backends = []
    for contender in CONTENDERS:
        report_progress(str(contender))
        backends.append(measure(contender, batches, machine, rounds=arguments.rounds))
    ray.shutdown()
    report = {"benchmark": "training_backends", "machine": machine.describe(), "backends": backends}
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print_table(report)


if __name__ == "__main__":
    main()
