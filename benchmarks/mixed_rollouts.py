"""Mixed sampling: the engine's lazy sampler against the paper's Algorithm 1 and token by token.

    python -m benchmarks.mixed_rollouts --json

Every sampler answers the same prompts with the same models, seeds and numbers of tokens, and shares
the engine's forward, so that algorithms are compared. `floor` is the yardstick (the policy alone,
plus one teacher-forced pass of the expert over everything; only a sampler that need not read the
tokens after a row's last coin can beat it), `policy_only` and `hf_generate` sample from the policy
without an expert. gamma is the 0.95 quantile of the policy's own entropies. Samplers run in turns,
once a round; rates are medians over rounds, counts are totals.

Pairs: `embedded` (the bundled one), `smollm2` (SmolLM2-135M and itself perturbed), `smollm2_sharp`
(at a low temperature), `random_8x` (random, the expert has 8 times the policy's parameters),
`random_8x_sharp` (very certain). How to get SmolLM2: `benchmarks/pairs.py`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from benchmarks.calibration import Calibration, calibrate
from benchmarks.machine import (
    Machine,
    add_machine_options,
    machine_of,
    positive_int,
    report_progress,
)
from benchmarks.mixed_report import print_tables, report_rows
from benchmarks.pairs import (
    PAIRS,
    Pair,
    PairOptions,
    PairUnavailable,
    add_smollm2_option,
    build_pair,
)
from benchmarks.rounds import run_rounds
from benchmarks.samplers import (
    Algorithm1,
    EngineSampler,
    Floor,
    GenerateSampler,
    Naive,
    Sampler,
    SamplerRun,
    Workload,
)
from mentor_serve.engines import TorchEngine

SAMPLERS = ("lazy", "algorithm1", "naive", "policy_only", "hf_generate", "floor")
SAMPLES_PER_PROMPT = 4
"""Mixed rollouts of a prompt, as in the paper."""
MIN_ROLLOUTS = 2
"""Rollouts a round at least, in several batches if need be: one alone says little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure on each pair."""

    machine: Machine
    batches: tuple[int, ...]
    samplers: tuple[str, ...]
    new_tokens: int
    rounds: int


def measure_pair(pair: Pair, plan: Plan) -> dict[str, Any]:
    """Calibrate gamma, then run every batch size: {"pair": ..., "rows": [...]}."""
    max_tokens = max(map(len, pair.prompts)) + plan.new_tokens
    calibration = calibrate(
        pair.policy,
        pair.expert,
        pair.prompts,
        new_tokens=plan.new_tokens,
        temperature=pair.temperature,
        max_tokens=max_tokens,
    )
    summary = {
        "name": pair.name,
        "temperature": pair.temperature,
        "expert_params_ratio": round(pair.expert_params_ratio, 2),
        **{name: round(value, 4) for name, value in asdict(calibration).items()},
    }
    report_progress(json.dumps(summary))
    rows = []
    for batch in plan.batches:
        measured = measure_batch(pair, calibration, plan, batch=batch, max_tokens=max_tokens)
        report_progress("\n".join(map(json.dumps, measured)))
        rows += measured
    return {"pair": summary, "rows": rows}


def measure_batch(
    pair: Pair, calibration: Calibration, plan: Plan, *, batch: int, max_tokens: int
) -> list[dict[str, Any]]:
    """One row a sampler."""
    samplers = build_samplers(pair, plan.samplers, batch=batch, max_tokens=max_tokens)
    floor = samplers.get("floor")
    if isinstance(floor, Floor):
        best = floor.tune(workloads(pair, calibration, plan, batch=batch, seed=0)[0])
        report_progress(f"{pair.name} batch {batch}: the floor's expert reads {best} rows at once")
    timings = run_rounds(
        {
            name: partial(run_sampler, sampler, pair, calibration, plan, batch)
            for name, sampler in samplers.items()
        },
        rounds=plan.rounds,
        device=plan.machine.device,
        on_round=lambda number: report_progress(f"{pair.name} batch {batch} round {number}"),
    )
    return report_rows(pair, batch, timings)


def run_sampler(
    sampler: Sampler, pair: Pair, calibration: Calibration, plan: Plan, batch: int, seed: int
) -> SamplerRun:
    """One round of one sampler."""
    parts = workloads(pair, calibration, plan, batch=batch, seed=seed)
    return SamplerRun.joined([sampler.run(part) for part in parts])


def workloads(
    pair: Pair, calibration: Calibration, plan: Plan, *, batch: int, seed: int
) -> list[Workload]:
    """The batches of one round: one of `batch` rows, or several if that is few."""
    per_prompt = SAMPLES_PER_PROMPT if batch % SAMPLES_PER_PROMPT == 0 else 1
    num_prompts = batch // per_prompt
    num_batches = max(1, MIN_ROLLOUTS // batch)
    return [
        Workload(
            prompts=pair.prompts[i * num_prompts : (i + 1) * num_prompts],
            samples_per_prompt=per_prompt,
            new_tokens=plan.new_tokens,
            gamma=calibration.gamma,
            temperature=pair.temperature,
            seed=10_000 * seed + 100 * i,
        )
        for i in range(num_batches)
    ]


def num_prompts_for(batches: Sequence[int]) -> int:
    """Distinct prompts that `workloads` asks for at most; enough to calibrate on, too."""
    needed = (
        batch // SAMPLES_PER_PROMPT if batch % SAMPLES_PER_PROMPT == 0 else max(batch, MIN_ROLLOUTS)
        for batch in batches
    )
    return max(8, *needed)


def build_samplers(
    pair: Pair, names: Sequence[str], *, batch: int, max_tokens: int
) -> dict[str, Sampler]:
    """Samplers of `batch` slots each, in the order of `names`."""
    engine = TorchEngine(
        pair.policy, pair.expert, max_batch_size=batch, max_model_len=max_tokens, eos_token_ids=()
    )
    policy_only = EngineSampler(engine, mixed=False)
    models = (pair.policy, pair.expert)
    builders: dict[str, Callable[[], Sampler]] = {
        "lazy": lambda: EngineSampler(engine, mixed=True),
        "algorithm1": lambda: Algorithm1(*models, max_rows=batch, max_tokens=max_tokens),
        "naive": lambda: Naive(*models, max_rows=batch, max_tokens=max_tokens),
        "policy_only": lambda: policy_only,
        "hf_generate": lambda: GenerateSampler(pair.policy),
        "floor": lambda: Floor(policy_only, pair.expert, max_rows=batch, max_tokens=max_tokens),
    }
    return {name: builders[name]() for name in names}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pair", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--batch", nargs="+", type=positive_int, default=[1, 8, 32])
    parser.add_argument("--sampler", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    parser.add_argument(
        "--new-tokens", type=positive_int, default=128, help="tokens of every rollout"
    )
    parser.add_argument("--rounds", type=positive_int, default=5)
    add_smollm2_option(parser)
    add_machine_options(parser)
    return parser.parse_args()


def main() -> None:
    """Parse, measure, print."""
    arguments = _options()
    plan = Plan(
        machine=machine_of(arguments),
        batches=tuple(arguments.batch),
        samplers=tuple(arguments.sampler),
        new_tokens=arguments.new_tokens,
        rounds=arguments.rounds,
    )
    options = PairOptions(
        machine=plan.machine,
        num_prompts=num_prompts_for(plan.batches),
        smollm2=arguments.smollm2,
    )
    report: dict[str, Any] = {
        "rows": [],
        "pairs": [],
        "skipped": {},
        "new_tokens": plan.new_tokens,
        "rounds": plan.rounds,
        "machine": plan.machine.describe(),
    }
    for name in arguments.pair:
        try:
            pair = build_pair(name, options)
        except PairUnavailable as error:
            report_progress(f"{name}: skipped: {error}")
            report["skipped"][name] = str(error)
            continue
        measured = measure_pair(pair, plan)
        report["pairs"].append(measured["pair"])
        report["rows"] += measured["rows"]
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print_tables(report)


if __name__ == "__main__":
    main()
