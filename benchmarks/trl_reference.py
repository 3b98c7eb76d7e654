"""The bundled task learnt with TRL's `GRPOTrainer`: the outside reference for on-policy training.

    pip install 'mentor-serve[benchmark]'
    python -m benchmarks.trl_reference --json

The start, the problems and their order, the prompts' token ids, the verifier and its weights, the
clips, the optimiser and the number of rollouts are those of this project (12 rollouts a prompt, as
many as MENTOR's 8 + 4); sampling, advantages, loss and step are TRL's. There is no expert. What
stays different: TRL adds 1e-4 to the deviation of a group's rewards, and takes the policy before
the update from its own forward pass instead of the sampler's. The policy is measured before and
after, on held-out problems, by this project's evaluation. Updates are printed as they come.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from benchmarks.machine import (
    Machine,
    add_machine_options,
    machine_of,
    positive_int,
    report_progress,
)
from benchmarks.updates import CLIP_HIGH, CLIP_LOW, MAX_GRAD_NORM, TrlUnavailable, trl_version
from mentor_serve.engines import TorchEngine
from mentor_serve.evaluation import EvaluationPlan, SuiteReport, run_plan
from mentor_serve.models.loading import load_model, load_tokenizer
from mentor_serve.rollout.prompts import PromptRenderer
from mentor_serve.rollout.tasks import build_source
from mentor_serve.rollout.verifiers import VerifierPool, VerifierSpec, build_verifier
from mentor_serve.types import Rollout, RolloutRequest, Task

POLICY = "embedded:policy"
WEIGHT_DECAY = 0.01
NUM_SAMPLES = 8
"""Sampled responses to each held-out problem, beside the greedy one."""
_MAX_MODEL_LEN = 256
_EVALUATED_AT_ONCE = 192
"""Responses that the engine of the evaluation decodes at the same time."""
_LOGGED = {
    "reward": "mean_reward",
    "accuracy": "mean_accuracy",
    "format_score": "mean_format",
    "frac_reward_zero_std": "frac_reward_zero_std",
    "completions/mean_length": "mean_tokens",
    "completions/clipped_ratio": "truncated_share",
    "entropy": "entropy",
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
}
"""What TRL logs of an update, under this project's names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sizes of the run."""

    updates: int = 60
    prompts: int = 16
    """Problems of an update, which is one optimiser step."""
    rollouts: int = 12
    """Of each problem."""
    problems: int = 200
    """Held-out problems to measure on."""
    learning_rate: float = 1e-4
    seed: int = 0
    max_new_tokens: int = 96
    micro_batches: int = 4
    """Parts that TRL cuts a batch into; bounds memory, changes no gradient."""


class Reference:
    """One run: the policy, what trains it, and what measures it.

    Raises:
        TrlUnavailable: TRL is not installed.
    """

    def __init__(self, plan: Plan, machine: Machine) -> None:
        trl_version()
        self._plan, self._machine = plan, machine
        self._tokenizer = load_tokenizer(POLICY)
        self._renderer = PromptRenderer(self._tokenizer)
        source = build_source(source="reasoning_gym", name="embedded", seed=plan.seed)
        self.tasks = [source.next_task() for _ in range(plan.updates * plan.prompts)]
        self._held_out = source.holdout(plan.problems)
        self.model = load_model(POLICY, device=machine.device)
        self.rows: list[dict[str, Any]] = []
        """A row for each update that was made."""

    def run(self) -> dict[str, Any]:
        """Measure, train, measure again."""
        before = self.evaluate()
        with tempfile.TemporaryDirectory() as directory:
            trainer = self.trainer(Path(directory))
            started, cpu_started = time.perf_counter(), time.process_time()
            trainer.train()
        wall_s = time.perf_counter() - started
        cpu_s = time.process_time() - cpu_started
        after = self.evaluate()
        num_rollouts = self._plan.updates * self._plan.prompts * self._plan.rollouts
        return {
            "before": summary(before),
            "after": summary(after),
            "wall_s": round(wall_s, 1),
            "cpu_s": round(cpu_s, 1),
            "rollouts_per_s": round(num_rollouts / wall_s, 2),
            "rollouts_per_cpu_s": round(num_rollouts / cpu_s, 2),
            "rows": self.rows,
        }

    def trainer(self, directory: Path) -> Any:
        """TRL's trainer of the model; `directory` is where it would save, which is turned off."""
        from datasets import Dataset
        from transformers import PrinterCallback
        from trl import GRPOTrainer

        self.model.requires_grad_(True)
        trainer = GRPOTrainer(
            model=self.model,
            args=_trl_arguments(self._plan, self._machine, directory),
            reward_funcs=self.reward_function(),
            train_dataset=Dataset.from_dict(
                {
                    "prompt": [self._renderer.messages(task) for task in self.tasks],
                    "task_index": list(range(len(self.tasks))),
                }
            ),
            processing_class=self._tokenizer,
            # Decays every parameter, as the learner does; TRL's own leaves out norms.
            optimizers=(
                torch.optim.AdamW(
                    self.model.parameters(),
                    lr=self._plan.learning_rate,
                    weight_decay=WEIGHT_DECAY,
                ),
                None,
            ),
            callbacks=[_Recorder(self.rows)],
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def reward_function(self) -> Callable[..., list[float]]:
        """The verifier as TRL calls it; TRL logs accuracy and format beside the reward."""
        verifier = build_verifier(VerifierSpec())
        prefix = self._renderer.response_prefix

        def verified(
            completion_ids: Sequence[Sequence[int]],
            task_index: Sequence[int],
            log_metric: Callable[[str, float], None],
            **_: Any,
        ) -> list[float]:
            rewards = []
            for token_ids, index in zip(completion_ids, task_index, strict=True):
                task = self.tasks[index]
                verifier.prepare(task)
                score = verifier.score(task, prefix + self._renderer.text_of(token_ids))
                log_metric("accuracy", score.accuracy)
                log_metric("format_score", score.format_score)
                rewards.append(score.reward)
            return rewards

        return verified

    def evaluate(self) -> SuiteReport:
        """The model as it is now, on the held-out problems."""
        plan = EvaluationPlan(
            suite="reasoning_gym:embedded",
            num_problems=self._plan.problems,
            num_samples=NUM_SAMPLES,
            max_new_tokens=self._plan.max_new_tokens,
        )
        return asyncio.run(self._evaluate(self._held_out, plan))

    async def _evaluate(self, tasks: Sequence[Task], plan: EvaluationPlan) -> SuiteReport:
        engine = TorchEngine(
            self.model,
            tokenizer=self._tokenizer,
            device=self._machine.device,
            max_batch_size=_EVALUATED_AT_ONCE,
            max_model_len=_MAX_MODEL_LEN,
        )

        async def generate(requests: list[RolloutRequest]) -> list[list[Rollout]]:
            return engine.generate(requests)

        async with VerifierPool() as pool:
            return await run_plan(generate, self._renderer, pool, tasks, plan)


def summary(report: SuiteReport) -> dict[str, Any]:
    """Greedy pass@1 and avg@8 with their 95 % intervals, as JSON."""
    wanted = {"greedy_pass_at_k": "greedy_pass_at_1", "avg_at_k": f"avg_at_{NUM_SAMPLES}"}
    return {
        wanted[measure.metric]: {
            "value": round(measure.value, 4),
            "low": round(measure.low, 4),
            "high": round(measure.high, 4),
        }
        for _, measure in report.measured
        if measure.metric in wanted
    }


class _Recorder(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Keeps a row of each update, with the time it took, sampling and scoring included."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows
        self._started = self._cpu_started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started, self._cpu_started = time.perf_counter(), time.process_time()

    def on_log(self, _arguments: Any, state: Any, _control: Any, **given: Any) -> None:
        logs = given["logs"]
        if "reward" not in logs:  # the summary at the end of training
            return
        values = {name: float(logs[key]) for key, name in _LOGGED.items()}
        row: dict[str, Any] = {"update": state.global_step}
        row |= {name: float(f"{value:.5g}") for name, value in values.items()}
        row["wall_s"] = round(time.perf_counter() - self._started, 3)
        row["cpu_s"] = round(time.process_time() - self._cpu_started, 3)
        self._rows.append(row)
        report_progress(json.dumps(row))


def _trl_arguments(plan: Plan, machine: Machine, directory: Path) -> Any:
    from trl import GRPOConfig

    batch_size = plan.prompts * plan.rollouts
    # As many equal parts as the batch allows.
    num_parts = next(n for n in range(plan.micro_batches, 0, -1) if batch_size % n == 0)
    return GRPOConfig(
        output_dir=str(directory),
        save_strategy="no",
        use_cpu=machine.device == "cpu",
        bf16=machine.dtype == "bfloat16",
        gradient_checkpointing=False,
        seed=plan.seed,
        shuffle_dataset=False,
        max_steps=plan.updates,
        per_device_train_batch_size=batch_size // num_parts,
        gradient_accumulation_steps=num_parts,
        num_generations=plan.rollouts,
        max_completion_length=plan.max_new_tokens,
        temperature=1.0,
        loss_type="dapo",
        epsilon=CLIP_LOW,
        epsilon_high=CLIP_HIGH,
        beta=0.0,
        learning_rate=plan.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=MAX_GRAD_NORM,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=machine.device != "cpu",
    )


def print_tables(report: dict[str, Any]) -> None:
    """The same for people."""
    console = Console()
    console.print(report["machine"])
    table = Table(title=f"TRL {report['trl']}, {report['updates']} updates")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    for metric, before in report["before"].items():
        after = report["after"][metric]
        shown = [f"{m['value']:.1%} ({m['low']:.1%} to {m['high']:.1%})" for m in (before, after)]
        table.add_row(metric, *shown)
    console.print(table)
    rates = (
        f"{report['rollouts_per_s']} rollouts/s, {report['rollouts_per_cpu_s']} a processor second"
    )
    console.print(f"{report['wall_s']} s of training: {rates}")


def _options() -> argparse.Namespace:
    plan = Plan()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--updates", type=positive_int, default=plan.updates)
    parser.add_argument("--prompts", type=positive_int, default=plan.prompts)
    parser.add_argument("--rollouts", type=positive_int, default=plan.rollouts, help="of a prompt")
    parser.add_argument("--problems", type=positive_int, default=plan.problems, help="held out")
    parser.add_argument("--learning-rate", type=float, default=plan.learning_rate)
    parser.add_argument("--seed", type=int, default=plan.seed)
    add_machine_options(parser)
    return parser.parse_args()


def main() -> None:
    """Parse, train, print."""
    arguments = _options()
    machine = machine_of(arguments)
    plan = Plan(
        updates=arguments.updates,
        prompts=arguments.prompts,
        rollouts=arguments.rollouts,
        problems=arguments.problems,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
    )
    # What TRL imports writes on standard output, which belongs to the result.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            report = Reference(plan, machine).run()
        except TrlUnavailable as error:
            raise SystemExit(str(error)) from error
    report |= {"trl": trl_version(), **asdict(plan), "machine": machine.describe()}
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print_tables(report)


if __name__ == "__main__":
    main()
