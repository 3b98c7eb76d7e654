"""Colours with one meaning each on every page.

The set is derived from Okabe and Ito's: blue against orange survives every common colour-vision
deficiency, and all of them keep at least 3:1 contrast on Streamlit's light and dark backgrounds.
Colour never stands alone: series are also named in a legend, tokens are also underlined or bold.
"""

from __future__ import annotations

from mentor_serve.experiments.names import METHOD_COLOURS
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

METHOD_COLOURS_ON_DARK = METHOD_COLOURS | {"expert": "#d9d9d9"}
OTHER_COLOURS = (
    "#3f9b57",
    "#7b6bb5",
    "#2e9db8",
    "#b8962e",
    "#c765a5",
    "#6b8e23",
    "#5b4a9e",
    "#0f7f78",
    "#e0708c",
    "#9a6b2f",
    "#7c9cc9",
    "#a83f86",
    "#5f7d4f",
)
"""Runs that are told apart by something else than their method."""


def shades(colour: str, count: int) -> list[str]:
    """`count` shades of one colour, from light to dark; the colour itself where one is enough."""
    if count == 1:
        return [colour]
    # From half way to white, to a third of the way to black.
    strengths = [0.5 - 0.85 * index / (count - 1) for index in range(count)]
    return [_mixed(colour, strength) for strength in strengths]


def _mixed(colour: str, strength: float) -> str:
    """Towards white where `strength` is above 0, towards black below."""
    target = 255 if strength > 0 else 0
    parts = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return "#" + "".join(f"{round(part + (target - part) * abs(strength)):02x}" for part in parts)
