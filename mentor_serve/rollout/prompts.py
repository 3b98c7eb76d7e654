"""Token ids of a task's prompt, as the policy's chat template wants them.

The ids are made once and never re-encoded: the engine, the store and the learner see the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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

    def messages(self, task: Task) -> list[dict[str, Any]]:
        """Return the conversation of a task: its own messages, or its prompt as a user's turn.

        The system prompt goes first, unless the task's messages bring one.
        """
        own = task.metadata.get("messages") or [{"role": "user", "content": task.prompt}]
        if not self._system_prompt or any(message["role"] == "system" for message in own):
            return list(own)
        return [{"role": "system", "content": self._system_prompt}, *own]

    def render(self, task: Task) -> list[int]:
        """Return the prompt's token ids, up to where the response begins.

        Raises:
            ConfigError: the chat template refuses the task's messages.
        """
        return render_messages(self._tokenizer, self.messages(task))

    def decode(self, rollout: Rollout) -> str:
        """Return a response as text, special tokens left out."""
        if rollout.text is not None:
            return rollout.text
        return str(self._tokenizer.decode(rollout.token_ids.tolist(), skip_special_tokens=True))

    def token_texts(self, token_ids: Sequence[int]) -> dict[int, str]:
        """Return the text of each token id on its own, for records of interventions."""
        return {token_id: str(self._tokenizer.decode([token_id])) for token_id in set(token_ids)}
