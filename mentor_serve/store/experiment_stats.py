"""Reads that lay several runs side by side: their curves, and what was last measured of each.

The same rules as in `stats`: bounded queries, plain dicts, nothing written. Every method takes the
ids of at most `MAX_RUNS` runs; ids that the database does not know have no rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import and_, func, or_, select

from mentor_serve.store.aggregates import Row
from mentor_serve.store.evaluations import POLICY
from mentor_serve.store.models import Evaluation, PolicyVersion, Run, Update
from mentor_serve.store.stats import StatsReader

MAX_RUNS = 100
"""Runs of one query: a comparison of four methods with all its variants has about ninety."""
CURVE_POINTS = 120
"""Points of a run's curve; means over more of them, so that a long run is also smooth."""
CURVE = ("entropy", "mean_response_tokens", "mean_reward_on_policy", "step_time_s", "wait_time_s")
"""Columns of `updates` that are compared."""
GREEDY = "greedy_pass_at_k"
"""`evaluations.metric` of a single greedy response (k = 1)."""
SOLVED = (GREEDY, "avg_at_k", "pass_at_k")
WORD_SHARES = ("word_share:", "greedy_word_share:")
"""What the metric of a word begins with: sampled, greedy."""
MAX_EVALUATION_ROWS = 20_000


class ExperimentReader(StatsReader):
    """`StatsReader` with queries over several runs."""

    def methods(self, run_ids: Sequence[str]) -> dict[str, str]:
        """`guidance.method` by run id, of the runs whose settings name it."""
        query = select(Run.id, Run.config_json).where(Run.id.in_(_bounded(run_ids)))
        found = {}
        for row in self._rows(query):
            guidance = row["config_json"].get("guidance")
            if isinstance(guidance, dict) and isinstance(guidance.get("method"), str):
                found[row["id"]] = guidance["method"]
        return found

    def update_curves(self, run_ids: Sequence[str], *, max_points: int = CURVE_POINTS) -> list[Row]:
        """The updates of the runs, by run and step: run_id, step and the columns of `CURVE`.

        Where a run went beyond `max_points` updates, a row is the mean of a bucket of them. Buckets
        are the same for all runs, and so is the `step` that a bucket goes by: its highest.
        """
        chosen = Update.run_id.in_(_bounded(run_ids))
        bucket = self._bucket(Update.step, chosen, max_points=max_points)
        query = (
            select(
                Update.run_id,
                bucket.label("bucket"),
                func.max(Update.step).label("step"),
                *(func.avg(getattr(Update, name)).label(name) for name in CURVE),
            )
            .where(chosen)
            .group_by(Update.run_id, "bucket")
            .order_by(Update.run_id, "bucket")
        )
        rows = self._rows(query)
        ends: dict[int, int] = {}
        for row in rows:
            ends[row["bucket"]] = max(row["step"], ends.get(row["bucket"], 0))
        return [
            {name: value for name, value in row.items() if name != "bucket"}
            | {"step": ends[row["bucket"]]}
            for row in rows
        ]

    def greedy_curves(
        self, run_ids: Sequence[str], *, limit: int = MAX_EVALUATION_ROWS
    ) -> list[Row]:
        """Greedy accuracy of the runs' versions: run_id, suite, step, value; by suite, run, step.

        `step` is how many updates the version had seen. Of several evaluations of a version the
        newest counts. Beyond `limit` rows the oldest are left out.
        """
        e, version = Evaluation, PolicyVersion
        query = (
            select(
                e.run_id,
                e.suite,
                func.coalesce(version.step, e.policy_version).label("step"),
                e.value,
            )
            .join(
                version,
                and_(version.run_id == e.run_id, version.version == e.policy_version),
                isouter=True,
            )
            .where(
                e.run_id.in_(_bounded(run_ids)),
                e.metric == GREEDY,
                e.k == 1,
                e.policy_version.is_not(None),
                e.value.is_not(None),
            )
            .order_by(e.id.desc())
            .limit(limit)
        )
        newest = {
            (row["suite"], row["run_id"], row["step"]): row for row in reversed(self._rows(query))
        }
        return [newest[key] for key in sorted(newest)]

    def final_measures(
        self, run_ids: Sequence[str], *, limit: int = MAX_EVALUATION_ROWS
    ) -> list[Row]:
        """How often problems are solved and words said, of what each run came to.

        One row for each run, suite, metric and k, of the highest policy version for which the run
        has that metric: run_id, suite, metric, k, value, num_problems, num_samples, temperature,
        policy_version. A run that never evaluated a version of its policy (the base model, the
        expert) shows the model that it evaluated last. Beyond `limit` rows the oldest are left out.
        """
        e = Evaluation
        chosen = and_(
            e.run_id.in_(_bounded(run_ids)),
            or_(
                e.metric.in_(SOLVED),
                *(e.metric.startswith(prefix, autoescape=True) for prefix in WORD_SHARES),
            ),
        )
        # Its columns are an index: the rows themselves are read for one version alone.
        newest = (
            select(e.run_id, e.suite, e.metric, func.max(e.policy_version).label("policy_version"))
            .where(chosen)
            .group_by(e.run_id, e.suite, e.metric)
            .subquery()
        )
        query = (
            select(
                e.run_id,
                e.suite,
                e.metric,
                e.k,
                e.value,
                e.num_problems,
                e.num_samples,
                e.temperature,
                e.policy_version,
                e.model,
            )
            .join(
                newest,
                and_(
                    e.run_id == newest.c.run_id,
                    e.suite == newest.c.suite,
                    e.metric == newest.c.metric,
                    e.policy_version.is_not_distinct_from(newest.c.policy_version),
                ),
            )
            .where(e.value.is_not(None))
            .order_by(e.id.desc())
            .limit(limit)
        )
        return _of_one_model(self._rows(query)[::-1])


def _bounded(run_ids: Sequence[str]) -> list[str]:
    if len(run_ids) > MAX_RUNS:
        raise ValueError(f"expected at most {MAX_RUNS} runs, got {len(run_ids)}")
    return list(run_ids)


def _of_one_model(rows: Sequence[Row]) -> list[Row]:
    """Rows, oldest first, without those of other models than the run's own, and of older
    evaluations of the same numbers.
    """
    models: dict[str, str] = {}
    for row in rows:
        if models.get(row["run_id"]) != POLICY:
            models[row["run_id"]] = row["model"]
    newest = {
        (row["run_id"], row["suite"], row["metric"], row["k"] or 0): row
        for row in rows
        if row["model"] == models[row["run_id"]]
    }
    return [
        {name: value for name, value in newest[key].items() if name != "model"}
        for key in sorted(newest)
    ]
