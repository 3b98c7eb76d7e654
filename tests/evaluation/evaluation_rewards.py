"""A reward function that fails on request, for the verifier process of the tests."""

import os
from typing import Any


def judge(prompt: str, response: str, answer: str, metadata: dict[str, Any]) -> float:
    if response == "raise":
        raise KeyError("no such thing")
    if response == "die":
        os._exit(3)
    return 1.0
