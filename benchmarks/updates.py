"""One optimiser step on one batch, made in different ways: ours, TRL's, and the plain one.

All minimise Eq. 9 (the token-level clipped surrogate over the number of ALL response tokens), clip
the gradient and step an AdamW of the same kind; the tests compare losses and gradients. Each has
its own copy of the model. `trl` and `padded` cut the batch into micro-batches of equally many rows,
with at most as many tokens, padding included, as `ours` may have.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.update_batches import num_response_tokens
from mentor_serve.core.losses import clipped_surrogate_loss
from mentor_serve.learner.batch import TrainingBatch, TrainingTrajectory
from mentor_serve.learner.config import UpdateConfig
from mentor_serve.learner.step import mixed_grpo_update

CLIP_LOW, CLIP_HIGH = 0.2, 0.28
MAX_GRAD_NORM = 1.0
LEARNING_RATE = 1e-6
"""The paper's; small enough that every round meets nearly the same weights."""
_PAD = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one step did."""

    num_tokens: int
    """Response tokens of the batch."""
    loss: float
    cpu_s: float
    """Processor time of this process, all threads."""


StepMaker = Callable[[TrainingBatch], float]
"""Makes one optimiser step and returns the loss before it."""


class TrlUnavailable(Exception):
    """TRL cannot be used here; the message says why."""


def timed(make_step: StepMaker, batch: TrainingBatch) -> Step:
    """Make a step and count what it took."""
    started = time.process_time()
    loss = make_step(batch)
    return Step(
        num_tokens=num_response_tokens(batch), loss=loss, cpu_s=time.process_time() - started
    )


def trl_version() -> str:
    """The installed version.

    Raises:
        TrlUnavailable: there is none.
    """
    if find_spec("trl") is None:
        raise TrlUnavailable("expected TRL, found none: pip install 'mentor-serve[benchmark]'")
    return version("trl")


def our_step(model: Any, *, max_tokens: int) -> StepMaker:
    """`mixed_grpo_update`, as the torch backend calls it."""
    optimizer = _prepare(model)

    def make_step(batch: TrainingBatch) -> float:
        config = UpdateConfig(
            mini_batch_prompts=len(batch.groups),
            clip_low=CLIP_LOW,
            clip_high=CLIP_HIGH,
            max_grad_norm=MAX_GRAD_NORM,
            max_tokens_per_micro_batch=max_tokens,
        )
        return mixed_grpo_update(model, batch, config, optimizer=optimizer).loss

    return make_step


def padded_step(model: Any, *, max_tokens: int) -> StepMaker:
    """A plain forward and backward over padded rows; logits of response positions only.

    On rows of equal length nothing is padded and no mask is passed: the least that a step without
    prompt sharing can cost.
    """
    optimizer = _prepare(model)

    def make_step(batch: TrainingBatch) -> float:
        num_tokens, total = num_response_tokens(batch), 0.0
        optimizer.zero_grad(set_to_none=True)
        for rows in _micro_batches(pad_batch(batch, model.device), max_tokens):
            loss, _ = clipped_surrogate_loss(
                _padded_logprobs(model, rows),
                rows["old_per_token_logps"],
                rows["advantages"],
                rows["completion_mask"],
                CLIP_LOW,
                CLIP_HIGH,
                normalizer=num_tokens,
            )
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        _clip_and_step(model, optimizer)
        return total

    return make_step


def trl_step(model: Any, tokenizer: Any, *, max_tokens: int) -> StepMaker:
    """TRL's `GRPOTrainer.compute_loss` (loss type `dapo`) on the batch as TRL pads it.

    Gradient checkpointing, which TRL turns on by default, is off here as it is for the others.

    Raises:
        TrlUnavailable: TRL is not installed.
    """
    trl_version()
    optimizer = _prepare(model)
    trainer = _grpo_trainer(model, tokenizer, optimizer)
    trainer.model.train()  # TRL trains so; models here have no dropout

    def make_step(batch: TrainingBatch) -> float:
        total = 0.0
        optimizer.zero_grad(set_to_none=True)
        parts = list(_micro_batches(pad_batch(batch, model.device), max_tokens))
        # The loss is divided by the tokens of the generation batch, here the whole mini-batch.
        trainer.current_gradient_accumulation_steps = len(parts)
        trainer.args.steps_per_generation = len(parts)
        num_items = torch.tensor(num_response_tokens(batch), device=model.device)
        for rows in parts:
            loss = trainer.compute_loss(trainer.model, rows | {"num_items_in_batch": num_items})
            trainer.accelerator.backward(loss)
            total += float(loss.detach())
        _clip_and_step(model, optimizer)
        return total

    return make_step


def pad_batch(batch: TrainingBatch, device: torch.device) -> dict[str, Tensor]:
    """All trajectories as TRL pads them: prompts left, responses right, to the batch's longest."""
    items = [item for group in batch.groups for item in group.trajectories]
    longest_prompt = max(len(item.prompt_token_ids) for item in items)
    longest = max(len(item.token_ids) for item in items)
    rows = [_pad_row(item, longest_prompt, longest) for item in items]
    return {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}


def _pad_row(item: TrainingTrajectory, longest_prompt: int, longest: int) -> dict[str, Tensor]:
    prompt = torch.from_numpy(item.prompt_token_ids).long()
    response = torch.from_numpy(item.token_ids).long()
    left, right = (longest_prompt - len(prompt), 0), (0, longest - len(response))
    pad = torch.nn.functional.pad
    return {
        "prompt_ids": pad(prompt, left, value=_PAD),
        "prompt_mask": pad(torch.ones_like(prompt), left),
        "completion_ids": pad(response, right, value=_PAD),
        "completion_mask": pad(torch.from_numpy(item.mask).long(), right),
        "old_per_token_logps": pad(torch.from_numpy(item.old_logprobs), right),
        "advantages": torch.tensor(item.advantage, dtype=torch.float32),
    }


def _micro_batches(rows: dict[str, Tensor], max_tokens: int) -> Iterator[dict[str, Tensor]]:
    count, longest = rows["completion_ids"].shape
    length = longest + rows["prompt_ids"].shape[1]
    # Parts of about equal size: a small last part would waste a whole pass over the weights.
    num_parts = math.ceil(count / max(1, max_tokens // length))
    bounds = [round(part * count / num_parts) for part in range(num_parts + 1)]
    for start, stop in pairwise(bounds):
        yield {name: tensor[start:stop] for name, tensor in rows.items()}


def _padded_logprobs(model: Any, rows: dict[str, Tensor]) -> Tensor:
    """log pi of the response tokens, [rows, longest response]."""
    mask = torch.cat([rows["prompt_mask"], rows["completion_mask"]], dim=1)
    targets = rows["completion_ids"]
    num_targets = targets.shape[1]
    logits = model(
        input_ids=torch.cat([rows["prompt_ids"], targets], dim=1),
        attention_mask=None if bool(mask.all()) else mask,
        use_cache=False,
        logits_to_keep=num_targets + 1,
    ).logits[:, :-1]
    logprobs: Tensor = torch.log_softmax(logits.float(), dim=-1)
    return logprobs.gather(-1, targets[..., None]).squeeze(-1)


def _prepare(model: Any) -> torch.optim.AdamW:
    model.requires_grad_(True)
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)


def _clip_and_step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _grpo_trainer(model: Any, tokenizer: Any, optimizer: torch.optim.Optimizer) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    with tempfile.TemporaryDirectory() as directory:
        arguments = GRPOConfig(
            output_dir=directory,
            use_cpu=model.device.type == "cpu",
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=8,
            num_generations=8,
            loss_type="dapo",
            beta=0.0,
            epsilon=CLIP_LOW,
            epsilon_high=CLIP_HIGH,
            temperature=1.0,
            report_to="none",
        )
        return GRPOTrainer(
            model=model,
            args=arguments,
            # Neither is used: `compute_loss` gets rollouts that exist already.
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            train_dataset=Dataset.from_dict({"prompt": [""]}),
            processing_class=tokenizer,
            optimizers=(optimizer, None),
        )
