"""Stop strings that straddle tokens, and the text that is left."""

from __future__ import annotations

import numpy as np
import pytest

from mentor_serve.engines import RolloutRequest, SamplingParams, TorchEngine
from mentor_serve.engines.stopping import ends_at_stop, response_text
from mentor_serve.errors import InvalidRequest
from mentor_serve.types import StopReason


@pytest.fixture
def encode(tiny_tokenizer):
    return lambda text: np.array(tiny_tokenizer.encode(text), np.int32)


def test_a_stop_string_may_straddle_tokens(encode, tiny_tokenizer):
    response = encode("12abcdef")
    assert response.tolist()[2:] == encode("abcdef").tolist()
    sampling = SamplingParams(stop=("bc",))
    ended = [ends_at_stop(response[: i + 1], sampling, tiny_tokenizer) for i in range(4)]
    assert ended == [False, False, False, True]
    assert response_text(response[:4], sampling, tiny_tokenizer, StopReason.STOP) == "12a"


def test_the_earliest_of_several_stop_strings_cuts_the_text(encode, tiny_tokenizer):
    response = encode("1+2=3.")
    sampling = SamplingParams(stop=("=3.", "2=3"))
    assert response_text(response, sampling, tiny_tokenizer, StopReason.STOP) == "1+"


def test_ordinary_tags_stay_and_special_tokens_go(encode, tiny_tokenizer):
    response = encode("<think>12</think>3<eos>")
    sampling = SamplingParams()
    text = response_text(response, sampling, tiny_tokenizer, StopReason.EOS)
    assert text == "<think>12</think>3"
    assert response_text(response[:-1], sampling, tiny_tokenizer, StopReason.LENGTH) == text


def test_a_stop_token_is_left_out_of_the_text(encode, tiny_tokenizer):
    response = encode("12=")
    sampling = SamplingParams(stop_token_ids=(int(response[-1]),))
    assert ends_at_stop(response, sampling, tiny_tokenizer)
    assert response_text(response, sampling, tiny_tokenizer, StopReason.STOP) == "12"


def test_a_special_token_may_be_a_stop_string(encode, tiny_tokenizer):
    response = encode("12<eos>")
    sampling = SamplingParams(stop=("<eos>",), ignore_eos=True)
    assert ends_at_stop(response, sampling, tiny_tokenizer)
    assert response_text(response, sampling, tiny_tokenizer, StopReason.STOP) == "12"


def test_the_engine_keeps_tokens_up_to_the_match_and_cuts_the_text(tiny_pair, tiny_tokenizer):
    engine = TorchEngine(*tiny_pair, tokenizer=tiny_tokenizer)

    def run(**options):
        sampling = SamplingParams(max_new_tokens=16, ignore_eos=True, **options)
        (rollouts,) = engine.generate(
            [RolloutRequest(prompt_token_ids=[3, 4], seed=2, sampling=sampling)]
        )
        return rollouts[0]

    free = run()
    assert free.text == tiny_tokenizer.decode(free.token_ids, skip_special_tokens=True)
    stop = free.text[5:8]
    stopped = run(stop=("never there", stop))
    assert stopped.stop_reason is StopReason.STOP
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.num_tokens < 16
    assert stopped.token_ids.tolist() == free.token_ids[: stopped.num_tokens].tolist()
    with_match = tiny_tokenizer.decode(stopped.token_ids, skip_special_tokens=True)
    without_last = tiny_tokenizer.decode(stopped.token_ids[:-1], skip_special_tokens=True)
    assert stop in with_match
    assert stop not in without_last


def test_empty_stop_strings_are_refused(tiny_pair, tiny_tokenizer):
    engine = TorchEngine(tiny_pair[0], tokenizer=tiny_tokenizer)
    with pytest.raises(InvalidRequest, match="non-empty"):
        engine.submit(RolloutRequest(prompt_token_ids=[3], sampling=SamplingParams(stop=("",))))
