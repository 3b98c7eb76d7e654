"""The expert's worked solutions are right, and the command makes a model that writes them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from apps import smollm2_expert
from apps.smollm2_expert import DEFAULT_CONFIG, WorkedSolutions, worked_solution
from mentor_serve.errors import ConfigError
from mentor_serve.models.loading import load_model, load_tokenizer
from mentor_serve.rollout.prompts import PromptRenderer
from mentor_serve.rollout.tasks import build_source
from mentor_serve.rollout.tasks.reasoning_gym import is_held_out
from mentor_serve.rollout.verifiers import VerifierSpec, build_verifier
from mentor_serve.settings import load_settings

BASE = "embedded:policy"
"""Stands in for SmolLM2: it knows sums, and writes them another way."""


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch):
    import os

    for name in list(os.environ):
        if name.startswith("MENTOR_SERVE_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def settings():
    return load_settings([DEFAULT_CONFIG])


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command: (exit code, standard output, standard error)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["smollm2_expert", *arguments])
        code = smollm2_expert.main()
        return code, *capsys.readouterr()

    return call


def test_every_solution_is_right_in_the_format_of_the_verifier(settings):
    verifier = build_verifier(VerifierSpec())
    tasks = settings.tasks
    source = build_source(source=tasks.source, name=tasks.name, config=tasks.config, seed=3)
    for task in [source.next_task() for _ in range(200)]:
        entry = task.metadata["reasoning_gym"]["entry"]
        text = worked_solution(entry["metadata"]["expression"])
        verifier.prepare(task)
        assert verifier.score(task, text).reward == pytest.approx(1.0)
        lines = text.split("\n")[1:-2]
        assert len(lines) == entry["metadata"]["num_terms"] - 1
        for line in lines:
            left, right = line.split(" = ")
            first, sign, second = left.split(" ")
            value = int(first) + int(second) if sign == "+" else int(first) - int(second)
            assert value == int(right)


def test_chains_that_are_not_sums_are_refused():
    assert worked_solution("7") == "<think>\n7\n</think>\n\\boxed{7}"
    for expression in ("3 * 4", "3 +", "three"):
        with pytest.raises(ValueError):  # noqa: PT011 - three messages, two of them Python's own
            worked_solution(expression)


def test_examples_are_the_prompts_of_the_service_and_never_held_out(settings):
    tokenizer = load_tokenizer(BASE)
    solutions = WorkedSolutions(settings, tokenizer)
    draw, other = solutions.draws(0), solutions.draws(1)
    examples = [draw() for _ in range(300)]
    prompts = {tokenizer.decode(e.prompt_token_ids) for e in examples}
    held_out = solutions.held_out(50)
    assert prompts.isdisjoint(tokenizer.decode(e.prompt_token_ids) for e in held_out)
    assert [e.prompt_token_ids for e in examples[:20]] != [
        other().prompt_token_ids for _ in range(20)
    ]
    tasks = settings.tasks
    service = build_source(source=tasks.source, name=tasks.name, config=tasks.config)
    asked = service.holdout(50)
    renderer = PromptRenderer(tokenizer, tasks.system_prompt)
    assert [e.prompt_token_ids for e in held_out] == [renderer.render(task) for task in asked]
    assert all(is_held_out(task.prompt) for task in asked)
    for example in examples[:5]:
        *text, end = example.token_ids
        assert end == tokenizer.eos_token_id
        assert tokenizer.decode(text).endswith("}")


def test_templates_that_open_the_think_block_are_not_opened_twice(settings):
    tokenizer = load_tokenizer(BASE)
    tokenizer.chat_template += "{%- if add_generation_prompt -%}<think>{{ '\\n' }}{%- endif -%}"
    renderer = PromptRenderer(tokenizer)
    assert renderer.response_prefix == "<think>\n"
    example = WorkedSolutions(settings, tokenizer).draws(0)()
    text = tokenizer.decode([*example.prompt_token_ids, *example.token_ids])
    assert text.count("<think>") == 1


@pytest.mark.slow
def test_the_command_makes_an_expert_that_the_service_can_load(run, tmp_path):
    out = tmp_path / "expert"
    arguments = ("--base", BASE, "--device", "cpu", "--steps", "60", "--batch-size", "16")
    sizes = ("--learning-rate", "3e-3", "--problems", "6", "--samples", "2", "--json")
    code, printed, _ = run(*arguments, *sizes, "--out", str(out))
    assert code == 0
    report = json.loads(printed)
    assert len(report["losses"]) == report["num_steps"] == 60
    assert report["held_out_loss"]["expert"] < 0.5 * report["held_out_loss"]["base"]
    for name in ("base", "expert"):
        assert {"greedy_pass@1", "greedy_mean_format", "avg@2", "pass@2"} <= set(report[name])
        for measure in report[name].values():
            assert measure["low"] <= measure["value"] <= measure["high"]
    base, expert = load_model(BASE).state_dict(), load_model(out).state_dict()
    assert base.keys() == expert.keys()
    assert not all(torch.equal(base[name], expert[name]) for name in base)
    assert load_tokenizer(out).get_vocab() == load_tokenizer(BASE).get_vocab()
    code, _, error = run(*arguments, *sizes, "--out", str(out))
    assert code == 2
    assert "does not exist yet" in error


def test_wrong_arguments_are_one_line(run, tmp_path):
    settings = tmp_path / "other.toml"
    settings.write_text('[tasks]\nname = "basic_arithmetic"\n')
    common = ("--base", BASE, "--out", str(tmp_path / "expert"), "--device", "cpu")
    cases = [
        (("--config", str(settings)), "which worked solutions exist for"),
        (("--config", str(tmp_path / "absent.toml")), "cannot read config file"),
        (("--steps", "0"), "num_steps: expected a number above 0"),
        (("--problems", "0"), "evaluation tasks, got 0"),
    ]
    for arguments, part in cases:
        code, printed, error = run(*common, *arguments)
        assert code == 2
        assert printed == ""
        assert part in error.splitlines()[-1]
    assert not (tmp_path / "expert").exists()


def test_solutions_that_the_limit_would_cut_off_are_refused(run, tmp_path):
    settings = tmp_path / "short.toml"
    settings.write_text(Path(DEFAULT_CONFIG).read_text().replace("= 96", "= 8"))
    code, _, error = run(
        *("--base", BASE, "--out", str(tmp_path / "expert"), "--device", "cpu"),
        *("--config", str(settings)),
    )
    assert code == 2
    assert "rollout.max_new_tokens (8) cuts worked solutions" in error


def test_a_tokenizer_without_an_end_token_is_refused(settings):
    tokenizer = load_tokenizer(BASE)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="an end token"):
        WorkedSolutions(settings, tokenizer)
