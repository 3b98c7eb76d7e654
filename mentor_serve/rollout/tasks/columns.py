"""Reads a task from a row: which columns hold the prompt and the answer.

Accepted are the names that public data sets use. Columns beyond them become the task's metadata, as
far as they are plain JSON values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from mentor_serve.errors import ConfigError
from mentor_serve.types import Task

PROMPT_COLUMNS: Final = ("prompt", "question", "problem")
ANSWER_COLUMNS: Final = ("answer", "solution", "final_answer", "ground_truth")


def task_from_row(row: Mapping[str, Any], *, source: str, where: str, split: str = "train") -> Task:
    """Return the task of one row.

    The prompt is the first of `PROMPT_COLUMNS` that is present: text, or a list of messages with
    `role` and `content` (then `metadata["messages"]` keeps them and the prompt is the last user
    message). The answer is the first of `ANSWER_COLUMNS`: text or a number.

    Raises:
        ConfigError: names the place, what was expected and what came.
    """
    prompt_column = _column(row, PROMPT_COLUMNS, "prompt", where)
    answer_column = _column(row, ANSWER_COLUMNS, "answer", where)
    metadata = {
        key: value
        for key, value in row.items()
        if key not in {prompt_column, answer_column} and _is_json(value)
    }
    prompt = row[prompt_column]
    if isinstance(prompt, list):
        metadata["messages"] = _messages(prompt, f"{where}, column {prompt_column!r}")
        prompt = next(m["content"] for m in reversed(prompt) if m["role"] == "user")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ConfigError(
            f"{where}: expected {prompt_column!r} to be text or a list of messages, got "
            f"{prompt!r:.80}"
        )
    answer = _answer(row[answer_column], f"{where}: expected {answer_column!r}")
    return Task(source=source, prompt=prompt, answer=answer, metadata=metadata, split=split)


def _column(row: Mapping[str, Any], names: tuple[str, ...], what: str, where: str) -> str:
    for name in names:
        if row.get(name) is not None:
            return name
    raise ConfigError(
        f"{where}: expected a column {' or '.join(names)} with the {what}, got the columns "
        f"{', '.join(map(str, row)) or 'none'}"
    )


def _answer(value: Any, expected: str) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    text = str(value) if is_number or isinstance(value, str) else ""
    if not text.strip():
        raise ConfigError(f"{expected} to be text or a number, got {value!r:.80}")
    return text


def _messages(messages: list[Any], where: str) -> list[dict[str, str]]:
    is_valid = bool(messages) and all(
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in messages
    )
    if not is_valid or all(message["role"] != "user" for message in messages):
        raise ConfigError(
            f"{where}: expected messages with text under 'role' and 'content', at least one of "
            f"role user, got {messages!r:.120}"
        )
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
