"""apps/paper.toml and apps/qwen2.5-7b.toml say what appendix B of the paper says."""

from __future__ import annotations

import tomllib
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from mentor_serve.settings import Settings, load_settings

APPS = Path(__file__).resolve().parents[2] / "apps"
METHOD, MACHINE = APPS / "paper.toml", APPS / "qwen2.5-7b.toml"

PAPER = {
    # Rollouts.
    "guidance.method": "mentor",
    "rollout.num_on_policy": 8,
    "rollout.num_mixed": 4,
    "rollout.temperature": 1.0,
    "rollout.max_new_tokens": 8192,
    # When the expert speaks, and how its rollouts count.
    "guidance.entropy_quantile": 0.95,
    "guidance.initial_gamma": 999.0,
    "guidance.gamma_floor": 0.0,
    "guidance.alpha_initial": 1.0,
    "guidance.alpha_steps": 120,
    "guidance.reward_range": 1.0,
    "expert.num_draft_tokens": 4,
    # Updates.
    "learner.prompts_per_step": 128,
    "learner.mini_batch_prompts": 64,
    "learner.learning_rate": 1e-6,
    "learner.learning_rate_decay_steps": 0,
    "learner.weight_decay": 0.01,
    "learner.max_grad_norm": 1.0,
    "learner.clip_low": 0.2,
    "learner.clip_high": 0.28,
    "learner.advantages": "grpo",
    "learner.mixed_ratio": "policy",
    "learner.mask_truncated": False,
    "learner.dynamic_sampling": False,
    "learner.lora_rank": 0,
    # Rewards.
    "reward.accuracy_weight": 0.9,
    "reward.format_weight": 0.1,
    "reward.verifier": "math",
    # Evaluation.
    "evaluation.temperature": 0.6,
    "evaluation.num_samples": 32,
    # Models and problems.
    "policy.model": "Qwen/Qwen2.5-7B",
    "expert.model": "open-r1/OpenR1-Qwen-7B",
    "tasks.source": "jsonl",
}


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    import os

    for name in list(os.environ):
        if name.startswith("MENTOR_SERVE_"):
            monkeypatch.delenv(name)
    return load_settings([METHOD, MACHINE])


def value_of(settings: Settings, key: str) -> Any:
    return reduce(getattr, key.split("."), settings)


@pytest.mark.parametrize(("key", "expected"), PAPER.items())
def test_the_papers_settings(settings: Settings, key: str, expected: object) -> None:
    assert value_of(settings, key) == expected


def test_the_system_prompt_asks_for_the_papers_format(settings: Settings) -> None:
    prompt = settings.tasks.system_prompt
    assert prompt.index("<think>") < prompt.index("</think>") < prompt.index("\\boxed{}")


def test_prompts_have_room_beside_the_longest_response(settings: Settings) -> None:
    assert settings.policy.max_model_len - settings.rollout.max_new_tokens == 2048


def test_the_machine_file_leaves_the_method_alone() -> None:
    method, machine = (
        tomllib.loads(path.read_text(encoding="utf-8")) for path in (METHOD, MACHINE)
    )
    for section, values in method.items():
        assert values.keys().isdisjoint(machine.get(section, {})), section


def test_the_machine_file_fills_eight_devices(settings: Settings) -> None:
    policy, learner = settings.policy, settings.learner
    assert policy.num_replicas * policy.num_gpus == 4
    assert learner.num_learners * learner.num_gpus_per_learner + learner.num_gpus == 4


@pytest.mark.parametrize("machine", [[], [APPS / "one-gpu.toml"]], ids=["cpu", "one-gpu"])
def test_the_small_recipe_keeps_to_the_paper_but_for_sizes(
    monkeypatch: pytest.MonkeyPatch, machine: list[Path]
) -> None:
    for name in ("POLICY", "EXPERT"):
        monkeypatch.setenv(f"MENTOR_SERVE_{name}__MODEL", f"/somewhere/{name.lower()}")
    small = load_settings([APPS / "smollm2-mentor.toml", *machine])
    assert (small.policy.model, small.expert.model) == ("/somewhere/policy", "/somewhere/expert")
    other = {key for key, expected in PAPER.items() if value_of(small, key) != expected}
    assert other == {
        "rollout.max_new_tokens",
        "learner.prompts_per_step",
        "learner.mini_batch_prompts",
        "learner.learning_rate",
        "reward.verifier",
        "evaluation.num_samples",
        "policy.model",
        "expert.model",
        "tasks.source",
    }
    assert small.learner.prompts_per_step == 2 * small.learner.mini_batch_prompts
