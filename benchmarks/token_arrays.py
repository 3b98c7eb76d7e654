"""Bytes and time of the token arrays that a group stores.

    python -m benchmarks.token_arrays --json

The bundled pair answers problems of its own tasks: groups of 8 on-policy and 4 mixed rollouts,
gamma from the entropies of a first group that is not counted. `full` goes on for `--tokens` tokens
each, past the end of the answer, which is the length of real reasoning; `natural` ends where the
models end, after a few dozen tokens, where headers weigh most. Bytes are over response tokens,
those of the prompt's ids included. "before" is what forms 0 and 1 of the format take. Levels of
zstd run in turns within every round; times are this thread's processor time in its fastest round,
because arrays of microseconds do not average a busy machine out. Last, the groups go into an
SQLite file, and each table's and index's pages are counted.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.machine import (
    Machine,
    add_machine_options,
    machine_of,
    positive_int,
    report_progress,
)
from benchmarks.pairs import Pair, PairOptions, build_pair
from benchmarks.rounds import run_rounds
from mentor_serve.core.entropy import entropy_quantile
from mentor_serve.engines import TorchEngine
from mentor_serve.store import NewGroup, NewTrajectory, TrajectoryStore, encoding, new_id, upgrade
from mentor_serve.store.groups import ARRAY_COLUMNS
from mentor_serve.types import (
    Guidance,
    Rollout,
    RolloutRequest,
    SamplingParams,
    Score,
    Task,
    TrajectoryKind,
)

COUNTS = {TrajectoryKind.ON_POLICY: 8, TrajectoryKind.MIXED: 4}
ENTROPY_QUANTILE = 0.95
LEVELS = (-1, 1, 3, 5, 9, 19)
_HEADER_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Rollouts of one prompt by kind."""

    prompt: NDArray[np.int32]
    gamma: float
    rollouts: dict[TrajectoryKind, list[Rollout]]

    def arrays(self, kind: TrajectoryKind) -> list[tuple[str, NDArray[Any]]]:
        """Column and array of every array that is stored."""
        return [
            (column, getattr(rollout, attribute))
            for rollout in self.rollouts[kind]
            for attribute, column in ARRAY_COLUMNS.items()
        ] + [("prompt_token_ids", self.prompt)] * len(self.rollouts[kind])

    def num_tokens(self, kind: TrajectoryKind) -> int:
        """Response tokens of a kind."""
        return sum(rollout.num_tokens for rollout in self.rollouts[kind])


def collect(pair: Pair, *, num_tokens: int, is_full: bool) -> list[Group]:
    """One group for each prompt but the first, which sets gamma."""
    engine = TorchEngine(
        policy=pair.policy,
        expert=pair.expert,
        max_batch_size=sum(COUNTS.values()),
        max_model_len=max(map(len, pair.prompts)) + num_tokens,
    )
    sampling = SamplingParams(max_new_tokens=num_tokens, ignore_eos=is_full)
    groups: list[Group] = []
    gamma = 999.0
    for seed, prompt in enumerate(pair.prompts):
        requests = [
            RolloutRequest(
                prompt_token_ids=prompt,
                mixed=kind is TrajectoryKind.MIXED,
                gamma=gamma,
                num_samples=count,
                seed=seed * len(COUNTS) + number,
                sampling=sampling,
            )
            for number, (kind, count) in enumerate(COUNTS.items())
        ]
        rollouts = dict(zip(COUNTS, engine.generate(requests), strict=True))
        groups.append(Group(prompt=np.array(prompt, np.int32), gamma=gamma, rollouts=rollouts))
        own = [rollout.entropies for rollout in rollouts[TrajectoryKind.ON_POLICY]]
        gamma = entropy_quantile(torch.from_numpy(np.concatenate(own)), ENTROPY_QUANTILE)
    return groups[1:]


def bytes_per_token(groups: Sequence[Group]) -> dict[str, Any]:
    """Kind ("all" too) to column ("total" too) to bytes per response token before and after."""
    before: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    after: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    tokens: dict[str, int] = defaultdict(int)
    for group in groups:
        for kind in COUNTS:
            for name in (kind.value, "all"):
                tokens[name] += group.num_tokens(kind)
                for column, array in group.arrays(kind):
                    for key in (column, "total"):
                        before[name][key] += uncompressed_size(array)
                        after[name][key] += len(encoding.encode(array))
    return {
        name: {
            column: {
                "before": round(before[name][column] / tokens[name], 3),
                "after": round(after[name][column] / tokens[name], 3),
            }
            for column in before[name]
        }
        for name in before
    }


def uncompressed_size(array: NDArray[Any]) -> int:
    """Bytes of form 0, or of form 1 where every value has the same bits."""
    body = array.tobytes()
    first = body[: array.itemsize]
    is_constant = len(array) > 1 and body == first * len(array)
    return _HEADER_BYTES + len(first if is_constant else body)


def speed(groups: Sequence[Group], levels: Sequence[int], rounds: int) -> dict[str, Any]:
    """Level of zstd to bytes per token and the time that one group takes."""
    arrays = [array for group in groups for kind in COUNTS for _, array in group.arrays(kind)]
    num_bytes = sum(array.nbytes for array in arrays)
    num_tokens = sum(group.num_tokens(kind) for group in groups for kind in COUNTS)
    encoded = run_rounds(
        {str(level): partial(_encode_all, arrays, level) for level in levels}, rounds=rounds
    )
    decoded = run_rounds(
        {name: partial(_decode_all, timed.results[0].blobs) for name, timed in encoded.items()},
        rounds=rounds,
    )
    report = {}
    for name, timed in encoded.items():
        size = sum(map(len, timed.results[0].blobs))
        report[name] = {"bytes_per_token": round(size / num_tokens, 3)}
        for direction, rows in (("encode", timed.results), ("decode", decoded[name].results)):
            fastest = min(row.cpu_s for row in rows)
            report[name] |= {
                f"{direction}_us_per_group": round(1e6 * fastest / len(groups)),
                f"{direction}_us_per_array": round(1e6 * fastest / len(arrays), 2),
                f"{direction}_mb_per_s": round(num_bytes / fastest / 1e6, 1),
            }
    return report


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One round over every array."""

    cpu_s: float
    blobs: list[bytes]


def _encode_all(arrays: Sequence[NDArray[Any]], level: int, _: int) -> Pass:
    # The store has one level; only this comparison changes it, in its own thread's codec.
    encoding._codec.compressor = zstandard.ZstdCompressor(level=level)
    try:
        started = time.thread_time()
        blobs = [encoding.encode(array) for array in arrays]
        return Pass(cpu_s=time.thread_time() - started, blobs=blobs)
    finally:
        encoding._codec.compressor = zstandard.ZstdCompressor(level=encoding.COMPRESSION_LEVEL)


def _decode_all(blobs: list[bytes], _: int) -> Pass:
    started = time.thread_time()
    for blob in blobs:
        encoding.decode(blob)
    return Pass(cpu_s=time.thread_time() - started, blobs=blobs)


def pages_per_token(groups: Sequence[Group]) -> dict[str, float]:
    """Table or index to bytes of its pages per response token, in an SQLite file of these groups.

    `payload` is what the arrays alone take; what `trajectory_tokens` takes beyond it is keys, row
    headers and unused space of pages.
    """
    num_tokens = sum(group.num_tokens(kind) for group in groups for kind in COUNTS)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "groups.db"
        url = f"sqlite:///{path}"
        upgrade(url)
        with TrajectoryStore(url) as store:
            run_id = store.open_run("benchmark", {})
            for number, group in enumerate(groups):
                store.add_group(run_id, _new_group(group, number))
        with closing(sqlite3.connect(path)) as connection:
            rows = connection.execute(
                "SELECT name, SUM(pgsize) FROM dbstat WHERE name LIKE '%trajector%' "
                "OR name LIKE '%interventions%' GROUP BY name"
            ).fetchall()
            columns = [*ARRAY_COLUMNS.values(), "prompt_token_ids"]
            lengths = " + ".join(f"LENGTH({column})" for column in columns)
            ((payload,),) = connection.execute(f"SELECT SUM({lengths}) FROM trajectory_tokens")
    sizes = {"payload": payload, **dict(rows)}
    return {name: round(size / num_tokens, 3) for name, size in sizes.items()}


def _new_group(group: Group, number: int) -> NewGroup:
    return NewGroup(
        group_id=new_id(),
        task=Task(source="benchmark", prompt=f"problem {number}", answer="1"),
        guidance=Guidance(policy_version=0, step=0, alpha=1.0, gamma=group.gamma),
        trajectories=[
            NewTrajectory(
                rollout=rollout,
                kind=kind,
                sample_index=index,
                score=Score(reward=1.0, accuracy=1.0, format_score=1.0),
                prompt_token_ids=group.prompt,
            )
            for kind, rollouts in group.rollouts.items()
            for index, rollout in enumerate(rollouts)
        ],
    )


def measure(pair: Pair, arguments: argparse.Namespace, *, is_full: bool) -> dict[str, Any]:
    """Everything about rollouts of one length, as JSON."""
    groups = collect(pair, num_tokens=arguments.tokens, is_full=is_full)
    lengths = [r.num_tokens for g in groups for rollouts in g.rollouts.values() for r in rollouts]
    return {
        "num_groups": len(groups),
        "mean_tokens": round(statistics.mean(lengths), 1),
        "level": encoding.COMPRESSION_LEVEL,
        "bytes_per_token": bytes_per_token(groups),
        "levels": speed(groups, arguments.levels, arguments.rounds),
        "sqlite_bytes_per_token": pages_per_token(groups),
    }


def print_tables(report: dict[str, Any]) -> None:
    """The same for people."""
    console = Console()
    for name in ("full", "natural"):
        measured = report[name]
        title = f"{name}: bytes a token, {measured['mean_tokens']} tokens a response"
        table = Table("kind", "column", "before", "after", title=title)
        for kind, columns in measured["bytes_per_token"].items():
            for column, sizes in columns.items():
                table.add_row(kind, column, str(sizes["before"]), str(sizes["after"]))
        console.print(table)
        for level, numbers in measured["levels"].items():
            console.print(f"level {level}: {numbers}")
        console.print(f"pages, bytes a token: {measured['sqlite_bytes_per_token']}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--groups", type=positive_int, default=8)
    parser.add_argument("--tokens", type=positive_int, default=256, help="of a response, at most")
    parser.add_argument("--rounds", type=positive_int, default=15)
    parser.add_argument("--levels", nargs="+", type=int, default=list(LEVELS), help="of zstd")
    add_machine_options(parser)
    return parser.parse_args()


def main() -> None:
    """Parse, measure, print."""
    arguments = _options()
    machine: Machine = machine_of(arguments)
    pair = build_pair("embedded", PairOptions(machine=machine, num_prompts=arguments.groups + 1))
    report: dict[str, Any] = {"machine": machine.describe(), "zstd": zstandard.__version__}
    for name, is_full in (("full", True), ("natural", False)):
        report_progress(name)
        report[name] = measure(pair, arguments, is_full=is_full)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print_tables(report)


if __name__ == "__main__":
    main()
