"""What was measured of mixed samplers, as JSON rows and as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.pairs import Pair
from benchmarks.rounds import Timings
from benchmarks.samplers import SamplerRun


def report_rows(
    pair: Pair, batch: int, timings: dict[str, Timings[SamplerRun]]
) -> list[dict[str, Any]]:
    """JSON rows; a ratio is null where its other sampler did not run."""
    medians = {name: timing.median_rate(_num_tokens) for name, timing in timings.items()}
    rows = []
    for name, timing in timings.items():
        runs, rates = timing.results, timing.rates(_num_tokens)
        num_tokens = sum(run.num_tokens for run in runs)
        rows.append(
            {
                "pair": pair.name,
                "batch": batch,
                "sampler": name,
                "tokens_per_s": round(medians[name], 1),
                "tokens_per_s_lowest": round(min(rates), 1),
                "tokens_per_s_highest": round(max(rates), 1),
                "expert_calls_per_token": _per_token(runs, "expert_calls", num_tokens),
                "expert_tokens_per_token": _per_token(runs, "expert_tokens", num_tokens),
                "rolled_back_per_token": _per_token(runs, "rolled_back", num_tokens),
                "mean_weight": round(sum(run.mean_weight for run in runs) / len(runs), 4),
                "expert_params_ratio": round(pair.expert_params_ratio, 2),
                "ratio_to_floor": _ratio(medians, name, "floor"),
                "ratio_to_policy_only": _ratio(medians, name, "policy_only"),
                "ratio_to_algorithm1": _ratio(medians, name, "algorithm1"),
            }
        )
    return rows


def print_tables(report: dict[str, Any]) -> None:
    """The same for people, one table a pair."""
    console = Console()
    # Piped output has no width of its own; cut-off numbers help nobody.
    console.width = max(console.width, 140)
    console.print(report["machine"])
    for pair in report["pairs"]:
        table = Table(
            title=f"{pair['name']}: mean weight {pair['mean_weight']:.2f}, TV "
            f"{pair['total_variation']:.2f}, expert {pair['expert_params_ratio']} x the policy"
        )
        columns = {
            "batch": "batch",
            "sampler": "sampler",
            "tokens_per_s": "tokens/s",
            "ratio_to_floor": "x floor",
            "ratio_to_policy_only": "x policy only",
            "ratio_to_algorithm1": "x algorithm 1",
            "expert_calls_per_token": "calls/token",
            "expert_tokens_per_token": "read/token",
            "rolled_back_per_token": "rolled back/token",
        }
        for title in columns.values():
            table.add_column(title, justify="left" if title == "sampler" else "right")
        for row in report["rows"]:
            if row["pair"] == pair["name"]:
                table.add_row(*("-" if row[key] is None else str(row[key]) for key in columns))
        console.print(table)


def _num_tokens(run: SamplerRun) -> int:
    return run.num_tokens


def _per_token(runs: Sequence[SamplerRun], counter: str, num_tokens: int) -> float:
    total: int = sum(getattr(run, counter) for run in runs)
    return round(total / num_tokens, 4)


def _ratio(medians: dict[str, float], name: str, other: str) -> float | None:
    return round(medians[name] / medians[other], 3) if other in medians else None
