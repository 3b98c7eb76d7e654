"""Weight swaps: all or nothing, tied weights, other threads."""

from __future__ import annotations

import threading

import pytest
import torch

from mentor_serve.engines import RolloutRequest, SamplingParams, TorchEngine
from mentor_serve.engines.slots.slot_model import SlotModel
from mentor_serve.errors import WeightsError


def changed(model, **replacements):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in replacements.items():
        if value is None:
            del state[name]
        else:
            state[name] = value
    return state


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("replacements", "message"),
    [
        ({NORM: None}, f"'{NORM}' is missing"),
        ({NORM: torch.ones(3)}, r"expected shape \(16,\), got \(3,\)"),
        ({"model.extra": torch.ones(3)}, "'model.extra': the policy has none"),
    ],
    ids=["missing", "misshapen", "unknown"],
)
def test_weights_that_do_not_fit_are_refused_and_the_old_stay(tiny_llama, replacements, message):
    engine = TorchEngine(tiny_llama(1))
    asked = [RolloutRequest(prompt_token_ids=[3, 4], sampling=SamplingParams(max_new_tokens=8))]
    (before,) = engine.generate(asked)
    with pytest.raises(WeightsError, match=message):
        engine.load_weights(changed(tiny_llama(2), **replacements), version=9)
    assert engine.policy_version == 0
    (after,) = engine.generate(asked)
    assert after[0].token_ids.tolist() == before[0].token_ids.tolist()


def test_tied_weights_may_come_once_or_twice_but_must_agree(tiny_llama):
    engine = TorchEngine(tiny_llama(1, tie_word_embeddings=True))
    source = tiny_llama(2, tie_word_embeddings=True)
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    for version, missing in enumerate((head, embedding), start=1):
        engine.load_weights(changed(source, **{missing: None}), version=version)
        weights = engine.policy_model.state_dict()
        assert torch.equal(weights[head], source.state_dict()[head])
        assert torch.equal(weights[embedding], source.state_dict()[head])
    engine.load_weights(source.state_dict(), version=3)
    engine.load_weights(changed(source), version=4)
    odd = changed(source, **{head: torch.zeros_like(source.state_dict()[head])})
    with pytest.raises(WeightsError, match="values differ"):
        engine.load_weights(odd, version=5)
    assert engine.policy_version == 4


def test_weights_loaded_during_a_step_take_effect_in_the_next(tiny_llama, monkeypatch):
    policy, new = tiny_llama(1), tiny_llama(2)
    engine = TorchEngine(policy)
    inside, leave = threading.Event(), threading.Event()

    decode = SlotModel.decode

    def pause(self, *args, **kwargs):
        inside.set()
        assert leave.wait(timeout=30)
        return decode(self, *args, **kwargs)

    monkeypatch.setattr(SlotModel, "decode", pause)
    engine.submit(
        RolloutRequest(
            prompt_token_ids=[3], sampling=SamplingParams(max_new_tokens=2, ignore_eos=True)
        )
    )
    outputs = []
    stepping = threading.Thread(target=lambda: outputs.extend(engine.step()))
    stepping.start()
    assert inside.wait(timeout=30)
    state = changed(new)
    engine.load_weights(state, version=3)
    state[NORM].zero_()  # the engine must have its own copy by now
    assert engine.policy_version == 3
    assert not torch.equal(policy.state_dict()[NORM], state[NORM])
    leave.set()
    stepping.join()
    monkeypatch.undo()
    (rollout,) = [output.finished for output in engine.step() if output.finished]
    assert rollout.policy_versions.tolist() == [0, 3]
    for name, value in policy.state_dict().items():
        assert torch.equal(value, new.state_dict()[name])
