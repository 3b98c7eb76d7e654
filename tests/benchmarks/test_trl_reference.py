"""The outside reference trains the same start on the same problems for the same rewards."""

from __future__ import annotations

import copy

import pytest

from benchmarks import updates
from benchmarks.machine import Machine
from benchmarks.trl_reference import POLICY, Plan, Reference
from benchmarks.updates import TrlUnavailable
from mentor_serve.models.loading import load_tokenizer
from mentor_serve.rollout.prompts import PromptRenderer
from mentor_serve.rollout.tasks import build_source

pytestmark = pytest.mark.filterwarnings("default")  # TRL's own

MACHINE = Machine(device="cpu", dtype="float32", threads=1)
PLAN = Plan(updates=2, prompts=3, rollouts=4, problems=4, seed=5, micro_batches=2)


@pytest.fixture
def reference():
    pytest.importorskip("trl")
    return Reference(PLAN, MACHINE)


def changes(model, before):
    """Largest change of any weight."""
    after = model.state_dict()
    return max((after[name] - tensor).abs().max().item() for name, tensor in before.items())


def test_a_run_reports_every_update_and_what_it_was_worth(reference):
    before = copy.deepcopy(reference.model.state_dict())
    report = reference.run()
    assert [row["update"] for row in report["rows"]] == [1, 2]
    for row in report["rows"]:
        expected = 0.9 * row["mean_accuracy"] + 0.1 * row["mean_format"]
        assert row["mean_reward"] == pytest.approx(expected, abs=1e-4)
        assert row["learning_rate"] == PLAN.learning_rate
        assert 1 <= row["mean_tokens"] <= PLAN.max_new_tokens
        assert row["grad_norm"] > 0
    # Two steps of AdamW move no weight by much more than twice the learning rate.
    assert 0 < changes(reference.model, before) < 2.1 * PLAN.learning_rate
    for measured in (report["before"], report["after"]):
        assert set(measured) == {"greedy_pass_at_1", "avg_at_8"}
        for metric in measured.values():
            assert 0 <= metric["low"] <= metric["value"] <= metric["high"] <= 1


def test_trl_reads_the_prompts_that_our_engine_would_in_the_order_of_the_source(
    reference, tmp_path
):
    trainer = reference.trainer(tmp_path)
    (batch, *_) = trainer.get_train_dataloader()
    renderer = PromptRenderer(load_tokenizer(POLICY))
    source = build_source(source="reasoning_gym", name="embedded", seed=PLAN.seed)
    expected = [renderer.render(source.next_task()) for _ in range(PLAN.prompts)]
    repeated = [ids for ids in expected for _ in range(PLAN.rollouts)]
    assert trainer._tokenize_prompts([item["prompt"] for item in batch])[0] == repeated


def test_no_problem_is_both_trained_on_and_measured_on(reference):
    assert len({task.prompt for task in reference.tasks}) > 1
    assert {task.prompt for task in reference.tasks}.isdisjoint(
        task.prompt for task in reference._held_out
    )


def test_rewards_are_the_verifiers(reference):
    answer = reference.tasks[2].answer
    logged: dict[str, list[float]] = {"accuracy": [], "format_score": []}
    texts = [
        f"<think>so</think>\\boxed{{{answer}}}",
        f"<think>so</think>\\boxed{{{answer}1}}",
        f"\\boxed{{{answer}}}",
    ]
    tokenizer = load_tokenizer(POLICY)
    rewards = reference.reward_function()(
        completion_ids=[[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts],
        task_index=[2, 2, 2],
        log_metric=lambda name, value: logged[name].append(value),
        prompts=None,
    )
    assert rewards == pytest.approx([1.0, 0.1, 0.0])
    assert logged == {"accuracy": [1.0, 0.0, 0.0], "format_score": [1.0, 1.0, 0.0]}


def test_a_batch_that_cannot_be_cut_evenly_is_cut_into_fewer_parts(tmp_path):
    pytest.importorskip("trl")
    plan = Plan(updates=1, prompts=1, rollouts=3, problems=1, micro_batches=2)
    arguments = Reference(plan, MACHINE).trainer(tmp_path).args
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (3, 1)
    assert arguments.generation_batch_size == 3


def test_without_trl_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(updates, "find_spec", lambda name: None)
    with pytest.raises(TrlUnavailable, match=r"mentor-serve\[benchmark\]"):
        Reference(PLAN, MACHINE)
