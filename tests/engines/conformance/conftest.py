"""Models whose pi_mix can be enumerated, or written down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

WORDS = ("a", "b", "c", "d", "e", "<eos>")


@pytest.fixture(scope="session")
def small_pair(tiny_llama: Callable[..., Any]) -> tuple[Any, Any]:
    """Policy and expert over six tokens that disagree. Do not load weights into them."""
    return tiny_llama(11, vocab_size=len(WORDS)), tiny_llama(12, vocab_size=len(WORDS))


@pytest.fixture(scope="session")
def small_tokenizer() -> Any:
    """The six tokens as one letter each; the last is `<eos>`, and the only special one."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.fixture(scope="session")
def markov_model(tiny_llama: Callable[..., Any]) -> Callable[[Sequence[Sequence[float]]], Any]:
    """Builds a Llama whose next-token logits depend on the last token alone: row by row [V, V]."""

    def build(logits: Sequence[Sequence[float]]) -> Any:
        table = torch.tensor(logits, dtype=torch.float32)
        vocab_size = len(table)
        model = tiny_llama(0, vocab_size=vocab_size)
        width = model.config.hidden_size
        with torch.no_grad():
            for layer in model.model.layers:
                # Both branches add nothing: what was read before is never seen.
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            # RMSNorm scales a one-hot embedding to sqrt(width).
            model.model.embed_tokens.weight.copy_(torch.eye(vocab_size, width))
            model.lm_head.weight.zero_()
            model.lm_head.weight[:, :vocab_size] = table.T / width**0.5
        return model

    return build
