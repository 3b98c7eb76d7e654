"""Incremental text: whole characters, no part of a stop string, nothing lost."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_fakes import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mentor_serve.errors import InvalidRequest
from mentor_serve.serving.text import IncrementalDecoder, StopFilter, TextCodec, find_stop

TOKENIZER = byte_tokenizer()
CODEC = TextCodec(lambda: TOKENIZER)


def _split(items, cuts):
    edges = [0, *sorted(cut % (len(items) + 1) for cut in cuts), len(items)]
    return [items[a:b] for a, b in pairwise(edges)]


@settings(deadline=None, max_examples=150)
@given(text=st.text(max_size=30), cuts=st.lists(st.integers(0, 200), max_size=20))
def test_pieces_are_whole_characters_and_add_up(text, cuts):
    token_ids = TOKENIZER.encode(text, add_special_tokens=False)
    decoder = IncrementalDecoder(CODEC)
    pieces = [decoder.push(part) for part in _split(token_ids, cuts)]
    assert "".join([*pieces, decoder.finish()]) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(deadline=None, max_examples=100)
@given(raw=st.binary(max_size=120))
def test_bytes_that_are_no_text_come_out_as_replacements_and_the_rest_survives(raw):
    table = {CODEC.token_bytes(i)[0]: i for i in range(256)}
    decoder = IncrementalDecoder(CODEC)
    streamed = "".join(decoder.push([table[byte]]) for byte in raw) + decoder.finish()
    at_once = CODEC.decode([table[byte] for byte in raw])
    assert streamed.replace("\ufffd", "") == at_once.replace("\ufffd", "")
    assert ("\ufffd" in streamed) == ("\ufffd" in at_once)


def test_an_endless_run_of_broken_bytes_does_not_hold_text_back_for_ever():
    broken = next(i for i in range(256) if CODEC.token_bytes(i) == b"\x80")
    decoder = IncrementalDecoder(CODEC)
    assert any(decoder.push([broken]) for _step in range(40))


def test_a_tokenizer_that_spells_tokens_by_their_neighbours_streams_the_same_text():
    backend = Tokenizer(models.BPE(vocab={"\u2581": 0, "a": 1, "b": 2}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    codec = TextCodec(lambda: PreTrainedTokenizerFast(tokenizer_object=backend))
    token_ids = [0, 1, 0, 2, 1, 0, 1]
    decoder = IncrementalDecoder(codec)
    streamed = "".join(decoder.push([token_id]) for token_id in token_ids) + decoder.finish()
    assert streamed == codec.decode(token_ids) == "a ba a"
    assert codec.token_text(0) == " "


@settings(deadline=None)
@given(
    text=st.text("abc", max_size=40),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 60), max_size=30),
)
def test_stop_filter_never_passes_a_stop_string_nor_loses_text_before_it(text, stops, cuts):
    stop_filter = StopFilter(stops)
    passed = "".join(stop_filter.push(part) for part in _split(text, cuts)) + stop_filter.finish()
    assert find_stop(passed, stops) is None
    assert text.startswith(passed)
    if find_stop(text, stops) is None:
        assert passed == text
    else:
        assert stop_filter.has_stopped


def test_stop_filter_holds_back_only_what_may_begin_a_stop_string():
    stop_filter = StopFilter(["###"])
    assert [stop_filter.push(part) for part in ("ab#", "#", "c#")] == ["ab", "", "##c"]
    assert stop_filter.finish() == "#"


def test_part_of_a_character_is_spelled_by_its_bytes():
    first, *_rest = TOKENIZER.encode("\u00e9", add_special_tokens=False)
    assert CODEC.token_bytes(first) == b"\xc3"
    assert CODEC.token_text(first) == "bytes:\\xc3"
    assert CODEC.token_text(TOKENIZER.eos_token_id) == "<|end|>"
    assert CODEC.token_bytes(len(TOKENIZER) + 5) == b""


def test_text_that_utf8_cannot_carry_is_an_invalid_request():
    with pytest.raises(InvalidRequest, match="surrogate"):
        asyncio.run(CODEC.encode("a\ud800"))
