"""TorchEngine: records against plain transformers, batching, admission, stops."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from mentor_serve.core.entropy import token_entropy
from mentor_serve.core.gate import guidance_weight
from mentor_serve.engines import RolloutRequest, SamplingParams, TorchEngine
from mentor_serve.engines.expert import ExpertServer
from mentor_serve.errors import (
    ConfigError,
    EngineError,
    ExpertUnavailable,
    InvalidRequest,
    VocabularyMismatch,
)
from mentor_serve.types import StopReason, TokenSource

PROMPT = [4, 14, 5, 18]


def request(prompt=PROMPT, *, max_new_tokens=12, mixed=False, gamma=1.5, **options):
    sampling_names = ("temperature", "top_p", "top_k", "stop", "stop_token_ids", "top_logprobs")
    sampling = {name: options.pop(name) for name in sampling_names if name in options}
    ignore_eos = options.pop("ignore_eos", True)
    return RolloutRequest(
        prompt_token_ids=prompt,
        mixed=mixed,
        gamma=gamma,
        sampling=SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=ignore_eos, **sampling),
        **options,
    )


def teacher_forced(model, prompt, response, temperature=1.0):
    """Log-probabilities [T, V] of plain transformers at each position of a response."""
    tokens = torch.tensor([[*prompt, *response.tolist()]])
    with torch.no_grad():
        logits = model(tokens).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


def step_through(engine):
    outputs = []
    while engine.has_unfinished():
        outputs.append(engine.step())
    return outputs


@pytest.mark.parametrize("is_remote", [False, True], ids=["colocated", "remote"])
def test_records_agree_with_a_teacher_forced_pass(tiny_pair, is_remote):
    policy, expert = tiny_pair
    engine = TorchEngine(policy, ExpertServer(expert) if is_remote else expert, max_batch_size=3)
    wanted = [
        request(mixed=True, num_samples=3, seed=1, temperature=0.8, record_mixed=True),
        request([7] * 20, mixed=True, num_samples=2, seed=2, max_new_tokens=40, record_mixed=True),
    ]
    for asked, rollouts in zip(wanted, engine.generate(wanted), strict=True):
        temperature = asked.sampling.temperature
        for rollout in rollouts:
            ids = torch.tensor(rollout.token_ids).long()[:, None]
            p = teacher_forced(policy, asked.prompt_token_ids, rollout.token_ids, temperature)
            q = teacher_forced(expert, asked.prompt_token_ids, rollout.token_ids, temperature)
            entropies = token_entropy(p)
            weights = guidance_weight(entropies, asked.gamma)
            mixed = (1 - weights)[:, None] * p.exp() + weights[:, None] * q.exp()
            for recorded, expected in (
                (rollout.policy_logprobs, p.gather(1, ids)[:, 0]),
                (rollout.expert_logprobs, q.gather(1, ids)[:, 0]),
                (rollout.mixed_logprobs, mixed.log().gather(1, ids)[:, 0]),
                (rollout.entropies, entropies),
                (rollout.weights, weights),
            ):
                np.testing.assert_allclose(recorded, expected.numpy(), atol=1e-4)
            for item in rollout.interventions:
                at = item.position
                assert rollout.sources[at] == TokenSource.EXPERT
                assert rollout.token_ids[at] == item.chosen_token_id != item.proposed_token_id
                assert item.policy_logprob == pytest.approx(
                    float(p[at, item.proposed_token_id]), abs=1e-4
                )
                assert item.expert_logprob == pytest.approx(
                    float(q[at, item.proposed_token_id]), abs=1e-4
                )
            assert rollout.num_interventions == len(rollout.interventions)
    assert engine.stats.interventions > 0


@pytest.mark.parametrize(
    "family", ["gqa", "tied", "eager", "qwen2", "gpt2"], ids=lambda family: family
)
def test_any_full_attention_model_matches_plain_transformers(tiny_llama, family):
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(4)
    if family == "qwen2":
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=32,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                initializer_range=0.5,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    elif family == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=32,
                n_embd=16,
                n_layer=2,
                n_head=2,
                n_positions=64,
                initializer_range=0.5,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    else:
        model = tiny_llama(5, num_kv_heads=1, tie_word_embeddings=family == "tied")
        if family == "eager":
            model.set_attn_implementation("eager")
    engine = TorchEngine(model.eval(), max_batch_size=4)
    prompts = ([3], [5, 6, 7, 8, 9], list(range(2, 30)))
    rollouts = engine.generate([request(prompt, num_samples=2, seed=9) for prompt in prompts])
    for prompt, pair in zip(prompts, rollouts, strict=True):
        for rollout in pair:
            p = teacher_forced(model, prompt, rollout.token_ids)
            expected = p.gather(1, torch.tensor(rollout.token_ids).long()[:, None])[:, 0]
            np.testing.assert_allclose(rollout.policy_logprobs, expected.numpy(), atol=1e-4)


def test_a_sample_is_the_same_alone_and_in_any_batch(tiny_pair):
    policy, expert = tiny_pair
    wanted = [
        request(
            [3 + i] * (1 + 5 * i), seed=i, num_samples=2, mixed=i % 2 == 0, max_new_tokens=5 + 9 * i
        )
        for i in range(5)
    ]
    together = TorchEngine(policy, expert, max_batch_size=4).generate(wanted)
    for asked, rollouts in zip(wanted, together, strict=True):
        (alone,) = TorchEngine(policy, expert, max_batch_size=1).generate([asked])
        assert [r.token_ids.tolist() for r in rollouts] == [r.token_ids.tolist() for r in alone]
        assert rollouts[0].token_ids.tolist() != rollouts[1].token_ids.tolist()


def test_a_closed_gate_samples_the_policy_token_for_token(tiny_pair):
    engine = TorchEngine(*tiny_pair)
    mixed, plain = engine.generate(
        [request(mixed=True, gamma=1e30, num_samples=3, seed=4), request(num_samples=3, seed=4)]
    )
    for ours, theirs in zip(mixed, plain, strict=True):
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
        assert ours.num_gated == 0
        assert np.isnan(ours.expert_logprobs).all()
        assert np.isnan(ours.mixed_logprobs).all()
    assert engine.stats.expert_calls == 0


def test_the_expert_is_silent_where_no_coin_asks(tiny_pair):
    engine = TorchEngine(*tiny_pair)
    (rollouts,) = engine.generate([request(mixed=True, gamma=6.0, num_samples=8, seed=3)])
    for rollout in rollouts:
        asked = rollout.sources != TokenSource.POLICY
        np.testing.assert_array_equal(np.isnan(rollout.expert_logprobs), ~asked)
        np.testing.assert_array_equal(np.isnan(rollout.mixed_logprobs), ~asked)
    assert 0 < engine.stats.gated_tokens < engine.stats.policy_tokens


def test_a_constant_weight_takes_the_place_of_the_gate(tiny_pair):
    engine = TorchEngine(*tiny_pair)
    (rollouts,) = engine.generate(
        [request(mixed=True, gamma=6.0, constant_weight=0.25, num_samples=64, seed=3)]
    )
    weights = np.concatenate([rollout.weights for rollout in rollouts])
    np.testing.assert_array_equal(weights, np.float32(0.25))
    # 768 coins of 0.25: 5 standard deviations are 0.08.
    num_gated = sum(rollout.num_gated for rollout in rollouts)
    assert abs(num_gated / len(weights) - 0.25) < 0.08


def test_a_first_weight_counts_for_the_first_token_alone(tiny_pair):
    engine = TorchEngine(*tiny_pair)
    same = {"mixed": True, "gamma": 6.0, "num_samples": 4, "seed": 3}
    forced, silent = engine.generate(
        [request(first_weight=1.0, **same), request(first_weight=0.0, **same)]
    )
    for rollout, weight in zip([*forced, *silent], [1.0] * 4 + [0.0] * 4, strict=True):
        assert rollout.weights[0] == weight
        gate = guidance_weight(torch.from_numpy(rollout.entropies), 6.0).numpy()
        np.testing.assert_array_equal(rollout.weights[1:], gate[1:])
    assert all(rollout.sources[0] != TokenSource.POLICY for rollout in forced)
    assert all(rollout.sources[0] == TokenSource.POLICY for rollout in silent)


def test_a_prompt_is_prefilled_once_for_all_its_rollouts(tiny_pair):
    engine = TorchEngine(*tiny_pair, max_batch_size=16, run_ahead=0)
    prompt = list(range(2, 22))
    engine.generate(
        [request(prompt, num_samples=4), request(prompt, num_samples=3, mixed=True, gamma=0.0)]
    )
    # All but the last prompt token, which the first decode step reads.
    assert engine.stats.prefill_tokens == 19
    assert engine.stats.shared_prefill_tokens == 6 * 19
    # The expert shares it too: 19 once, then 12 tokens (the last of the prompt, 11 generated) x 3.
    assert engine.stats.expert_tokens == 19 + 3 * 12


def test_greedy_takes_the_most_likely_token_and_records_at_temperature_1(tiny_pair):
    policy, _ = tiny_pair
    (rollouts,) = TorchEngine(policy).generate([request(temperature=0.0, num_samples=2)])
    p = teacher_forced(policy, PROMPT, rollouts[0].token_ids)
    assert rollouts[0].token_ids.tolist() == p.argmax(-1).tolist()
    assert rollouts[1].token_ids.tolist() == rollouts[0].token_ids.tolist()
    np.testing.assert_allclose(rollouts[0].policy_logprobs, p.max(-1).values.numpy(), atol=1e-4)


def test_truncated_sampling_stays_inside_and_records_the_full_distribution(tiny_pair):
    policy, _ = tiny_pair
    engine = TorchEngine(policy, max_batch_size=512)
    asked = [
        request(num_samples=400, max_new_tokens=2, top_k=2, seed=1),
        request(num_samples=400, max_new_tokens=2, top_p=0.5, seed=2),
        request(num_samples=400, max_new_tokens=2, seed=3),
    ]
    by_k, by_p, free = engine.generate(asked)
    p = teacher_forced(policy, PROMPT, np.array([0]))[0].exp()
    ordered = p.sort(descending=True)
    nucleus = ordered.indices[: int((ordered.values.cumsum(0) < 0.5).sum()) + 1].tolist()
    assert {int(r.token_ids[0]) for r in by_k} == set(ordered.indices[:2].tolist())
    assert {int(r.token_ids[0]) for r in by_p} == set(nucleus)
    assert len({int(r.token_ids[0]) for r in free}) > len(nucleus)
    for rollout in by_k[:20]:
        assert rollout.policy_logprobs[0] == pytest.approx(
            math.log(p[rollout.token_ids[0]]), abs=1e-4
        )


def test_prompt_and_top_logprobs_are_recorded_on_request(tiny_pair):
    policy, _ = tiny_pair
    prompt = [3] + [5, 8, 13, 21] * 70
    policy.config.max_position_embeddings = 512
    engine = TorchEngine(policy)
    asked = request(prompt, prompt_logprobs=True, top_logprobs=3, max_new_tokens=4, num_samples=2)
    (rollouts,) = engine.generate([asked])
    expected = teacher_forced(policy, prompt[:1], np.array(prompt[1:]))
    expected = expected.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].numpy()
    for rollout in rollouts:
        assert math.isnan(rollout.prompt_logprobs[0])
        np.testing.assert_allclose(rollout.prompt_logprobs[1:], expected, atol=1e-4)
        top = teacher_forced(policy, prompt, rollout.token_ids).topk(3, dim=-1)
        assert [[t for t, _ in row] for row in rollout.top_logprobs] == top.indices.tolist()
        recorded = [[value for _, value in row] for row in rollout.top_logprobs]
        np.testing.assert_allclose(recorded, top.values.numpy(), atol=1e-4)
    (plain,) = engine.generate([request()])
    assert plain[0].prompt_logprobs is None
    assert plain[0].top_logprobs is None


def test_end_tokens_stop_tokens_and_the_limit_end_a_rollout(tiny_pair):
    policy, _ = tiny_pair
    engine = TorchEngine(policy, eos_token_ids=[1], max_model_len=24)
    (free,) = engine.generate([request(seed=5, max_new_tokens=1000)])
    assert free[0].num_tokens == 20
    assert free[0].stop_reason is StopReason.LENGTH
    tokens = free[0].token_ids.tolist()
    stop = tokens[3]
    (stopped,) = engine.generate([request(seed=5, stop_token_ids=(stop,))])
    assert stopped[0].token_ids.tolist() == tokens[: tokens.index(stop) + 1]
    assert stopped[0].stop_reason is StopReason.STOP
    ending = TorchEngine(policy, eos_token_ids=[stop])
    (ended,) = ending.generate([request(seed=5, ignore_eos=False)])
    assert ended[0].token_ids.tolist() == tokens[: tokens.index(stop) + 1]
    assert ended[0].stop_reason is StopReason.EOS


def test_the_models_own_end_token_is_the_default(tiny_llama):
    engine = TorchEngine(tiny_llama(1))
    (rollouts,) = engine.generate([request(num_samples=30, ignore_eos=False, max_new_tokens=40)])
    ended = [rollout for rollout in rollouts if rollout.stop_reason is StopReason.EOS]
    assert ended
    assert all(rollout.token_ids[-1] == 1 for rollout in ended)
    assert all(1 not in rollout.token_ids[:-1] for rollout in rollouts)


def test_higher_priority_is_admitted_first_then_the_earlier(tiny_pair):
    engine = TorchEngine(tiny_pair[0], max_batch_size=1)
    ids = [engine.submit(request(max_new_tokens=1, priority=p)) for p in (0, 0, 1)]
    order = [output.request_id for outputs in step_through(engine) for output in outputs]
    assert order == [ids[2], ids[0], ids[1]]


def test_cancelling_ends_running_and_waiting_rollouts_in_the_next_step(tiny_pair):
    engine = TorchEngine(*tiny_pair, max_batch_size=3, run_ahead=0)
    doomed = engine.submit(request(num_samples=4, mixed=True))
    other = engine.submit(request(seed=8))
    settled = [engine.step() for _ in range(2)]
    num_settled = Counter(o.sample_index for outputs in settled for o in outputs)
    engine.cancel(doomed)
    engine.cancel(12345)
    outputs = engine.step()
    ended = {o.sample_index: o.finished for o in outputs if o.request_id == doomed}
    assert sorted(ended) == [0, 1, 2, 3]
    assert [ended[i].num_tokens for i in range(4)] == [num_settled[i] for i in range(4)]
    assert num_settled[0] > 0
    assert num_settled[3] == 0
    assert all(rollout.stop_reason is StopReason.CANCELLED for rollout in ended.values())
    finished = [o.finished for outputs in step_through(engine) for o in outputs if o.finished]
    (alone,) = TorchEngine(*tiny_pair).generate([request(seed=8)])
    assert [r.token_ids.tolist() for r in finished] == [alone[0].token_ids.tolist()]
    assert not engine.has_unfinished()
    assert other != doomed


def test_outputs_stream_every_token_once(tiny_pair):
    engine = TorchEngine(tiny_pair[0], max_batch_size=2)
    engine.submit(request(num_samples=3, max_new_tokens=5))
    streamed: dict[int, list[int]] = {}
    for outputs in step_through(engine):
        for output in outputs:
            tokens = streamed.setdefault(output.sample_index, [])
            tokens += output.new_token_ids
            assert output.num_tokens == len(tokens)
            if output.finished is not None:
                assert output.finished.token_ids.tolist() == tokens
    assert sorted(map(len, streamed.values())) == [5, 5, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "at least one token"),
        ({"prompt": [3, 32]}, "0 to 31, got 32"),
        ({"prompt": [-1]}, "got -1"),
        ({"prompt": [3] * 256}, "at most 255"),
        ({"num_samples": 0}, "num_samples: expected at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_logprobs": 33}, "top_logprobs"),
        ({"stop_token_ids": (99,)}, "stop_token_ids"),
        ({"stop": ("x",)}, "tokenizer"),
        ({"mixed": True, "gamma": -0.5}, "gamma"),
        (
            {"mixed": True, "constant_weight": 1.5},
            r"constant_weight: expected a number in \[0, 1\]",
        ),
        ({"mixed": True, "first_weight": math.nan}, "first_weight"),
        ({"mixed": True, "temperature": 0.0}, "temperature > 0"),
        ({"mixed": True, "top_p": 0.9}, "top_p = 1"),
        ({"mixed": True, "top_k": 5}, "top_k = 0"),
    ],
)
def test_impossible_requests_are_refused_at_submission(tiny_pair, options, message):
    engine = TorchEngine(*tiny_pair)
    with pytest.raises(InvalidRequest, match=message):
        engine.submit(request(**options))
    assert not engine.has_unfinished()


def test_mixed_requests_need_an_expert(tiny_pair):
    engine = TorchEngine(tiny_pair[0])
    assert not engine.has_expert
    with pytest.raises(InvalidRequest, match="no expert"):
        engine.submit(request(mixed=True))


def test_generate_refuses_to_run_beside_submitted_requests(tiny_pair):
    engine = TorchEngine(tiny_pair[0])
    engine.submit(request())
    with pytest.raises(EngineError, match="idle"):
        engine.generate([request()])


def test_models_without_full_attention_are_refused():
    from transformers import MistralConfig, MistralForCausalLM

    small = {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    model = MistralForCausalLM(MistralConfig(**small, sliding_window=16))
    with pytest.raises(EngineError, match=r"sliding_attention.*16"):
        TorchEngine(model)
    assert TorchEngine(model, max_model_len=16).max_model_len == 16


def test_impossible_engines_are_refused(tiny_llama):
    with pytest.raises(ConfigError, match="vocabulary"):
        TorchEngine(tiny_llama(1), tiny_llama(2, vocab_size=31))
    with pytest.raises(ConfigError, match="max_model_len"):
        TorchEngine(tiny_llama(1), max_model_len=257)
    with pytest.raises(ConfigError, match="max_batch_size"):
        TorchEngine(tiny_llama(1), max_batch_size=0)
    with pytest.raises(ConfigError, match="eos_token_ids"):
        TorchEngine(tiny_llama(1), eos_token_ids=[32])


def test_models_may_be_named_by_directory(tiny_pair, tiny_tokenizer, tmp_path):
    names = [tmp_path / "policy", tmp_path / "expert"]
    for model, name in zip(tiny_pair, names, strict=True):
        model.save_pretrained(name)
        tiny_tokenizer.save_pretrained(name)
    named = TorchEngine(str(names[0]), names[1])
    wanted = [request(mixed=True, gamma=0.0)]
    (ours,), (theirs,) = named.generate(wanted), TorchEngine(*tiny_pair).generate(wanted)
    assert ours[0].token_ids.tolist() == theirs[0].token_ids.tolist()
    assert ours[0].text == tiny_tokenizer.decode(ours[0].token_ids, skip_special_tokens=True)
    assert theirs[0].text is None


def test_named_models_with_different_words_are_refused(tiny_pair, tiny_tokenizer, tmp_path):
    names = [tmp_path / "policy", tmp_path / "expert"]
    for model, name in zip(tiny_pair, names, strict=True):
        model.save_pretrained(name)
        tiny_tokenizer.save_pretrained(name)
    file = names[1] / "tokenizer.json"
    file.write_text(file.read_text().replace('"kl"', '"lk"'))
    with pytest.raises(VocabularyMismatch, match="kl"):
        TorchEngine(names[0], names[1])


class FailingExpert:
    """Answers a number of calls, then is gone."""

    def __init__(self, server, num_answers, *, garbled=False):
        self.server = server
        self.num_answers = num_answers
        self.garbled = garbled

    def advise(self, queries):
        if self.num_answers == 0:
            if self.garbled:
                return []
            raise ExpertUnavailable("gone")
        self.num_answers -= 1
        return self.server.advise(queries)

    def release(self, sequence_ids):
        raise ExpertUnavailable("gone")


@pytest.mark.parametrize("garbled", [False, True], ids=["unavailable", "garbled"])
def test_a_lost_expert_leaves_the_rest_of_the_rollout_to_the_policy(tiny_pair, garbled):
    policy, expert = tiny_pair
    client = FailingExpert(ExpertServer(expert), 3, garbled=garbled)
    engine = TorchEngine(policy, client)
    (rollouts,) = engine.generate([request(mixed=True, gamma=0.0, seed=6)])
    rollout = rollouts[0]
    assert rollout.expert_lost
    assert rollout.num_tokens == 12
    first_lost = int(np.flatnonzero(rollout.weights == 0)[0])
    assert 0 < first_lost <= 3
    assert not rollout.weights[first_lost:].any()
    assert not rollout.sources[first_lost:].any()
    assert np.isnan(rollout.expert_logprobs[first_lost:]).all()
    assert (rollout.weights[:first_lost] == 1).all()


def test_weights_that_change_mid_sequence_are_stamped_and_used(tiny_llama):
    old, new = tiny_llama(1), tiny_llama(7)
    engine = TorchEngine(tiny_llama(1))
    engine.submit(request(seed=3, max_new_tokens=6))
    for _ in range(2):
        engine.step()
    engine.load_weights(new.state_dict(), version=5)
    assert engine.policy_version == 5
    (rollout,) = [o.finished for outputs in step_through(engine) for o in outputs if o.finished]
    assert rollout.policy_versions.tolist() == [0, 0, 5, 5, 5, 5]
    before = teacher_forced(old, PROMPT, rollout.token_ids)
    ids = torch.tensor(rollout.token_ids).long()[:, None]
    expected = before.gather(1, ids)[:2, 0].numpy()
    np.testing.assert_allclose(rollout.policy_logprobs[:2], expected, atol=1e-4)
    assert abs(rollout.policy_logprobs[2:] - before.gather(1, ids)[2:, 0].numpy()).max() > 0.1
    (fresh,) = engine.generate([request(seed=4)])
    p = teacher_forced(new, PROMPT, fresh[0].token_ids)
    expected = p.gather(1, torch.tensor(fresh[0].token_ids).long()[:, None])[:, 0].numpy()
    np.testing.assert_allclose(fresh[0].policy_logprobs, expected, atol=1e-4)
    assert engine.stats.weight_swaps == 1


def test_a_prompt_read_under_old_weights_is_not_shared_after_a_swap(tiny_llama):
    new = tiny_llama(7)
    engine = TorchEngine(tiny_llama(1), max_batch_size=4)
    prompt = list(range(2, 22))
    engine.submit(request(prompt, seed=1, max_new_tokens=20))
    engine.step()
    engine.load_weights(new.state_dict(), version=1)
    late = engine.submit(request(prompt, seed=2, max_new_tokens=4))
    outputs = [o for outputs in step_through(engine) for o in outputs if o.request_id == late]
    rollout = outputs[-1].finished
    p = teacher_forced(new, prompt, rollout.token_ids)
    expected = p.gather(1, torch.tensor(rollout.token_ids).long()[:, None])[:, 0].numpy()
    np.testing.assert_allclose(rollout.policy_logprobs, expected, atol=1e-4)
    assert engine.stats.shared_prefill_tokens == 0
