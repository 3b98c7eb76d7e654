"""Tokens as HTML: nothing is lost, nothing is executed, sources can be told apart."""

from __future__ import annotations

from collections.abc import Sequence
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seeded_store import HOSTILE_TEXT

from mentor_dashboard.tokens import MAX_TOKENS, response_html, token_texts
from mentor_serve.models.reference.tokenizer import build_tokenizer
from mentor_serve.store.stats import TrajectoryDetail

TOKENIZER = build_tokenizer()


def decode(token_ids: Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(token_ids), skip_special_tokens=False))


def detail(
    num_tokens: int, *, sources: Sequence[int] | None = None, proposed: str | None = None
) -> TrajectoryDetail:
    size = num_tokens
    kinds = np.asarray(sources if sources is not None else [0] * size, dtype=np.uint8)
    replaced = np.flatnonzero(kinds == 2).tolist()
    return TrajectoryDetail(
        row={},
        prompt=None,
        answer=None,
        source=None,
        prompt_token_ids=np.zeros(0, dtype=np.int32),
        token_ids=np.arange(size, dtype=np.int32),
        policy_logprobs=np.full(size, -0.5, dtype=np.float32),
        expert_logprobs=np.full(size, np.nan, dtype=np.float32),
        mixed_logprobs=np.full(size, np.nan, dtype=np.float32),
        entropies=np.full(size, 0.25, dtype=np.float32),
        weights=np.full(size, 0.125, dtype=np.float32),
        sources=kinds,
        versions=np.full(size, 7, dtype=np.int32),
        interventions=[
            {
                "position": position,
                "proposed_text": proposed,
                "policy_logprob": -1.0,
                "expert_logprob": None,
            }
            for position in replaced
        ],
    )


class Tags(HTMLParser):
    """Collects what a browser would see."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.titles: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.titles += [value or "" for name, value in attrs if name == "title"]

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(html: str) -> Tags:
    tags = Tags()
    tags.feed(html)
    return tags


@given(st.text(min_size=0, max_size=60))
@settings(max_examples=200, deadline=None)
def test_token_texts_join_to_the_decoded_response(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    texts = token_texts(ids, decode=decode)
    assert len(texts) == len(ids)
    assert "".join(texts) == decode(ids)


def test_a_character_of_several_tokens_appears_with_its_last_one() -> None:
    ids = TOKENIZER.encode("\N{SNOWMAN}", add_special_tokens=False)
    assert len(ids) > 1
    assert token_texts(ids, decode=decode) == [""] * (len(ids) - 1) + ["\N{SNOWMAN}"]


def test_ids_stand_in_for_text_without_a_tokenizer() -> None:
    assert token_texts([5, 17], decode=None) == ["[5] ", "[17] "]


def test_sources_are_told_apart_and_named_in_the_legend() -> None:
    html = response_html(detail(3, sources=[0, 1, 2], proposed="no"), texts=["a", "b", "c"])
    for name, text in (("policy", "a"), ("kept", "b"), ("expert", "c")):
        assert f'class="mentor-{name}" title=' in html
        assert f">{text}</span>" in html
    for label in ("policy", "gated, kept", "replaced by the expert"):
        assert f">{label}</span>" in html
    assert "<del>no</del>" in html


def test_the_tooltip_holds_the_numbers_and_the_proposal() -> None:
    html = response_html(detail(2, sources=[0, 2], proposed="okay"), texts=["a", "b"])
    first, second = parse(html).titles
    assert "entropy 0.250 nats, weight 0.125" in first
    assert "log-prob: policy -0.500, expert not asked, mixed not asked" in first
    assert "policy version 7" in first
    assert "the policy proposed 'okay' (policy -1.000, expert not asked)" in second


def test_text_of_a_model_is_never_markup() -> None:
    trajectory = detail(1, sources=[2], proposed=HOSTILE_TEXT)
    plain = parse(response_html(detail(1, sources=[2], proposed="x"), texts=["y"]))
    hostile = parse(response_html(trajectory, texts=[HOSTILE_TEXT + '" onmouseover="x']))
    assert hostile.tags == plain.tags
    assert hostile.text.count(HOSTILE_TEXT) == 2


def test_line_breaks_and_tokens_without_text_can_be_seen() -> None:
    html = response_html(detail(2), texts=["\n", ""])
    assert "&crarr;</i>\n</span>" in html
    assert "&middot;" in html


@pytest.mark.parametrize("num_tokens", [MAX_TOKENS, MAX_TOKENS + 10])
def test_a_very_long_response_is_cut(num_tokens: int) -> None:
    html = response_html(detail(num_tokens), texts=["x"] * num_tokens)
    assert len(parse(html).titles) == MAX_TOKENS
