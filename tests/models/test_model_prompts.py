from typing import Any

import pytest

from mentor_serve.errors import ConfigError
from mentor_serve.models import opens_thinking, render_messages
from mentor_serve.models.prompts import plain_layout
from mentor_serve.models.reference.tokenizer import build_tokenizer

QUESTION = {"role": "user", "content": "1 + 1?"}
SYSTEM = {"role": "system", "content": "Be brief."}

WITH_SYSTEM = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WITHOUT_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
) + WITH_SYSTEM
THINKING = WITH_SYSTEM.replace("<assistant>", "<assistant>\n<think>\n")


@pytest.fixture
def tokenizer() -> Any:
    return build_tokenizer()


def text_of(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    return str(tokenizer.decode(render_messages(tokenizer, messages, **options)))


def test_the_chat_template_writes_the_roles(tokenizer: Any) -> None:
    tokenizer.chat_template = WITH_SYSTEM
    assert text_of(tokenizer, [SYSTEM, QUESTION]) == (
        "<system>Be brief.\n<user>1 + 1?\n<assistant>"
    )
    assert text_of(tokenizer, [QUESTION], add_generation_prompt=False) == "<user>1 + 1?\n"


def test_the_ids_are_those_of_apply_chat_template(tokenizer: Any) -> None:
    expected = tokenizer.apply_chat_template(
        [QUESTION], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert render_messages(tokenizer, [QUESTION]) == expected
    assert all(type(token_id) is int for token_id in expected)


def test_a_template_that_refuses_system_messages_gets_them_in_the_first_question(
    tokenizer: Any,
) -> None:
    tokenizer.chat_template = WITHOUT_SYSTEM
    assert text_of(tokenizer, [SYSTEM, QUESTION]) == ("<user>Be brief.\n\n1 + 1?\n<assistant>")


def test_a_template_that_refuses_the_conversation_is_a_config_error(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    for messages in ([QUESTION], [SYSTEM, QUESTION]):
        with pytest.raises(ConfigError, match="refuses these messages: never"):
            render_messages(tokenizer, messages)


def test_no_message_is_a_config_error(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="at least one message"):
        render_messages(tokenizer, [])


def test_without_a_template_the_contents_stand_one_below_the_other(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    assert plain_layout([SYSTEM, QUESTION]) == "Be brief.\n\n1 + 1?\n"
    assert text_of(tokenizer, [SYSTEM, QUESTION]) == "Be brief.\n\n1 + 1?\n"


@pytest.mark.parametrize(
    ("template", "opened"),
    [
        (WITH_SYSTEM, ""),
        (THINKING, "<think>\n"),
        (THINKING.replace("<think>\n", "<think>\n\n</think>\n"), ""),
        (None, ""),
    ],
)
def test_a_generation_prompt_that_opens_the_think_block_is_noticed(
    tokenizer: Any, template: str | None, opened: str
) -> None:
    tokenizer.chat_template = template
    assert opens_thinking(tokenizer) == opened
