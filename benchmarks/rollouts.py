"""Rollout throughput of the bundled pair: our engine, on-policy and mixed, against `generate`.

    python -m benchmarks.rollouts --json

All samplers answer the same prompts with the same number of new tokens (`ignore_eos`), in one
process, in turns; rates are medians over rounds and ratios are taken within the run, because
machines differ and drift.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from mentor_serve.engines import RolloutRequest, SamplingParams, TorchEngine
from mentor_serve.models.loading import load_model, load_tokenizer
from mentor_serve.rollout.prompts import PromptRenderer
from mentor_serve.rollout.tasks import build_source

GAMMA = 1.0
"""Fixed, so that the gated share does not depend on what was sampled before."""


def measure(rounds: int, batch: int, new_tokens: int) -> dict[str, Any]:
    """Run every sampler `rounds` times over `batch` rollouts of `new_tokens` tokens."""
    policy, expert = load_model("embedded:policy"), load_model("embedded:expert")
    tokenizer = load_tokenizer("embedded:policy")
    engine = TorchEngine(
        policy=policy, expert=expert, tokenizer=tokenizer, max_batch_size=batch, max_model_len=512
    )
    renderer = PromptRenderer(tokenizer, system_prompt="")
    source = build_source(source="reasoning_gym", name="embedded", config={}, seed=0, size=1000)
    prompts = [renderer.render(source.next_task()) for _ in range(max(1, batch // 8))]
    sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)

    gated_shares: list[float] = []

    def ours(*, mixed: bool) -> int:
        requests = [
            RolloutRequest(
                prompt_token_ids=prompt,
                num_samples=batch // len(prompts),
                mixed=mixed,
                gamma=GAMMA,
                seed=i,
                sampling=sampling,
            )
            for i, prompt in enumerate(prompts)
        ]
        rollouts = [rollout for group in engine.generate(requests) for rollout in group]
        num_tokens = sum(rollout.num_tokens for rollout in rollouts)
        if mixed:
            gated_shares.append(sum(rollout.num_gated for rollout in rollouts) / num_tokens)
        return num_tokens

    def theirs() -> int:
        tokenizer.padding_side = "left"
        inputs = tokenizer.pad(
            {"input_ids": [p for p in prompts for _ in range(batch // len(prompts))]},
            return_tensors="pt",
        )
        output = policy.generate(
            **inputs, do_sample=True, min_new_tokens=new_tokens, max_new_tokens=new_tokens
        )
        return int(output.shape[0] * (output.shape[1] - inputs["input_ids"].shape[1]))

    samplers: dict[str, Callable[[], int]] = {
        "on_policy": lambda: ours(mixed=False),
        "mixed": lambda: ours(mixed=True),
        "transformers_generate": theirs,
    }
    rates: dict[str, list[float]] = {name: [] for name in samplers}
    for round_number in range(rounds + 1):
        for name, sampler in samplers.items():
            started = time.perf_counter()
            num_tokens = sampler()
            if round_number:  # the first round warms up
                rates[name].append(num_tokens / (time.perf_counter() - started))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "batch": batch,
        "new_tokens": new_tokens,
        "tokens_per_s": {name: round(value, 1) for name, value in medians.items()},
        "ratio_to_generate": {
            name: round(value / medians["transformers_generate"], 2)
            for name, value in medians.items()
        },
        "gated_share": round(statistics.mean(gated_shares), 3),
        "machine": {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__},
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = measure(arguments.rounds, arguments.batch, arguments.new_tokens)
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    for name, rate in report["tokens_per_s"].items():
        print(
            f"{name:24} {rate:10.0f} tokens/s  {report['ratio_to_generate'][name]:6.2f} x generate"
        )


if __name__ == "__main__":
    main()
