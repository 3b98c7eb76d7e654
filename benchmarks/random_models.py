"""Random Llamas that behave like a trained policy and its expert, for measuring speed.

Entropies of a plain random model are alike at all tokens, and two of them never agree, so that no
draft would ever be accepted. Here the residual stream is mostly the embedding of the last token,
to which the layers add a little of the context, and the head is scaled up: gaps between the best
logits, and so entropies, then spread as widely as those of trained models. An expert is built over
the same table, lifted into its wider stream by an orthonormal map; its own layers make it disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Size of one Llama."""

    hidden_size: int
    num_layers: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int


POLICY_15M = Shape(
    hidden_size=384, num_layers=8, intermediate_size=1024, num_heads=6, num_kv_heads=6
)
"""15.0 million parameters with a vocabulary of 1024."""
EXPERT_120M = Shape(
    hidden_size=1024, num_layers=9, intermediate_size=2880, num_heads=16, num_kv_heads=16
)
"""119.5 million, 8.0 times the policy's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Character:
    """What a random pair's distributions are like."""

    sharpness: float
    """Standard deviation of the logits; entropies fall with it."""
    context: float
    """Standard deviation of the layers' weights; more makes the pair disagree more."""
    vocab_size: int = 1024
    max_tokens: int = 8192
    """Context length of both."""
    seed: int = 0


def random_pair(
    policy_shape: Shape,
    expert_shape: Shape,
    character: Character,
    *,
    dtype: str = "float32",
    device: str = "cpu",
) -> tuple[Any, Any]:
    """Policy and expert; the expert is at least as wide as the policy."""
    generator = torch.Generator().manual_seed(character.seed)
    width, wider = policy_shape.hidden_size, expert_shape.hidden_size
    embedding = torch.randn(character.vocab_size, width, generator=generator)
    head = torch.randn(character.vocab_size, width, generator=generator)
    head *= character.sharpness * width**-0.5
    lift = torch.linalg.qr(torch.randn(wider, width, generator=generator)).Q.T
    # Lifting spreads the stream over more dimensions, of which the final norm makes unit mean
    # square again: the table is scaled up so that layers add as much, the head down so that the
    # logits stay the same.
    growth = (wider / width) ** 0.5
    tables = (
        (policy_shape, embedding, head),
        (expert_shape, embedding @ lift * growth, head @ lift / growth),
    )
    models = []
    for number, (shape, table, output) in enumerate(tables):
        with torch.random.fork_rng():
            torch.manual_seed(character.seed + 1 + number)
            model = LlamaForCausalLM(_config(shape, character))
        with torch.no_grad():
            model.get_input_embeddings().weight.copy_(table)
            model.get_output_embeddings().weight.copy_(output)
        models.append(model.to(device=device, dtype=getattr(torch, dtype)).eval())
    return models[0], models[1]


def _config(shape: Shape, character: Character) -> Any:
    return LlamaConfig(
        vocab_size=character.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=character.max_tokens,
        tie_word_embeddings=False,
        initializer_range=character.context,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation="sdpa",
    )
