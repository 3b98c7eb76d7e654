"""Which words reasoning uses: the share of responses with a word at least once (Figure 3)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

FIGURE_3_WORDS: Final = (
    "however",
    "consider",
    "then",
    "given",
    "since",
    "therefore",
    "find",
    "similarly",
    "but",
    "wait",
    "okay",
    "alternatively",
    "check",
    "verify",
)
"""The words of the paper's Figure 3."""


def word_shares(texts: Iterable[str], words: Sequence[str] = FIGURE_3_WORDS) -> dict[str, float]:
    """Return for each word the share of texts in which it occurs, whatever its case.

    Whole words count: "butter" holds no "but", "verified" no "verify". Without texts all are 0.

    >>> word_shares(["Wait, 2", "so 3"], ["wait", "so"])
    {'wait': 0.5, 'so': 0.5}
    """
    patterns = {word: re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.I) for word in words}
    counts = dict.fromkeys(words, 0)
    num_texts = 0
    for text in texts:
        num_texts += 1
        for word, pattern in patterns.items():
            counts[word] += pattern.search(text) is not None
    return {word: count / num_texts if num_texts else 0.0 for word, count in counts.items()}
