"""Turns a conversation into prompt token ids, by the model's own chat template where it has one.

Roles are never written by hand for a model with a template. A model without one (a base model) gets
the plain layout that `plain_layout` documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from mentor_serve.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
"""`role` (`system`, `user`, `assistant`, ...) and `content` (text)."""

THINK_OPEN: Final = "<think>"


def render_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    **template_options: Any,
) -> list[int]:
    """Return the token ids of a conversation that the model is to continue.

    A template that refuses system messages (Gemma's, for instance) gets the system text at the
    head of the first user message instead.

    Raises:
        ConfigError: no message, or the template refuses the conversation.
    """
    text = _render(
        tokenizer, messages, add_generation_prompt=add_generation_prompt, **template_options
    )
    # Templates write their own beginning-of-sequence token; the plain layout takes the tokenizer's.
    has_template = bool(tokenizer.chat_template)
    token_ids: list[int] = tokenizer(text, add_special_tokens=not has_template)["input_ids"]
    if not has_template and token_ids and token_ids[-1] == tokenizer.eos_token_id:
        token_ids = token_ids[:-1]  # T5-like tokenizers close every text
    return list(token_ids)


def opens_thinking(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the `<think>` that the generation prompt already opens, or an empty string.

    Templates of reasoning models may end with `<think>` and a line break, so that the response
    holds the closing tag alone. Whoever checks the format puts this text in front of the response.
    """
    if not tokenizer.chat_template:
        return ""
    rendered = _render(tokenizer, [{"role": "user", "content": "?"}], add_generation_prompt=True)
    head, tag, tail = rendered.rpartition(THINK_OPEN)
    return tag + tail if head and not tail.strip() else ""


def plain_layout(messages: Sequence[Message]) -> str:
    """Return the text for models without a chat template: the contents, one blank line between.

    The last line is left open by a line break, so that the response starts on a line of its own:
    `system text`, blank line, `question`, line break.
    """
    return "\n\n".join(str(message["content"]) for message in messages) + "\n"


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    **template_options: Any,
) -> str:
    from jinja2 import TemplateError

    if not messages:
        raise ConfigError("a prompt needs at least one message, got none")
    if not tokenizer.chat_template:
        return plain_layout(messages)
    options = {
        "tokenize": False,
        "add_generation_prompt": add_generation_prompt,
        **template_options,
    }
    try:
        return str(tokenizer.apply_chat_template(list(messages), **options))
    except TemplateError as error:
        merged = _without_system(messages)
        if merged is None:
            raise ConfigError(f"the chat template refuses these messages: {error}") from error
    try:
        return str(tokenizer.apply_chat_template(merged, **options))
    except TemplateError as error:
        raise ConfigError(f"the chat template refuses these messages: {error}") from error


def _without_system(messages: Sequence[Message]) -> list[Message] | None:
    """Return the conversation with a leading system text moved into the first user message."""
    is_movable = len(messages) > 1 and messages[0]["role"] == "system"
    if not is_movable or messages[1]["role"] != "user":
        return None
    merged = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [merged, *messages[2:]]
