"""Reward functions for models that do not keep to the paper's response format.

Named by `reward.verifier`, for instance `apps.rewards:last_number`; docs/tasks.md has the contract.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def last_number(prompt: str, response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """1 if the last number of the response equals the answer, else 0.

    >>> last_number("", "5 - 3 = 2.", "2", {})
    1.0
    """
    del prompt, metadata
    numbers = _NUMBER.findall(response)
    return float(bool(numbers) and float(numbers[-1]) == float(answer))
