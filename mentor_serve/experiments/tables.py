"""The tables of a comparison in Markdown, from its results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mentor_serve.experiments.arms import MENTOR
from mentor_serve.experiments.names import ABLATION_LABELS, METHOD_LABELS
from mentor_serve.experiments.presets import IN_DOMAIN
from mentor_serve.experiments.results import GREEDY

_LABELS = METHOD_LABELS | ABLATION_LABELS
_SHOWN_WORDS = ("verify", "check", "okay", "wait")


def label_of(arm: str) -> str:
    """An arm's name for people."""
    return _LABELS[arm]


def arms_in_order(names: Sequence[str]) -> list[str]:
    """Base, the methods as the paper has them, then the expert."""
    return [name for name in _LABELS if name in names and name != "expert"] + [
        name for name in ("expert",) if name in names
    ]


def all_tables(results: dict[str, Any]) -> dict[str, str]:
    """Every table by its name."""
    tables = {
        "accuracy-greedy": _accuracy(results, GREEDY),
        "accuracy-avg": _accuracy(results, _sampled(results, "avg@")),
        "accuracy-pass": _accuracy(results, _sampled(results, "pass@")),
        "pass-at-k": _pass_at_k(results),
        "paired": _paired(results),
        "behaviour": _behaviour(results),
        "words": _words(results),
        "costs": _costs(results),
        "sweep": _sweep(results),
        "ablations": _ablations(results),
    }
    return {name: table for name, table in tables.items() if table}


def _sampled(results: dict[str, Any], prefix: str) -> str:
    """The measure of that kind with the largest k."""
    names: dict[str, Any] = next(iter(results["accuracy"][IN_DOMAIN.name].values()))
    found = [name for name in names if name.startswith(prefix) and name != GREEDY]
    return max(found, key=lambda name: int(name.removeprefix(prefix)))


def _accuracy(results: dict[str, Any], measure: str) -> str:
    suites = list(results["accuracy"])
    arms = arms_in_order(list(results["accuracy"][suites[0]]))
    rows = [
        [label_of(arm), *(_percent(results["accuracy"][suite][arm][measure]) for suite in suites)]
        for arm in arms
    ]
    return _table([measure, *(results["suites"][suite] for suite in suites)], rows)


def _pass_at_k(results: dict[str, Any]) -> str:
    in_domain = results["accuracy"][IN_DOMAIN.name]
    names = [name for name in next(iter(in_domain.values())) if name.startswith("pass@")]
    names.remove(GREEDY)
    rows = [
        [label_of(arm), *(_percent(in_domain[arm][name]) for name in names)]
        for arm in arms_in_order(list(in_domain))
    ]
    return _table(["in domain", *names], rows)


def _paired(results: dict[str, Any]) -> str:
    rows = [
        [
            results["suites"][row["suite"]],
            row["measure"],
            label_of(row["baseline"]),
            _points(row["difference"]),
            _p_value(row["p_value"]),
            "yes" if row["intervals_overlap"] else "no",
        ]
        for row in results["paired"]
    ]
    header = ["suite", "measure", "MENTOR minus", "points", "p", "95 % intervals overlap"]
    return _table(header, rows)


def _behaviour(results: dict[str, Any]) -> str:
    rows = []
    for arm in arms_in_order(list(results["behaviour"])):
        behaviour = results["behaviour"][arm]
        rows.append(
            [
                label_of(arm),
                _number(behaviour["mean_entropy"], 3),
                _number(behaviour["mean_tokens"], 1),
                *(_percent(behaviour[f"word_share:{word}"]) for word in _SHOWN_WORDS),
            ]
        )
    return _table(["", "entropy (nats)", "tokens", *_SHOWN_WORDS], rows)


def _words(results: dict[str, Any]) -> str:
    words = [
        word for word in _SHOWN_WORDS if any(word in of_arm for of_arm in results["words"].values())
    ]
    if not words:
        return ""
    nothing = {"value": 0.0, "low": 0.0, "high": 0.0}
    rows = []
    for arm in arms_in_order(list(results["words"])):
        of_arm = results["words"][arm]
        cells = [label_of(arm)]
        for word in words:
            both = of_arm.get(word, {"first": nothing, "last": nothing})
            cells.append(f"{100 * both['first']['value']:.1f} -> {_percent(both['last'])}")
        rows.append(cells)
    return _table(["first -> last updates", *words], rows)


def _costs(results: dict[str, Any]) -> str:
    thresholds = list(next(iter(results["costs"].values()))["seconds_to_validation"])
    rows = []
    for arm in arms_in_order(list(results["costs"])):
        costs = results["costs"][arm]
        rows.append(
            [
                label_of(arm),
                _number(costs["rollouts_per_s"], 0),
                _number(costs["expert_tokens_per_token"], 2),
                _number(costs["mean_weight"], 2),
                _number(costs["gated_share"], 2),
                _number(costs["collect_s"], 2),
                _number(costs["update_s"], 2),
                *(_seconds(costs["seconds_to_validation"][one]) for one in thresholds),
            ]
        )
    header = ["", "rollouts/s", "expert tokens a token", "mean w", "gated"]
    header += ["collecting, s", "update, s"]
    header += [f"s to {float(one):.0%}" for one in thresholds]
    return _table(header, rows)


def _sweep(results: dict[str, Any]) -> str:
    rates = sorted({row["learning_rate"] for row in results["sweep"]})
    if not rates:
        return ""
    rows = []
    for method in arms_in_order([row["method"] for row in results["sweep"]]):
        cells = []
        for rate in rates:
            found = [
                row["validation"]
                for row in results["sweep"]
                if (row["method"], row["learning_rate"]) == (method, rate)
            ]
            mean = f"{100 * sum(found) / len(found):.1f}" if found else "-"
            is_best = results["learning_rates"][method] == rate
            cells.append(f"**{mean}**" if is_best else mean)
        rows.append([label_of(method), *cells])
    return _table(["", *(f"{rate:g}" for rate in rates)], rows)


def _ablations(results: dict[str, Any]) -> str:
    rows = []
    for arm in arms_in_order(list(results["ablations"])):
        row = results["ablations"][arm]
        names = list(row["difference"])
        is_reference = arm == MENTOR.name
        rows.append(
            [
                label_of(arm),
                *(
                    _percent(row["accuracy"][name])
                    + ("" if is_reference else f" ({row['difference'][name]['p_value'] or 1:.2f})")
                    for name in names
                ),
                _number(row["entropy_at_end"], 3),
                _number(row["mean_weight"], 2),
                _number(row["gated_share"], 2),
                _number(row["intervention_rate"], 3),
                _number(row["expert_tokens_per_token"], 2),
            ]
        )
    if len(rows) < 2:
        return ""
    measures = [f"{name} (p)" for name in next(iter(results["ablations"].values()))["difference"]]
    header = ["", *measures, "entropy at the end", "mean w", "gated", "replaced"]
    header.append("expert tokens a token")
    return _table(header, rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(estimate: dict[str, Any]) -> str:
    low, high = 100 * estimate["low"], 100 * estimate["high"]
    return f"{100 * estimate['value']:.1f} [{low:.1f}, {high:.1f}]"


def _points(estimate: dict[str, Any]) -> str:
    low, high = 100 * estimate["low"], 100 * estimate["high"]
    return f"{100 * estimate['value']:+.1f} [{low:+.1f}, {high:+.1f}]"


def _number(estimate: dict[str, Any] | None, digits: int) -> str:
    if estimate is None:
        return "-"
    low, high = estimate["low"], estimate["high"]
    return f"{estimate['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _p_value(value: float | None) -> str:
    if value is None:
        return "-"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _seconds(values: Sequence[float | None]) -> str:
    """Median of the runs that got there, and how many did."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return "never"
    median = known[len(known) // 2] if len(known) % 2 else sum(known[len(known) // 2 - 1 :][:2]) / 2
    return f"{median:.0f}" + ("" if len(known) == len(values) else f" ({len(known)}/{len(values)})")
