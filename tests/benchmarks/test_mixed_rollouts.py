"""The benchmark of mixed sampling end to end on a tiny pair, and the random pairs it makes."""

from __future__ import annotations

import pytest

from benchmarks.calibration import calibrate
from benchmarks.machine import Machine
from benchmarks.mixed_rollouts import MIN_ROLLOUTS, SAMPLERS, Plan, measure_pair, workloads
from benchmarks.pairs import Pair, PairOptions, PairUnavailable, build_pair, perturbed
from benchmarks.random_models import EXPERT_120M, POLICY_15M, Character, Shape, random_pair

MACHINE = Machine(device="cpu", dtype="float32", threads=1)
PROMPTS = tuple((3 + i, 7, 2 + i, 5) for i in range(8))
NEW_TOKENS = 12
SMALL = Shape(hidden_size=32, num_layers=2, intermediate_size=64, num_heads=2, num_kv_heads=2)
WIDER = Shape(hidden_size=64, num_layers=3, intermediate_size=96, num_heads=4, num_kv_heads=4)


@pytest.fixture(scope="module")
def report(tiny_llama):
    policy = tiny_llama(1, max_position_embeddings=64)
    pair = Pair(name="tiny", policy=policy, expert=tiny_llama(2), prompts=PROMPTS)
    plan = Plan(machine=MACHINE, batches=(1, 8), samplers=SAMPLERS, new_tokens=NEW_TOKENS, rounds=1)
    return measure_pair(pair, plan)


def rows_of(report, sampler):
    return [row for row in report["rows"] if row["sampler"] == sampler]


def test_every_sampler_has_a_row_for_every_batch_size(report):
    found = [(row["batch"], row["sampler"]) for row in report["rows"]]
    assert found == [(batch, name) for batch in (1, 8) for name in SAMPLERS]
    assert all(row["tokens_per_s"] > 0 for row in report["rows"])


def test_ratios_compare_with_the_floor_and_the_policy_alone(report):
    for row in rows_of(report, "floor"):
        assert row["ratio_to_floor"] == 1.0
    for row in rows_of(report, "policy_only"):
        assert row["ratio_to_policy_only"] == 1.0


def test_only_samplers_with_an_expert_call_it(report):
    for name in ("policy_only", "hf_generate"):
        assert all(row["expert_calls_per_token"] == 0 for row in rows_of(report, name))
    for name in ("lazy", "algorithm1", "naive", "floor"):
        assert all(row["expert_calls_per_token"] > 0 for row in rows_of(report, name))


def test_algorithm_1_asks_less_often_than_the_naive_sampler(report):
    pairs = zip(rows_of(report, "algorithm1"), rows_of(report, "naive"), strict=True)
    for published, naive in pairs:
        assert published["expert_calls_per_token"] < naive["expert_calls_per_token"]


def test_a_lazy_rollout_alone_asks_at_most_once_a_token(report):
    assert rows_of(report, "lazy")[0]["expert_calls_per_token"] <= 1.0


def test_a_round_of_single_rollouts_takes_several_prompts(report, tiny_llama):
    pair = Pair(name="tiny", policy=None, expert=None, prompts=PROMPTS)
    calibration = calibrate(
        tiny_llama(1), tiny_llama(2), PROMPTS, new_tokens=NEW_TOKENS, max_tokens=32
    )
    plan = Plan(machine=MACHINE, batches=(1,), samplers=(), new_tokens=NEW_TOKENS, rounds=1)
    parts = workloads(pair, calibration, plan, batch=1, seed=3)
    assert [part.prompts for part in parts] == [(prompt,) for prompt in PROMPTS[:MIN_ROLLOUTS]]
    assert len({part.seed for part in parts}) == MIN_ROLLOUTS


def test_a_pair_agrees_where_its_layers_add_nothing_and_less_where_they_add_more():
    distances = []
    for context in (1e-6, 0.05, 0.2):
        pair = random_pair(
            SMALL, WIDER, Character(sharpness=5.0, context=context, vocab_size=64, max_tokens=64)
        )
        calibration = calibrate(*pair, PROMPTS, new_tokens=16, max_tokens=64)
        distances.append(calibration.total_variation)
    assert distances[0] < 1e-3
    assert distances[0] < distances[1] < distances[2]


def test_gamma_is_where_one_token_in_twenty_is_gated_for_sure(tiny_llama):
    calibration = calibrate(
        tiny_llama(1), tiny_llama(2), PROMPTS, new_tokens=NEW_TOKENS, max_tokens=32
    )
    assert 0.05 < calibration.mean_weight < 1.0
    assert calibration.mean_entropy < calibration.gamma
    assert calibration.replacement_rate < calibration.total_variation


def test_the_random_expert_has_8_times_the_parameters():
    assert num_parameters_of(EXPERT_120M) / num_parameters_of(POLICY_15M) == pytest.approx(
        8, rel=0.01
    )


def num_parameters_of(shape, vocab_size=1024):
    """Matrices of a Llama with as many key-value heads as heads, and untied embeddings."""
    assert shape.num_heads == shape.num_kv_heads
    width = shape.hidden_size
    layer = 4 * width * width + 3 * width * shape.intermediate_size
    return shape.num_layers * layer + 2 * vocab_size * width


def test_a_perturbed_copy_differs_and_leaves_the_original_alone(tiny_llama):
    model = tiny_llama(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = perturbed(model, sigma=0.1, seed=1)
    assert all((value == before[name]).all() for name, value in model.state_dict().items())
    assert all((value != before[name]).any() for name, value in other.state_dict().items())


def test_a_pair_without_weights_says_what_to_do():
    options = PairOptions(machine=MACHINE, num_prompts=8, smollm2=None)
    with pytest.raises(PairUnavailable, match="--smollm2 or MENTOR_BENCH_SMOLLM2"):
        build_pair("smollm2", options)
