"""The engines beside each other: TorchEngine, VllmEngine, vLLM's own `LLM`, `transformers`.

    python -m benchmarks.engines --json --smollm2 DIR

Each answers batches of one prompt with `--new-tokens` sampled tokens and no ends. `vllm_own` is
`LLM.generate` without anything of this project. The mixed contenders sample pi_mix with an expert
of perturbed weights, once with a gate that is open at most tokens (`--gamma`) and once with one
that is nearly closed (the paper's first step, 999). CPU time counts every thread of this process
and says more than the clock where others use the machine. `swap_stall_s` is how long the largest
batch, in mid-sequence, waits for its next token when new weights come, less a step without them.

Models: the bundled pair, or SmolLM2-135M if it is named (see `benchmarks/pairs.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import (
    Machine,
    add_machine_options,
    machine_of,
    positive_int,
    report_progress,
)
from benchmarks.pairs import add_smollm2_option, perturbed
from benchmarks.rounds import Timings, run_rounds
from mentor_serve.engines import Engine, RolloutRequest, SamplingParams, TorchEngine, VllmEngine
from mentor_serve.engines.vllm.cores import CoreOptions
from mentor_serve.models.loading import load_model, load_tokenizer

CONTENDERS = (
    *("torch", "torch_mixed", "torch_mixed_closed", "vllm", "vllm_mixed", "vllm_mixed_closed"),
    *("vllm_own", "generate"),
)
CLOSED_GAMMA = 999.0
MAX_MODEL_LEN = 256
PROMPT = "State the final answer to the following arithmetic problem: 4 - 1 - 7 ="
_SIGMA = 0.06


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one round of one contender gave."""

    num_tokens: int
    cpu_s: float


Contender = Callable[[int], Answer]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_machine_options(parser)
    add_smollm2_option(parser)
    parser.add_argument("--batch", type=positive_int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=positive_int, default=32)
    parser.add_argument("--rounds", type=positive_int, default=3)
    parser.add_argument("--gamma", type=float, default=4.0)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    arguments = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):  # what libraries say while they start
        report = measure(arguments, machine_of(arguments))
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        _print_table(report)


def measure(arguments: argparse.Namespace, machine: Machine) -> dict[str, Any]:
    """Every batch size and contender, and how long vLLM starts and swaps, as JSON."""
    name = arguments.smollm2 or "embedded:policy"
    policy = load_model(name, dtype=machine.dtype, device=machine.device)
    with tempfile.TemporaryDirectory() as directory:
        expert = perturbed(policy, sigma=_SIGMA, seed=1)
        expert.save_pretrained(directory)
        load_tokenizer(name).save_pretrained(directory)
        started = time.perf_counter()
        vllm = _vllm_engine(name, directory, max(arguments.batch), machine)
        start_s = time.perf_counter() - started
        own = _vllm_itself(name, max(arguments.batch), machine)
        torch_engine = TorchEngine(
            policy, expert, max_batch_size=max(arguments.batch), max_model_len=MAX_MODEL_LEN
        )
        rows = []
        for batch in arguments.batch:
            contenders = _contenders(
                {"torch": torch_engine, "vllm": vllm}, own, policy, name, batch, arguments
            )
            timings = run_rounds(
                contenders,
                rounds=arguments.rounds,
                device=machine.device,
                on_round=partial(_report_round, batch),
            )
            rows += [_row(batch, key, timing) for key, timing in timings.items()]
        prompt = load_tokenizer(name)(PROMPT)["input_ids"]
        stalls = {
            key: round(_swap_stall_s(engine, policy, prompt, max(arguments.batch), gamma), 3)
            for key, engine, gamma in (
                ("torch", torch_engine, None),
                ("vllm", vllm, None),
                ("vllm_mixed", vllm, arguments.gamma),
            )
        }
    return {
        "model": Path(name).name,
        "new_tokens": arguments.new_tokens,
        "gamma": arguments.gamma,
        "rows": rows,
        "vllm_start_s": round(start_s, 1),
        "vllm_swap_s": round(_swap_s(vllm, policy), 2),
        "swap_stall_s": stalls,
        "machine": machine.describe(),
    }


def _contenders(
    engines: Mapping[str, Engine],
    own: Any,
    policy: Any,
    name: str,
    batch: int,
    arguments: argparse.Namespace,
) -> dict[str, Contender]:
    prompt = load_tokenizer(name)(PROMPT)["input_ids"]
    count = arguments.new_tokens
    contenders: dict[str, Contender] = {}
    for key, engine in engines.items():
        for suffix, gamma in (
            ("", None),
            ("_mixed", arguments.gamma),
            ("_mixed_closed", CLOSED_GAMMA),
        ):
            contenders[key + suffix] = partial(_by_engine, engine, prompt, batch, count, gamma)
    contenders["vllm_own"] = partial(_by_vllm_itself, own, prompt, batch, count)
    contenders["generate"] = partial(_by_generate, policy, prompt, batch, count)
    return {name: contender for name, contender in contenders.items() if name in arguments.only}


def _by_engine(
    engine: Engine, prompt: list[int], batch: int, count: int, gamma: float | None, seed: int
) -> Answer:
    request = _request(prompt, batch, count, gamma, seed)
    started = time.process_time()
    (rollouts,) = engine.generate([request])
    num_tokens = sum(rollout.num_tokens for rollout in rollouts)
    return Answer(num_tokens=num_tokens, cpu_s=time.process_time() - started)


def _request(
    prompt: list[int], batch: int, count: int, gamma: float | None, seed: int
) -> RolloutRequest:
    return RolloutRequest(
        prompt_token_ids=prompt,
        mixed=gamma is not None,
        gamma=CLOSED_GAMMA if gamma is None else gamma,
        num_samples=batch,
        seed=seed,
        sampling=SamplingParams(max_new_tokens=count, ignore_eos=True),
    )


def _by_vllm_itself(llm: Any, prompt: list[int], batch: int, count: int, seed: int) -> Answer:
    from vllm import SamplingParams as VllmSampling

    sampling = VllmSampling(temperature=1.0, max_tokens=count, ignore_eos=True, detokenize=False)
    started = time.process_time()
    outputs = llm.generate([{"prompt_token_ids": prompt}] * batch, sampling, use_tqdm=False)
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return Answer(num_tokens=num_tokens, cpu_s=time.process_time() - started)


def _by_generate(policy: Any, prompt: list[int], batch: int, count: int, seed: int) -> Answer:
    ids = torch.tensor([prompt] * batch, device=policy.device)
    torch.manual_seed(seed)
    started = time.process_time()
    with torch.inference_mode():
        whole = policy.generate(
            ids, do_sample=True, top_k=0, min_new_tokens=count, max_new_tokens=count, pad_token_id=0
        )
    num_tokens = batch * (whole.shape[1] - len(prompt))
    return Answer(num_tokens=num_tokens, cpu_s=time.process_time() - started)


def _vllm_engine(name: str, expert: str, batch: int, machine: Machine) -> VllmEngine:
    options = CoreOptions(
        device=machine.device,
        dtype=machine.dtype,
        max_batch_size=batch,
        max_model_len=MAX_MODEL_LEN,
        kv_cache_gib=1.0,
    )
    return VllmEngine.start(name, expert, options=options)


def _vllm_itself(name: str, batch: int, machine: Machine) -> Any:
    from vllm import LLM

    from mentor_serve.models.loading import resolve_model

    return LLM(
        model=str(resolve_model(name)),
        skip_tokenizer_init=True,
        dtype=machine.dtype,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=batch,
        kv_cache_memory_bytes=2**29,
        enforce_eager=machine.device == "cpu",
        disable_log_stats=True,
    )


def _swap_s(engine: VllmEngine, policy: Any) -> float:
    """Median of three swaps of an idle engine; both copies of the policy."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        engine.load_weights(policy.state_dict(), version=engine.policy_version + 1)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _swap_stall_s(
    engine: Engine, policy: Any, prompt: list[int], batch: int, gamma: float | None
) -> float:
    """Median of three swaps, each after 8 steps."""
    request = _request(prompt, batch, MAX_MODEL_LEN - len(prompt), gamma, seed=1)
    request_id = engine.submit(request)
    stalls = []
    for _ in range(3):
        usual = statistics.median(_next_token_s(engine, batch) for _ in range(8))
        started = time.perf_counter()
        engine.load_weights(policy.state_dict(), version=engine.policy_version + 1)
        swap_s = time.perf_counter() - started
        stalls.append(swap_s + _next_token_s(engine, batch) - usual)
    engine.cancel(request_id)
    while engine.has_unfinished():
        engine.step()
    return statistics.median(stalls)


def _next_token_s(engine: Engine, batch: int) -> float:
    """Until every one of `batch` running rollouts has a further token."""
    started = time.perf_counter()
    waiting = set(range(batch))
    while waiting:
        waiting -= {output.sample_index for output in engine.step() if output.new_token_ids}
    return time.perf_counter() - started


def _row(batch: int, contender: str, timing: Timings[Answer]) -> dict[str, Any]:
    cpu = [1000 * answer.cpu_s / answer.num_tokens for answer in timing.results]
    return {
        "batch": batch,
        "contender": contender,
        "tokens_per_s": round(timing.median_rate(lambda answer: answer.num_tokens), 1),
        "cpu_ms_per_token": round(statistics.median(cpu), 2),
    }


def _report_round(batch: int, number: int) -> None:
    report_progress(f"batch {batch} round {number}")


def _print_table(report: dict[str, Any]) -> None:
    table = Table(title=f"{report['model']}: {report['new_tokens']} new tokens a row")
    columns = ("batch", "contender", "tokens_per_s", "cpu_ms_per_token")
    for column in columns:
        table.add_column(column, justify="left" if column == "contender" else "right")
    for row in report["rows"]:
        table.add_row(*(str(row[column]) for column in columns))
    Console().print(table)
    print(f"vLLM started in {report['vllm_start_s']} s, swaps weights in {report['vllm_swap_s']} s")
    for engine, stall_s in report["swap_stall_s"].items():
        print(f"a swap delays the running rollouts of {engine} by {stall_s} s")


if __name__ == "__main__":
    main()
