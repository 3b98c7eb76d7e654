"""The embedded reference pair: a weak policy and a strong expert over one tokenizer.

Contract: two directories in Hugging Face layout that load offline in well under a second, and the
task mix on which their documented accuracies hold. Importing this package pulls in neither torch
nor transformers. How the pair was made and what it measures: docs/reference-pair.md.
"""

from pathlib import Path
from typing import Final, Literal

ModelName = Literal["policy", "expert"]

TASK_NAME: Final = "chain_sum"
"""Name of the reasoning-gym data set the pair was built for."""

TASK_CONFIG: Final[dict[str, int]] = {
    "min_terms": 3,
    "max_terms": 7,
    "min_digits": 1,
    "max_digits": 1,
}
"""Its configuration: sums and differences of 3 to 7 single digits (add `seed` and `size`).

reasoning-gym draws item i of seed s from `Random(s + i)`: two data sets are disjoint only when
their seeds lie further apart than their sizes.
"""

TASK_MIX: Final[tuple[tuple[str, dict[str, int]], ...]] = ((TASK_NAME, TASK_CONFIG),)
"""The training mix as (reasoning-gym name, configuration) pairs, sampled in equal shares."""

MAX_NEW_TOKENS: Final = 112
"""Response limit in tokens that truncates neither model on the mix."""


def reference_path(name: ModelName) -> Path:
    """Return the directory of a bundled model, for `AutoModelForCausalLM.from_pretrained`."""
    if name not in ("policy", "expert"):
        raise ValueError(f"expected 'policy' or 'expert', got {name!r}")
    return Path(__file__).resolve().parent / name
