"""One response as HTML, token by token, coloured by who decided each token.

Everything that came from a model is escaped. Meaning never rests on colour alone: a gated token
that was kept is underlined with dots, a replaced one is bold beside the struck-out proposal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from math import isnan
from typing import Any

from mentor_dashboard import palette
from mentor_serve.store.stats import TrajectoryDetail
from mentor_serve.types import TokenSource

MAX_TOKENS = 4_000
"""Tokens drawn of one response; more would stall the browser."""

Decode = Callable[[Sequence[int]], str]

STYLE = f"""<style>
.mentor-text {{ font-family: "Source Code Pro", ui-monospace, monospace; font-size: 0.95rem;
  line-height: 2.0; white-space: pre-wrap; overflow-wrap: anywhere; }}
.mentor-text span, .mentor-legend span {{ border-radius: 3px; padding: 1px 0; cursor: help; }}
.mentor-text span:hover {{ outline: 1px solid {palette.NEUTRAL}; }}
.mentor-kept {{ background: {palette.GATE}40; border-bottom: 2px dotted {palette.GATE}; }}
.mentor-expert {{ background: {palette.EXPERT}55; border-bottom: 2px solid {palette.EXPERT};
  font-weight: 700; }}
.mentor-text del {{ opacity: 0.6; font-size: 0.8em; padding-right: 2px; }}
.mentor-mark {{ opacity: 0.45; }}
.mentor-legend {{ font-size: 0.875rem; margin-bottom: 0.4rem; }}
.mentor-legend span {{ padding: 1px 6px; margin-right: 1.1rem; cursor: default; }}
</style>"""

_CLASSES = {
    TokenSource.POLICY: "mentor-policy",
    TokenSource.GATED_KEPT: "mentor-kept",
    TokenSource.EXPERT: "mentor-expert",
}


def token_texts(token_ids: Sequence[int], *, decode: Decode | None) -> list[str]:
    """The text that each token adds to the response; `[id]` without a tokenizer.

    Decoding one id alone would lose spaces and split characters, so each text is the difference of
    two decodings of a growing window. A token that only begins a character adds nothing; the one
    that completes it adds the character.
    """
    if decode is None:
        return [f"[{token_id}] " for token_id in token_ids]
    texts: list[str] = []
    start = read = 0
    for end in range(1, len(token_ids) + 1):
        before = decode(token_ids[start:read])
        after = decode(token_ids[start:end])
        if after.endswith("\ufffd") and end < len(token_ids):
            texts.append("")
            continue
        texts.append(after[len(before) :])
        start, read = read, end
    return texts


def response_html(
    trajectory: TrajectoryDetail, *, texts: Sequence[str], show_proposals: bool = True
) -> str:
    """Legend and response. `texts` has one entry per token."""
    proposals = {row["position"]: row for row in trajectory.interventions}
    spans = [
        _token(trajectory, position, text, proposals.get(position), show_proposals)
        for position, text in enumerate(texts[:MAX_TOKENS])
    ]
    return f'{STYLE}{_legend()}<div class="mentor-text">{"".join(spans)}</div>'


def _legend() -> str:
    entries = "".join(
        f'<span class="{_CLASSES[source]}">{palette.SOURCE_LABELS[source]}</span>'
        for source in TokenSource
    )
    return f'<div class="mentor-legend">{entries}</div>'


def _token(
    trajectory: TrajectoryDetail,
    position: int,
    text: str,
    proposal: Mapping[str, Any] | None,
    show_proposals: bool,
) -> str:
    source = TokenSource(int(trajectory.sources[position]))
    struck = ""
    if proposal is not None and show_proposals:
        struck = f"<del>{_visible(str(proposal['proposed_text'] or ''))}</del>"
    title = escape(_tooltip(trajectory, position, text, proposal), quote=True)
    return f'{struck}<span class="{_CLASSES[source]}" title="{title}">{_visible(text)}</span>'


def _tooltip(
    trajectory: TrajectoryDetail,
    position: int,
    text: str,
    proposal: Mapping[str, Any] | None,
) -> str:
    lines = [
        f"{text!r}, token {int(trajectory.token_ids[position])} at {position}",
        f"entropy {_number(trajectory.entropies[position])} nats, "
        f"weight {_number(trajectory.weights[position])}",
        f"log-prob: policy {_number(trajectory.policy_logprobs[position])}, "
        f"expert {_number(trajectory.expert_logprobs[position])}, "
        f"mixed {_number(trajectory.mixed_logprobs[position])}",
        f"policy version {int(trajectory.versions[position])}",
    ]
    if proposal is not None:
        lines.insert(
            1,
            f"the policy proposed {str(proposal['proposed_text'])!r} "
            f"(policy {_number(proposal['policy_logprob'])}, "
            f"expert {_number(proposal['expert_logprob'])})",
        )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    """NaN and None stand for a value that the expert was never asked for."""
    return "not asked" if value is None or isnan(value) else f"{value:.3f}"


def _visible(text: str) -> str:
    """Escaped text in which line breaks can be seen and tokens without text leave a mark."""
    if not text:
        return '<i class="mentor-mark">&middot;</i>'
    mark = '<i class="mentor-mark">&crarr;</i>\n'
    return escape(text, quote=False).replace("\n", mark)
