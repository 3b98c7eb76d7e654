"""Reward functions that the verifier processes of the tests import."""

import os
import re
import sys
import time
from typing import Any

from mentor_serve.types import Score

NOT_CALLABLE = 7


def length_reward(prompt: str, response: str, answer: str, metadata: dict[str, Any]) -> float:
    return min(1.0, len(response) / 10)


def exact(prompt: str, response: str, answer: str, metadata: dict[str, Any]) -> bool:
    sys.stdout.write("printed by the verifier\n")
    return response == answer


def as_told(prompt: str, response: str, answer: str, metadata: dict[str, Any]) -> bool:
    """Right or wrong by the task's answer, whatever the response."""
    if answer == "raises":
        raise ValueError("this task cannot be judged")
    return answer == "right"


def by_metadata(prompt: str, response: str, answer: str, metadata: dict[str, Any]) -> Any:
    return {
        "score": Score(reward=0.25, accuracy=1.0, format_score=0.0),
        "accuracy": {"accuracy": 0.5, "format_score": 1.0},
        "reward": {"reward": 0.75},
        "nan": float("nan"),
        "high": 1.5,
        "text": "1.0",
        "none": None,
        "keys": {"reward": 1.0, "bonus": 1.0},
        "empty": {},
    }[metadata["kind"]]


def misbehave(prompt: str, response: str, answer: str, metadata: dict[str, Any]) -> float:
    if response == "sleep":
        time.sleep(60)
    if response == "spin in C":
        re.match(r"(a+)+$", "a" * 60 + "b")
    if response == "raise":
        raise KeyError("no such thing")
    if response == "die":
        os._exit(3)
    if response == "exhaust memory":
        bytearray(64 * 2**30)
    return 1.0
