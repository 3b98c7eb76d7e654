"""Builds the embedded reference pair from nothing and measures it.

    python -m mentor_serve.models.reference.build --out DIR [--seed 0] [--json]

Contract: one CPU thread, no network, no input but the seed; DIR/policy and DIR/expert appear whole
or not at all. The same seed, torch version and processor give the same weights.
"""

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from . import MAX_NEW_TOKENS, ModelName
from .corpus import Example, ExpertHabits, PolicyHabits, expert_example, policy_example
from .report import chance_level, measure
from .tokenizer import build_tokenizer
from .train import TrainingPlan, new_model, train

_log = logging.getLogger(__name__)

_RECIPES: dict[ModelName, tuple[Callable[[Random], Example], TrainingPlan]] = {
    # 1,000 steps' worth of plain questions: a sixth have hints.
    "policy": (partial(policy_example, habits=PolicyHabits()), TrainingPlan(num_steps=1200)),
    "expert": (
        partial(expert_example, habits=ExpertHabits()),
        TrainingPlan(num_steps=2000, pool_batches=8),
    ),
}

_STREAMS: dict[ModelName, int] = {"policy": 11, "expert": 22}
"""Offsets of the corpus seeds, so that the two models read different problems."""


def build_model(
    name: ModelName, tokenizer: PreTrainedTokenizerFast, *, seed: int
) -> LlamaForCausalLM:
    """Train one model of the pair."""
    draw, plan = _RECIPES[name]
    model = new_model(tokenizer, seed)
    _log.info("%s: training %d steps", name, plan.num_steps)
    train(model, tokenizer, draw, plan, seed=100 * seed + _STREAMS[name])
    model.generation_config = generation_config(tokenizer)
    return model


def generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Return the defaults saved with a model: plain sampling at temperature 1, up to the end."""
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        # transformers would otherwise cut to the 50 likeliest tokens.
        top_k=0,
        top_p=1.0,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model and tokenizer beside `folder`, then put the result in its place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    # Both the folder and the weights come out readable by their owner only.
    staging.chmod(0o755)
    (staging / "model.safetensors").chmod(0o644)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(staging, folder)


def build(out: Path, *, seed: int = 0) -> dict[str, Any]:
    """Build both models into `out` and return what they measure."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    started = time.monotonic()
    tokenizer = build_tokenizer()
    numbers: dict[str, Any] = {"seed": seed, "torch": torch.__version__, "chance": chance_level()}
    names: tuple[ModelName, ...] = ("policy", "expert")
    for name in names:
        model = build_model(name, tokenizer, seed=seed)
        save_model(model, tokenizer, out / name)
        _log.info("%s: measuring", name)
        numbers[name] = {
            "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
            **measure(model, tokenizer),
        }
    numbers["wall_time_s"] = round(time.monotonic() - started)
    return numbers


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Build and measure the embedded reference pair.")
    parser.add_argument("--out", type=Path, required=True, help="folder for policy/ and expert/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one line of JSON on standard output")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    numbers = build(arguments.out, seed=arguments.seed)
    sys.stdout.write(json.dumps(numbers, indent=None if arguments.json else 2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
