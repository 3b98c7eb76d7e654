"""What arms are called and which colour they have, in tables, figures and the dashboard.

Data alone: importing it loads neither torch nor matplotlib, which a dashboard does without.
"""

from __future__ import annotations

from typing import Final

METHOD_LABELS: Final = {
    "base": "base",
    "on_policy": "On-policy RL",
    "luffy": "LUFFY",
    "questa": "QuestA",
    "mentor": "MENTOR",
    "expert": "expert",
}
ABLATION_LABELS: Final = {
    "unselective": "constant weight of the same mean",
    "quantile_80": "p = 0.8",
    "quantile_100": "p = 1.0",
    "constant_alpha": "alpha without decay",
    "mixed_2": "10 + 2 rollouts",
    "mixed_8": "4 + 8 rollouts",
    "plain_grpo": "plain GRPO on mixed rollouts",
    "expert_first": "first token from the expert",
    "gamma_floor": "gamma at least 1.5",
    "loss_scale": "loss times 8/12",
    "released_code": "the last three together",
    "stale_1": "rollouts 1 update old",
    "stale_4": "rollouts 4 updates old",
}
METHOD_COLOURS: Final = {
    "base": "#8c8c8c",
    "on_policy": "#4c72b0",
    "luffy": "#dd8452",
    "questa": "#937860",
    "mentor": "#c44e52",
    "expert": "#2f2f2f",
}
"""By the names of `METHOD_LABELS`."""
