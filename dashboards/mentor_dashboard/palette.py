"""Colours with one meaning each on every page.

The set is derived from Okabe and Ito's: blue against orange survives every common colour-vision
deficiency, and all of them keep at least 3:1 contrast on Streamlit's light and dark backgrounds.
Colour never stands alone: series are also named in a legend, tokens are also underlined or bold.
"""

from __future__ import annotations

from mentor_serve.types import TokenSource

POLICY = "#3d87cc"
"""The policy's own: on-policy rollouts, its tokens, its updates."""
EXPERT = "#dd7a12"
"""The expert's influence: mixed rollouts, interventions."""
GATE = "#b08fd8"
"""The expert was consulted."""
ENTROPY = "#1d9a84"
"""Uncertainty: entropy and gamma, its quantile."""
NEUTRAL = "#7d8794"
"""Everything that takes no side: loss, time, the queue."""
ALERT = "#d1495b"
"""Needs a look: failed, stale."""

SERIES = (POLICY, EXPERT, ENTROPY, GATE, ALERT, NEUTRAL)
"""For series without a meaning of their own, in this order."""

STATUS_COLOURS = {
    "ready": POLICY,
    "leased": GATE,
    "consumed": ENTROPY,
    "stale": EXPERT,
    "failed": ALERT,
}
"""Life of a rollout group, in order."""

SOURCE_COLOURS = {
    TokenSource.POLICY: POLICY,
    TokenSource.GATED_KEPT: GATE,
    TokenSource.EXPERT: EXPERT,
}
SOURCE_LABELS = {
    TokenSource.POLICY: "policy",
    TokenSource.GATED_KEPT: "gated, kept",
    TokenSource.EXPERT: "replaced by the expert",
}
