from typing import Any

import pytest
from rollout_fakes import make_rollout

from mentor_serve.models.reference.tokenizer import build_tokenizer
from mentor_serve.rollout.prompts import PromptRenderer
from mentor_serve.types import Task

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
TASK = Task(source="test", prompt="1 + 1?", answer="2")


@pytest.fixture
def tokenizer() -> Any:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_the_system_prompt_goes_before_the_question(tokenizer: Any) -> None:
    renderer = PromptRenderer(tokenizer, "Think.")
    assert tokenizer.decode(renderer.render(TASK)) == "<system>Think.<user>1 + 1?"


def test_an_empty_system_prompt_is_left_out(tokenizer: Any) -> None:
    assert tokenizer.decode(PromptRenderer(tokenizer).render(TASK)) == "<user>1 + 1?"


def test_a_tasks_own_messages_are_rendered_and_its_system_message_wins(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Own."}, {"role": "user", "content": "2?"}]
    task = Task(source="test", prompt="2?", answer="2", metadata={"messages": messages})
    assert tokenizer.decode(PromptRenderer(tokenizer, "Think.").render(task)) == (
        "<system>Own.<user>2?"
    )


def test_without_a_template_the_plain_layout_is_used(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    renderer = PromptRenderer(tokenizer, "Think.")
    assert tokenizer.decode(renderer.render(TASK)) == "Think.\n\n1 + 1?\n"


def test_a_response_is_decoded_without_special_tokens_unless_it_has_its_text(
    tokenizer: Any,
) -> None:
    renderer = PromptRenderer(tokenizer)
    token_ids = [*tokenizer("<think>so</think>")["input_ids"], tokenizer.eos_token_id]
    rollout = make_rollout(token_ids=token_ids, text=None)
    assert renderer.decode(rollout) == "<think>so</think>"
    rollout.text = "kept"
    assert renderer.decode(rollout) == "kept"


def test_token_texts_name_each_token_once(tokenizer: Any) -> None:
    token_ids = tokenizer("1 1")["input_ids"]
    texts = PromptRenderer(tokenizer).token_texts(token_ids)
    assert texts.keys() == set(token_ids)
    assert texts[token_ids[0]] == "1"
