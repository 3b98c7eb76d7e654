"""Fixtures that every test folder may use: tiny random models, a tiny tokenizer, databases.

The models are Llamas with initial weights large enough that their distributions are far from
uniform and from each other. They are built anew for each test, because weights may be swapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from databases import (  # noqa: F401 (fixtures)
    database_kind,
    empty_url,
    migrated_file,
    migrated_template,
    postgres_url,
    url,
)
from hypothesis import settings
from parallel import (  # noqa: F401 (hooks)
    pytest_collection_modifyitems,
    pytest_xdist_make_scheduler,
)

# A shared machine may pause any example for longer than the default limit of 200 ms.
settings.register_profile("mentor", deadline=None)
settings.load_profile("mentor")

TINY_VOCAB = 32
TINY_WORDS = (
    "<pad>",
    "<eos>",
    "<think>",
    "</think>",
    *"0123456789+-*=. ()",
    "ab",
    "cd",
    "ef",
    "gh",
    "ij",
    "kl",
    "mn",
    "op",
    "qr",
    "<unk>",
)


@pytest.fixture(autouse=True, scope="session")
def single_torch_thread() -> Iterator[None]:
    """Tests share few cores; results must not depend on the number of threads either."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., Any]:
    """Builds a random float32 Llama: `tiny_llama(seed, vocab_size=32, hidden_size=16)`."""
    return build_tiny_llama


@pytest.fixture
def tiny_pair() -> tuple[Any, Any]:
    """Policy and expert: random Llamas over one vocabulary of 32 that disagree."""
    return build_tiny_llama(1), build_tiny_llama(2)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A tokenizer of 32 tokens: digits, signs, pairs of letters; `<eos>` (1) is special."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    assert len(TINY_WORDS) == TINY_VOCAB
    vocabulary = {word: index for index, word in enumerate(TINY_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"</?\w+>|[a-z]{2}|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def build_tiny_llama(
    seed: int,
    *,
    vocab_size: int = TINY_VOCAB,
    hidden_size: int = 16,
    num_layers: int = 2,
    num_kv_heads: int = 1,
    max_position_embeddings: int = 256,
    tie_word_embeddings: bool = False,
    scale: float = 0.5,
) -> Any:
    """A random Llama whose logits have a standard deviation of about `4 * scale`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tie_word_embeddings,
        initializer_range=scale,
        bos_token_id=None,
        eos_token_id=1 if vocab_size == TINY_VOCAB else None,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()
