"""The response format that the paper asks for (appendix B): a think block, then a boxed answer.

Pure string functions; they read braces, never mathematics.
"""

from __future__ import annotations

from typing import Final

THINK_OPEN: Final = "<think>"
THINK_CLOSE: Final = "</think>"
BOXED_OPEN: Final = "\\boxed{"


def boxed_answer(text: str) -> str | None:
    """Return the content of the last `\\boxed{...}` after the think block, or None.

    None where the response is not in the required format: it starts (after white space) with
    `<think>`, holds each think tag exactly once, thinks something, and has at least one box behind
    `</think>`, the last of which has balanced braces and is not empty. Text around the box is
    allowed; escaped braces do not count as braces.

    >>> boxed_answer("<think>1 + 1</think> So \\\\boxed{\\\\frac{4}{2}}.")
    '\\\\frac{4}{2}'
    """
    stripped = text.lstrip()
    is_one_block = stripped.count(THINK_OPEN) == 1 and stripped.count(THINK_CLOSE) == 1
    if not is_one_block or not stripped.startswith(THINK_OPEN):
        return None
    thought, _, rest = stripped.removeprefix(THINK_OPEN).partition(THINK_CLOSE)
    if not thought.strip():
        return None
    return last_boxed(rest)


def has_required_format(text: str) -> bool:
    """Whether `boxed_answer` finds an answer."""
    return boxed_answer(text) is not None


def last_boxed(text: str) -> str | None:
    """Return the stripped content of the last `\\boxed{...}`, or None if it is empty or open."""
    start = text.rfind(BOXED_OPEN)
    # A box in a box: the outer one is the answer.
    while start >= 0:
        outer = text.rfind(BOXED_OPEN, 0, start)
        if outer < 0 or (end := _closing_brace(text, outer + len(BOXED_OPEN))) is None:
            break
        if end < start:
            break
        start = outer
    if start < 0:
        return None
    begin = start + len(BOXED_OPEN)
    closing = _closing_brace(text, begin)
    if closing is None:
        return None
    return text[begin:closing].strip() or None


def _closing_brace(text: str, begin: int) -> int | None:
    """Return the offset of the brace that closes the one opened just before `begin`."""
    depth, index = 1, begin
    while index < len(text):
        character = text[index]
        if character == "\\":
            index += 2
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return index
        index += 1
    return None
