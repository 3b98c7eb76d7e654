"""Trajectories: read what the policy writes, and see where the expert stepped in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import streamlit as st

from mentor_dashboard import charts, palette
from mentor_dashboard.shell import Run, live_page
from mentor_dashboard.source import read, settings
from mentor_dashboard.tokenizer import decoder
from mentor_dashboard.tokens import MAX_TOKENS, response_html, token_texts
from mentor_serve.store.stats import StatsReader, TrajectoryDetail
from mentor_serve.types import TokenSource, TrajectoryKind

Rows = Sequence[Mapping[str, Any]]

LIMITS = (50, 200, 1000)
OUTCOMES: dict[str, bool | None] = {"all": None, "correct": True, "wrong": False}
KIND_LABELS = {
    TrajectoryKind.ON_POLICY.value: "on-policy",
    TrajectoryKind.MIXED.value: "mixed",
    TrajectoryKind.EXPERT.value: "expert",
    TrajectoryKind.SERVED.value: "served",
}
_INTERVENTION_COLUMNS = (
    "position",
    "proposed_text",
    "chosen_text",
    "entropy",
    "weight",
    "policy_logprob",
    "expert_logprob",
)
CHOSEN = "trajectory"
"""Key of the chosen trajectory, in the session and in the page's address."""


def page() -> None:
    """Body of the page."""
    live_page(
        "Trajectories",
        _body,
        intro="The newest responses. Choose one to read it token by token.",
    )


def _body(run: Run) -> None:
    rows = read(StatsReader.trajectories, run["id"], **_filters())
    if rows:
        _table(rows)
    else:
        st.info("No trajectory fits these filters yet.", icon=":material/filter_alt:")
    chosen = st.session_state.get(CHOSEN) or st.query_params.get(CHOSEN)
    if chosen is None:
        st.caption("Choose a row to see its prompt, its tokens and what the expert changed.")
        return
    detail = read(StatsReader.trajectory, chosen)
    if detail is None:
        st.warning(
            f"Trajectory {chosen} is not in this database, or its tokens were pruned.",
            icon=":material/search_off:",
        )
        return
    _detail(detail)


def _filters() -> dict[str, Any]:
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        kind = st.segmented_control(
            "Kind", list(KIND_LABELS), format_func=KIND_LABELS.__getitem__, key="kind"
        )
        outcome = st.segmented_control(
            "Answer", list(OUTCOMES), default="all", key="outcome", required=True
        )
        limit = st.segmented_control(
            "Newest", LIMITS, default=LIMITS[0], key="limit", required=True
        )
        replaced = st.toggle("Only with replaced tokens", key="replaced")
    return {
        "kind": TrajectoryKind(kind) if kind else None,
        "is_passed": OUTCOMES[outcome or "all"],
        "min_interventions": 1 if replaced else 0,
        "limit": limit or LIMITS[0],
    }


def _table(rows: Rows) -> None:
    ids = [row["id"] for row in rows]
    frame = pd.DataFrame(
        {
            "time (UTC)": [row["created_at"] for row in rows],
            "kind": [KIND_LABELS[row["kind"]] for row in rows],
            "version": [row["min_policy_version"] for row in rows],
            "reward": [row["reward"] for row in rows],
            "tokens": [row["num_tokens"] for row in rows],
            "gated": [row["num_gated"] for row in rows],
            "replaced": [row["num_interventions"] for row in rows],
            "entropy": [row["mean_entropy"] for row in rows],
            "ended": [row["stop_reason"] or row["status"] for row in rows],
            "response": [row["text"] or "" for row in rows],
            "prompt": [row["prompt"] or "" for row in rows],
        }
    )
    # A new key for each new list: row numbers of an older list must not select in this one.
    key = f"table-{ids[0]}-{len(ids)}"

    def choose() -> None:
        selected = st.session_state[key]["selection"]["rows"]
        if selected:
            st.session_state[CHOSEN] = ids[selected[0]]
            st.query_params[CHOSEN] = ids[selected[0]]

    st.dataframe(
        frame,
        key=key,
        hide_index=True,
        height=300,
        on_select=choose,
        selection_mode="single-row",
        column_config={
            "time (UTC)": st.column_config.DatetimeColumn(format="MMM D, HH:mm:ss", timezone="UTC"),
            "reward": st.column_config.ProgressColumn(
                format="%.2f", min_value=0.0, max_value=1.0, width="small"
            ),
            "entropy": st.column_config.NumberColumn("entropy (nats)", format="%.2f"),
            "prompt": st.column_config.TextColumn(width="medium"),
            "response": st.column_config.TextColumn(width="large"),
        },
    )


def _detail(trajectory: TrajectoryDetail) -> None:
    st.divider()
    row = trajectory.row
    st.subheader(_headline(row), anchor=False)
    st.caption(_facts(trajectory))
    if trajectory.prompt:
        with st.expander("Prompt and reference answer", expanded=True):
            st.text(trajectory.prompt)
            st.text(f"Reference answer: {trajectory.answer}")
    if row["status"] != "ok":
        st.error(f"This rollout failed: {row['error']}", icon=":material/error:")
    if len(trajectory.token_ids) == 0:
        return
    decode, problem = decoder(settings().policy.model)
    if decode is None:
        st.info(
            f"Token ids instead of text: the policy's tokenizer cannot be loaded here ({problem}).",
            icon=":material/translate:",
        )
    shown = trajectory.token_ids[:MAX_TOKENS]
    texts = token_texts(shown.tolist(), decode=decode)
    proposals = st.toggle("Show what the policy had proposed", value=True, key="proposals")
    with st.container(border=True):
        st.html(response_html(trajectory, texts=texts, show_proposals=proposals))
    if len(shown) < len(trajectory.token_ids):
        st.caption(f"Cut after {MAX_TOKENS:,} of {len(trajectory.token_ids):,} tokens.")
    chart = charts.token_entropies(_token_rows(trajectory, texts), gamma=row["gamma"])
    if chart is not None:
        st.altair_chart(chart, width="stretch")
    _interventions(trajectory.interventions)


def _headline(row: Mapping[str, Any]) -> str:
    kind = KIND_LABELS[row["kind"]]
    if row["accuracy"] is None:
        return f"{kind} response, not scored".capitalize()
    outcome = "correct" if row["accuracy"] >= 1 else "wrong"
    return f"{kind} response, {outcome} (reward {row['reward']:.2f})".capitalize()


def _facts(trajectory: TrajectoryDetail) -> str:
    row = trajectory.row
    low, high = row["min_policy_version"], row["max_policy_version"]
    facts = [
        f"policy version {low}" if low == high else f"policy versions {low} to {high}",
        f"{row['num_tokens']} tokens",
        f"{row['num_gated']} gated",
        f"{row['num_interventions']} replaced",
        f"ended by {row['stop_reason']}",
    ]
    if row["gamma"] is not None:
        facts.append(f"gamma {row['gamma']:.3g} nats, alpha {row['alpha']:.2f}")
    if row["group_status"] is not None:
        used = row["consumed_by_step"]
        facts.append(
            f"trained on in step {used}" if used is not None else f"group {row['group_status']}"
        )
    if row["expert_lost"]:
        facts.append("the expert was unavailable for a part of it")
    return " | ".join([*facts, str(trajectory.source or ""), f"id {row['id']}"])


def _token_rows(trajectory: TrajectoryDetail, texts: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "position": position,
            "token": repr(text),
            "entropy": float(trajectory.entropies[position]),
            "weight": float(trajectory.weights[position]),
            "source": palette.SOURCE_LABELS[TokenSource(int(trajectory.sources[position]))],
        }
        for position, text in enumerate(texts)
    ]


def _interventions(interventions: Rows) -> None:
    if not interventions:
        return
    frame = pd.DataFrame(
        [{name: row[name] for name in _INTERVENTION_COLUMNS} for row in interventions]
    )
    for name in ("proposed_text", "chosen_text"):
        frame[name] = [repr(text) for text in frame[name]]
    st.dataframe(
        frame,
        hide_index=True,
        column_config={
            "proposed_text": st.column_config.TextColumn("the policy proposed"),
            "chosen_text": st.column_config.TextColumn("the expert chose"),
            "entropy": st.column_config.NumberColumn("entropy (nats)", format="%.2f"),
            "weight": st.column_config.NumberColumn(format="%.2f"),
            "policy_logprob": st.column_config.NumberColumn(
                "log-prob of the proposal, policy", format="%.2f"
            ),
            "expert_logprob": st.column_config.NumberColumn(
                "log-prob of the proposal, expert", format="%.2f"
            ),
        },
    )
