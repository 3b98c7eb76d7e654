"""Makes an expert for a small pretrained model by fine-tuning it on worked solutions.

    python -m apps.smollm2_expert --base DIR --out DIR [--steps N] [--json]

The tasks, the system prompt and the response limit are those of a settings file
(apps/smollm2-mentor.toml), so that expert and policy read the same prompts, token for token. A
solution works a chain of additions and subtractions off from left to right, one operation a line,
in the format that the verifiers want:

    <think>
    12 + 34 = 46
    46 - 5 = 41
    </think>
    \\boxed{41}

Base and result are measured on held-out problems as `mentor-serve eval` does, without a database.
Problems to learn from are drawn under other seeds than the service's, held-out ones never. `--out`
appears whole or not at all. docs/recipes.md has the whole recipe.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from apps.supervised import Example, FinetuningPlan, finetune, mean_loss
from mentor_serve.actors.evaluation import evaluate_model, evaluation_plan
from mentor_serve.actors.workload import task_source
from mentor_serve.cli.options import libraries_on_stderr
from mentor_serve.errors import ConfigError, MentorError
from mentor_serve.evaluation import EvaluationPlan, SuiteReport
from mentor_serve.models.loading import load_model, load_tokenizer
from mentor_serve.models.progress import no_progress_bar
from mentor_serve.rollout.prompts import PromptRenderer
from mentor_serve.rollout.tasks import TaskSource
from mentor_serve.settings import Settings, load_settings
from mentor_serve.types import Task
from mentor_serve.weights.directories import atomic_directory

DEFAULT_CONFIG = Path(__file__).with_name("smollm2-mentor.toml")
_FAMILY = "chain_sum"
_SEED_DISTANCE = 1000
"""Between the seeds of the service's problems and of those learnt from."""
_REPORTED = (
    "greedy_pass_at_k",
    "greedy_mean_format",
    "greedy_mean_tokens",
    "greedy_truncated_share",
    "avg_at_k",
    "pass_at_k",
)

_log = logging.getLogger(__name__)


def worked_solution(expression: str) -> str:
    """The response that the expert learns for a chain such as `12 + 34 - 5`.

    >>> print(worked_solution("12 + 34 - 5"))
    <think>
    12 + 34 = 46
    46 - 5 = 41
    </think>
    \\boxed{41}

    Raises:
        ValueError: not integers joined by `+` and `-`, with a space on both sides of each.
    """
    first, *rest = expression.split(" ")
    total, lines = int(first), list[str]()
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        if sign not in ("+", "-"):
            raise ValueError(f"expected + or - between integers, got {sign!r} in {expression!r}")
        result = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {result}")
        total = result
    steps = "\n".join(lines or [str(total)])
    return f"<think>\n{steps}\n</think>\n\\boxed{{{total}}}"


class WorkedSolutions:
    """Encodes tasks with their worked solutions for one model.

    Raises:
        ConfigError: the settings name other tasks than chains of sums, or the tokenizer has no end
            token.
    """

    def __init__(self, settings: Settings, tokenizer: Any) -> None:
        tasks = settings.tasks
        if (tasks.source, tasks.name) != ("reasoning_gym", _FAMILY):
            raise ConfigError(
                f"expected tasks.source = 'reasoning_gym' and tasks.name = {_FAMILY!r}, which "
                f"worked solutions exist for, got {tasks.source!r} and {tasks.name!r}"
            )
        if tokenizer.eos_token_id is None:
            raise ConfigError("expected a tokenizer with an end token, got one without")
        self._settings = settings
        self._tokenizer = tokenizer
        self._renderer = PromptRenderer(tokenizer, tasks.system_prompt)

    def example(self, task: Task) -> Example:
        """Prompt and solution as token ids, encoded apart as they are at generation."""
        entry = task.metadata["reasoning_gym"]["entry"]
        text = worked_solution(entry["metadata"]["expression"])
        # Of templates that open the think block in the prompt, the response holds the rest.
        text = text.removeprefix(self._renderer.response_prefix.strip())
        token_ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return Example(
            prompt_token_ids=self._renderer.render(task),
            token_ids=[*token_ids, self._tokenizer.eos_token_id],
        )

    def draws(self, seed: int) -> Callable[[], Example]:
        """An endless sequence of examples; of held-out problems none."""
        source = self._source(self._settings.tasks.seed + _SEED_DISTANCE * (1 + seed))
        return lambda: self.example(source.next_task())

    def held_out(self, num_problems: int) -> list[Example]:
        """The problems that the evaluation asks, with their solutions."""
        return [
            self.example(t) for t in self._source(self._settings.tasks.seed).holdout(num_problems)
        ]

    def _source(self, seed: int) -> TaskSource:
        return task_source(self._settings, seed=seed)


def make_expert(
    settings: Settings,
    base: str,
    out: Path,
    plan: FinetuningPlan,
    *,
    seed: int,
    device: str,
    evaluation: EvaluationPlan,
) -> dict[str, Any]:
    """Train, save, measure; returns what came out as JSON values.

    Args:
        settings: tasks, system prompt and limits.
        base: a model directory, a GGUF file, or a hub id.
        out: must not exist yet.
        plan: how long and how fast to train.
        seed: of the problems learnt from; another one gives another expert.
        device: of training and measuring.
        evaluation: what to measure of base and result.

    Raises:
        ConfigError: `out` exists, the base cannot be loaded, or the settings do not fit.
    """
    if out.exists():
        raise ConfigError(f"--out {out}: expected a directory that does not exist yet")
    tokenizer = load_tokenizer(base)
    solutions = WorkedSolutions(settings, tokenizer)
    held_out = solutions.held_out(evaluation.num_problems)
    _check_lengths(settings, held_out)
    _log.info("measuring %s on %d problems", base, evaluation.num_problems)
    before = asyncio.run(evaluate_model(settings, base, evaluation, device=device))
    torch.manual_seed(seed)
    model = load_model(base, device=device)
    loss_before = mean_loss(model, held_out, batch_size=plan.batch_size)
    started = time.monotonic()
    losses = finetune(model, solutions.draws(seed), plan)
    train_s = time.monotonic() - started
    loss_after = mean_loss(model, held_out, batch_size=plan.batch_size)
    with atomic_directory(out.absolute()) as staging:
        with no_progress_bar():
            model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        for weights in staging.glob("*.safetensors"):
            weights.chmod(0o644)  # written for their owner alone; servers may be another user
    _log.info("measuring %s", out)
    after = asyncio.run(evaluate_model(settings, out, evaluation, device=device))
    return {
        **asdict(plan),
        "seed": seed,
        "device": device,
        "train_s": round(train_s, 1),
        "losses": [round(loss, 4) for loss in losses],
        "held_out_loss": {"base": round(loss_before, 4), "expert": round(loss_after, 4)},
        "num_problems": evaluation.num_problems,
        "base": _measures(before),
        "expert": _measures(after),
    }


def _check_lengths(settings: Settings, examples: list[Example]) -> None:
    longest = max(len(example.token_ids) for example in examples)
    if longest > settings.rollout.max_new_tokens:
        raise ConfigError(
            f"rollout.max_new_tokens ({settings.rollout.max_new_tokens}) cuts worked solutions of "
            f"{longest} tokens off; raise it, or make tasks.config shorter"
        )


def _measures(report: SuiteReport) -> dict[str, dict[str, float]]:
    return {
        measure.label: {
            "value": round(measure.value, 4),
            "low": round(measure.low, 4),
            "high": round(measure.high, 4),
        }
        for _, measure in report.measured
        if measure.metric in _REPORTED
    }


def _options() -> argparse.Namespace:
    plan = FinetuningPlan()
    parser = argparse.ArgumentParser(
        prog="python -m apps.smollm2_expert", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--base", required=True, help="model directory, GGUF file or hub id")
    parser.add_argument("--out", type=Path, required=True, help="directory to make")
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="settings file")
    parser.add_argument("--steps", type=int, default=plan.num_steps)
    parser.add_argument("--batch-size", type=int, default=plan.batch_size)
    parser.add_argument("--learning-rate", type=float, default=plan.learning_rate, help="peak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--problems", type=int, default=200, help="held out, to measure on")
    parser.add_argument("--samples", type=int, default=8, help="of each; 0: greedy alone")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    return parser.parse_args()


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = load_settings([arguments.config])
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return make_expert(
        settings,
        arguments.base,
        arguments.out,
        FinetuningPlan(
            num_steps=arguments.steps,
            batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            autocast="bfloat16" if device.startswith("cuda") else "none",
        ),
        seed=arguments.seed,
        device=device,
        evaluation=evaluation_plan(
            settings, num_problems=arguments.problems, num_samples=arguments.samples
        ),
    )


def main() -> int:
    """Run the command line."""
    arguments = _options()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        with libraries_on_stderr():
            report = _run(arguments)
    except MentorError as error:
        sys.stderr.write(f"smollm2_expert: {error}\n")
        return 2
    if arguments.json:
        sys.stdout.write(json.dumps(report) + "\n")
        return 0
    for name in ("base", "expert"):
        loss = report["held_out_loss"][name]
        shown = ", ".join(f"{label} {m['value']:.3g}" for label, m in report[name].items())
        sys.stdout.write(f"{name}: loss {loss:.3f}, {shown}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
