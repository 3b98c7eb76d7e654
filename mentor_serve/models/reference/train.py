"""Supervised training of one model of the pair on one CPU thread.

Contract: deterministic for a given seed, number of threads and torch version. The loss covers the
learnt pieces of responses and the end token; prompts and read-only pieces carry none.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .corpus import Example
from .tokenizer import EOS, PAD, render_prompt

_log = logging.getLogger(__name__)
_IGNORED = -100


@dataclass(frozen=True)
class TrainingPlan:
    """How long and how fast to train."""

    num_steps: int
    """Optimiser steps."""
    batch_size: int = 64
    """Examples a step."""
    peak_lr: float = 3e-3
    """Peak of the one-cycle learning rate."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    pool_batches: int = 1
    """Batches drawn at once and cut by length, which saves padding; 1 keeps the order drawn."""


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return an untrained model of under half a million parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        # A head of 32 is the smallest that vLLM's attention kernels accept.
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # Twice the usual scale for so narrow a model.
        initializer_range=0.04,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, example: Example) -> tuple[list[int], list[int]]:
    """Return (token ids, labels) of prompt, response and end token."""
    token_ids: list[int] = tokenizer.encode(
        render_prompt(example.question), add_special_tokens=False
    )
    labels = [_IGNORED] * len(token_ids)
    for piece in example.response:
        ids = tokenizer.encode(piece.text, add_special_tokens=False)
        token_ids += ids
        labels += ids if piece.is_learnt else [_IGNORED] * len(ids)
    eos = int(tokenizer.convert_tokens_to_ids(EOS))
    return [*token_ids, eos], [*labels, eos]


def collate(
    rows: list[tuple[list[int], list[int]]], pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad on the right: (token ids [B, T], labels [B, T])."""
    length = max(len(ids) for ids, _ in rows)
    ids_BT = torch.tensor([ids + [pad_token_id] * (length - len(ids)) for ids, _ in rows])
    labels_BT = torch.tensor([lab + [_IGNORED] * (length - len(lab)) for _, lab in rows])
    return ids_BT, labels_BT


def _batches(
    tokenizer: PreTrainedTokenizerFast,
    draw: Callable[[Random], Example],
    plan: TrainingPlan,
    random: Random,
) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Yield batches without end; with a pool of several, each holds rows of similar length."""
    size = plan.batch_size
    while True:
        pool = [encode(tokenizer, draw(random)) for _ in range(plan.pool_batches * size)]
        if plan.pool_batches > 1:
            pool.sort(key=lambda row: len(row[0]))
        batches = [pool[start : start + size] for start in range(0, len(pool), size)]
        random.shuffle(batches)
        yield from batches


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    draw: Callable[[Random], Example],
    plan: TrainingPlan,
    *,
    seed: int,
) -> float:
    """Train in place and return the mean loss of the last 50 steps, nats a token."""
    random = Random(seed)  # noqa: S311 - reproducible on purpose
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.peak_lr, weight_decay=plan.weight_decay, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=plan.peak_lr, total_steps=plan.num_steps, pct_start=0.1
    )
    pad_token_id = int(tokenizer.convert_tokens_to_ids(PAD))
    losses: list[float] = []
    started = time.monotonic()
    model.train()
    batches = _batches(tokenizer, draw, plan, random)
    for step in range(plan.num_steps):
        rows = next(batches)
        ids_BT, labels_BT = collate(rows, pad_token_id)
        # Right padding needs no attention mask: the model is causal and padding has no label.
        loss = model(input_ids=ids_BT, labels=labels_BT, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            mean = sum(losses[-50:]) / 50
            elapsed_s = time.monotonic() - started
            _log.info("step %d/%d loss %.4f, %.0f s", step + 1, plan.num_steps, mean, elapsed_s)
    model.eval()
    tail = losses[-50:]
    return sum(tail) / len(tail)
