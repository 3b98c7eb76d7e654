"""The views that users query: one text for SQLite and PostgreSQL wherever one will do.

A text that has to differ is a mapping from dialect name to text; its columns are the same on both.

Migrations import these texts, so a published text is history: never edit one. To change a view,
add a `VIEWS_<revision>` with the new text, point `VIEWS` at the result, and let a new migration
drop and create it. A test pins the checksum of each published set.

Divisions are CAST to DOUBLE PRECISION: SQLite would divide integers, PostgreSQL would answer with
decimals that clients show as strings.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

ViewText = str | Mapping[str, str]
"""SQL of one view, or dialect name to SQL."""

_TRAINING_CURVE_0001 = """
SELECT
    u.run_id,
    r.name AS run_name,
    u.step,
    u.policy_version,
    u.created_at,
    u.mean_reward_on_policy,
    u.mean_reward_mixed,
    u.mean_accuracy_on_policy,
    u.mean_accuracy_mixed,
    u.frac_reward_zero_std,
    u.loss,
    u.grad_norm,
    u.entropy,
    u.clip_fraction_low,
    u.clip_fraction_high,
    u.mismatch_kl,
    u.learning_rate,
    u.alpha,
    u.gamma,
    u.mean_weight,
    u.gated_share,
    u.intervention_rate,
    u.mean_response_tokens,
    u.truncated_share,
    u.staleness_mean,
    u.staleness_max,
    u.num_stale,
    u.num_groups,
    u.num_trajectories,
    u.num_tokens,
    u.step_time_s,
    u.wait_time_s
FROM updates u
JOIN runs r ON r.id = u.run_id
"""

_INTERVENTION_RATE_0001 = """
SELECT
    t.run_id,
    t.min_policy_version AS policy_version,
    COUNT(*) AS num_trajectories,
    CAST(SUM(t.num_tokens) AS BIGINT) AS num_tokens,
    CAST(SUM(t.num_gated) AS BIGINT) AS num_gated,
    CAST(SUM(t.num_interventions) AS BIGINT) AS num_interventions,
    CAST(SUM(t.num_gated) AS DOUBLE PRECISION) / NULLIF(SUM(t.num_tokens), 0) AS gated_share,
    CAST(SUM(t.num_interventions) AS DOUBLE PRECISION) / NULLIF(SUM(t.num_tokens), 0)
        AS intervention_rate,
    CAST(SUM(t.mean_weight * t.num_tokens) AS DOUBLE PRECISION) / NULLIF(SUM(t.num_tokens), 0)
        AS mean_weight,
    CAST(SUM(t.mean_entropy * t.num_tokens) AS DOUBLE PRECISION) / NULLIF(SUM(t.num_tokens), 0)
        AS mean_entropy
FROM trajectories t
WHERE t.kind = 'mixed' AND t.status = 'ok'
GROUP BY t.run_id, t.min_policy_version
"""

_INTERVENTION_TOKENS_0001 = """
SELECT
    t.run_id,
    i.proposed_token_id,
    i.proposed_text,
    i.chosen_token_id,
    i.chosen_text,
    COUNT(*) AS num_interventions,
    CAST(AVG(i.entropy) AS DOUBLE PRECISION) AS mean_entropy,
    CAST(AVG(i.weight) AS DOUBLE PRECISION) AS mean_weight
FROM interventions i
JOIN trajectories t ON t.id = i.trajectory_id
GROUP BY t.run_id, i.proposed_token_id, i.proposed_text, i.chosen_token_id, i.chosen_text
"""

_PASSED_0001 = """
SELECT
    t.run_id,
    t.min_policy_version AS policy_version,
    COUNT(*) AS num_trajectories,
    CAST(SUM(CASE WHEN t.accuracy >= 1 THEN 1 ELSE 0 END) AS BIGINT) AS num_passed,
    CAST(SUM(CASE WHEN t.accuracy >= 1 THEN 1 ELSE 0 END) AS DOUBLE PRECISION) / COUNT(*)
        AS pass_rate,
    CAST(AVG(t.accuracy) AS DOUBLE PRECISION) AS mean_accuracy,
    CAST(AVG(t.reward) AS DOUBLE PRECISION) AS mean_reward,
    CAST(AVG(t.num_tokens) AS DOUBLE PRECISION) AS mean_response_tokens
FROM trajectories t
WHERE t.kind = 'on_policy' AND t.status = 'ok' AND t.accuracy IS NOT NULL
GROUP BY t.run_id, t.min_policy_version
"""

# Staleness is counted from the version that the update started from, so that data sampled by that
# very version counts 0.
_STALENESS_0001 = """
SELECT
    s.run_id,
    s.step,
    s.policy_version,
    s.staleness,
    COUNT(*) AS num_groups
FROM (
    SELECT
        u.run_id,
        u.step,
        u.policy_version,
        COALESCE(v.parent_version, u.policy_version - 1) - g.min_policy_version AS staleness
    FROM updates u
    JOIN rollout_groups g ON g.run_id = u.run_id AND g.consumed_by_step = u.step
    LEFT JOIN policy_versions v ON v.run_id = u.run_id AND v.version = u.policy_version
) s
GROUP BY s.run_id, s.step, s.policy_version, s.staleness
"""

VIEWS_0001: Mapping[str, ViewText] = MappingProxyType(
    {
        "v_training_curve": _TRAINING_CURVE_0001,
        "v_intervention_rate": _INTERVENTION_RATE_0001,
        "v_intervention_tokens": _INTERVENTION_TOKENS_0001,
        "v_pass_rate": _PASSED_0001,
        "v_staleness": _STALENESS_0001,
    }
)
"""Name to text, as the first migration created them."""

_TRAINING_CURVE_0002 = _TRAINING_CURVE_0001.replace(
    "    u.learning_rate,\n",
    """\
    u.effective_sample_share,
    u.truncated_weight_share,
    u.num_trained_tokens,
    u.num_skipped_steps,
    u.token_staleness_mean,
    u.num_silent_groups,
    u.num_left_out,
    u.learning_rate,
""",
)

VIEWS_0002: Mapping[str, ViewText] = MappingProxyType(
    {**VIEWS_0001, "v_training_curve": _TRAINING_CURVE_0002}
)
"""With the columns of `updates` that revision 0002 added."""

_GUIDANCE_METHODS_0003 = """
SELECT
    g.run_id,
    g.method,
    COUNT(*) AS num_groups,
    CAST(COUNT(*) AS DOUBLE PRECISION)
        / CAST(SUM(COUNT(*)) OVER (PARTITION BY g.run_id) AS DOUBLE PRECISION) AS group_share,
    CAST(SUM(CASE WHEN g.num_mixed > 0 THEN 1 ELSE 0 END) AS BIGINT) AS num_with_mixed,
    CAST(SUM(CASE WHEN g.num_expert > 0 THEN 1 ELSE 0 END) AS BIGINT) AS num_with_expert,
    CAST(SUM(CASE WHEN g.num_hint_tokens > 0 THEN 1 ELSE 0 END) AS BIGINT) AS num_with_hint,
    CAST(AVG(g.num_hint_tokens) AS DOUBLE PRECISION) AS mean_hint_tokens
FROM rollout_groups g
WHERE g.status <> 'failed'
GROUP BY g.run_id, g.method
"""

VIEWS_0003: Mapping[str, ViewText] = MappingProxyType(
    {**VIEWS_0002, "v_guidance_methods": _GUIDANCE_METHODS_0003}
)
"""With the methods that revision 0003 added to `rollout_groups`."""

_INTERVENTION_RATE_0005 = """
SELECT
    s.run_id,
    s.policy_version,
    s.num_trajectories,
    s.num_tokens,
    s.num_gated,
    s.num_interventions,
    CAST(s.num_gated AS DOUBLE PRECISION) / NULLIF(s.num_tokens, 0) AS gated_share,
    CAST(s.num_interventions AS DOUBLE PRECISION) / NULLIF(s.num_tokens, 0) AS intervention_rate,
    s.weight_sum / NULLIF(s.num_tokens, 0) AS mean_weight,
    s.entropy_sum / NULLIF(s.num_entropy_tokens, 0) AS mean_entropy
FROM version_stats s
WHERE s.kind = 'mixed'
"""

_PASSED_0005 = """
SELECT
    s.run_id,
    s.policy_version,
    s.num_scored AS num_trajectories,
    s.num_passed,
    CAST(s.num_passed AS DOUBLE PRECISION) / s.num_scored AS pass_rate,
    s.accuracy_sum / s.num_scored AS mean_accuracy,
    s.reward_sum / s.num_scored AS mean_reward,
    CAST(s.num_scored_tokens AS DOUBLE PRECISION) / s.num_scored AS mean_response_tokens
FROM version_stats s
WHERE s.kind = 'on_policy' AND s.num_scored > 0
"""

_THROUGHPUT_0005 = """
SELECT
    g.run_id,
    {hour} AS hour,
    COUNT(*) AS num_groups,
    CAST(SUM(g.num_on_policy + g.num_mixed + g.num_expert) AS BIGINT) AS num_trajectories,
    CAST(SUM(g.num_tokens) AS BIGINT) AS num_tokens
FROM rollout_groups g
GROUP BY g.run_id, {hour}
"""

# A time like every other one: text of the same form in SQLite, an instant in PostgreSQL.
_HOUR_0005 = {
    "sqlite": "STRFTIME('%Y-%m-%dT%H:00:00.000000Z', g.created_at)",
    "postgresql": "DATE_TRUNC('hour', g.created_at, 'UTC')",
}

VIEWS_0005: Mapping[str, ViewText] = MappingProxyType(
    {
        **VIEWS_0003,
        "v_intervention_rate": _INTERVENTION_RATE_0005,
        "v_pass_rate": _PASSED_0005,
        "v_throughput": MappingProxyType(
            {name: _THROUGHPUT_0005.format(hour=hour) for name, hour in _HOUR_0005.items()}
        ),
    }
)
"""Curves over versions read the running sums of revision 0005, throughput its tokens of groups."""

VIEWS: Mapping[str, ViewText] = VIEWS_0005
"""Name to text at the newest revision."""


def create_statement(
    name: str, *, views: Mapping[str, ViewText] = VIEWS, dialect: str | None = None
) -> str:
    """The CREATE VIEW statement of `name`.

    Raises:
        KeyError: there is no such view.
        ValueError: its text depends on the database, and `dialect` is neither of the two.
    """
    text = views[name]
    if not isinstance(text, str):
        if dialect is None or dialect not in text:
            raise ValueError(
                f"expected one of {', '.join(text)} as dialect of view {name}, got {dialect!r}"
            )
        text = text[dialect]
    return f"CREATE VIEW {name} AS {text.strip()}"


def drop_statement(name: str) -> str:
    """The DROP VIEW statement of `name`."""
    return f"DROP VIEW {name}"
