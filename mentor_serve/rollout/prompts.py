"""Token ids of a task's prompt, as the policy's chat template wants them.

The ids are made once and never re-encoded: the engine, the store and the learner see the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mentor_serve.errors import ConfigError
from mentor_serve.models.prompts import opens_thinking, render_messages
from mentor_serve.types import Rollout, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptRenderer:
    """Renders tasks for one tokenizer under one system prompt. Needs no lock: it keeps no state."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system_prompt: str = "") -> None:
        """Take the tokenizer and the system message; an empty one is left out."""
        self._tokenizer = tokenizer
        self._system_prompt = system_prompt
        self.response_prefix = opens_thinking(tokenizer)
        """What the generation prompt already opened (`<think>`); belongs to the response."""

    def messages(self, task: Task, *, hint: str = "") -> list[dict[str, Any]]:
        """Return the conversation of a task: its own messages, or its prompt as a user's turn.

        The system prompt goes first, unless the task's messages bring one. `hint` is appended to
        the last message of the user, one blank line between.

        Raises:
            ConfigError: a hint, and no text of a user to append it to.
        """
        own = task.metadata.get("messages") or [{"role": "user", "content": task.prompt}]
        if hint:
            own = _with_hint(own, hint)
        if not self._system_prompt or any(message["role"] == "system" for message in own):
            return list(own)
        return [{"role": "system", "content": self._system_prompt}, *own]

    def render(self, task: Task, *, hint: str = "") -> list[int]:
        """Return the prompt's token ids, up to where the response begins.

        Raises:
            ConfigError: the chat template refuses the task's messages, or see `messages`.
        """
        return render_messages(self._tokenizer, self.messages(task, hint=hint))

    def decode(self, rollout: Rollout) -> str:
        """Return a response as text, special tokens left out."""
        if rollout.text is not None:
            return rollout.text
        return self.text_of(rollout.token_ids.tolist())

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Return tokens as text, special ones left out."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def token_texts(self, token_ids: Sequence[int]) -> dict[int, str]:
        """Return the text of each token id on its own, for records of interventions."""
        return {token_id: str(self._tokenizer.decode([token_id])) for token_id in set(token_ids)}


def _with_hint(messages: Sequence[dict[str, Any]], hint: str) -> list[dict[str, Any]]:
    changed = list(messages)
    for index in reversed(range(len(changed))):
        message = changed[index]
        if message["role"] == "user" and isinstance(message["content"], str):
            changed[index] = {**message, "content": f"{message['content']}\n\n{hint}"}
            return changed
    raise ConfigError(
        "expected a user's message of plain text to append a hint to, got the roles "
        f"{[message['role'] for message in messages]}; use another guidance.method for such tasks"
    )
