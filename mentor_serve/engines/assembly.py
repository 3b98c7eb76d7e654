"""Turns what a caller names (a model object, a directory, a hub id) into parts of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mentor_serve.engines.slots.slot_model import default_max_tokens
from mentor_serve.errors import ConfigError
from mentor_serve.models.loading import (
    end_token_ids,
    load_model,
    load_tokenizer,
)
from mentor_serve.models.vocabulary import check_models_share_vocabulary

ModelSource = Any
"""A model, or what `models.loading.load_model` takes: a directory, a hub id, `embedded:...`."""


def model_of(source: ModelSource, *, device: str, dtype: str) -> Any:
    """The model itself, loaded where it is a name."""
    return load_model(source, dtype=dtype, device=device) if _is_name(source) else source


def tokenizer_of(policy: ModelSource, tokenizer: Any) -> Any:
    """The tokenizer itself, loaded where it is a name or where only the policy's name is known."""
    source = policy if tokenizer is None else tokenizer
    return load_tokenizer(source) if _is_name(source) else tokenizer


def check_vocabulary(policy: ModelSource, expert: ModelSource) -> None:
    """Compare the tokenizers of two named models; objects carry none to compare.

    Raises:
        VocabularyMismatch: a token id means different things to the two.
    """
    if _is_name(policy) and _is_name(expert):
        check_models_share_vocabulary(policy, expert)


def context_length(model: Any, max_model_len: int | None) -> int:
    """Prompt plus response in tokens: what is asked for, or the model's own (at most 4096).

    Raises:
        ConfigError: more than the model's positions, or too few for a prompt and one token.
    """
    if max_model_len is None:
        return default_max_tokens(model)
    most = getattr(model.config, "max_position_embeddings", None) or max_model_len
    if not 2 <= max_model_len <= most:
        raise ConfigError(f"max_model_len: expected 2 to {most}, got {max_model_len}")
    return max_model_len


def eos_table(
    model: Any, tokenizer: Any, eos_token_ids: Sequence[int] | None, *, vocab_size: int
) -> NDArray[np.bool_]:
    """Which token ids end a response: [V]; by default all that model and tokenizer name.

    Raises:
        ConfigError: an id given explicitly is out of vocabulary.
    """
    ids = end_token_ids(model, tokenizer) if eos_token_ids is None else eos_token_ids
    table = np.zeros(vocab_size, np.bool_)
    for token_id in ids:
        if 0 <= token_id < vocab_size:
            table[token_id] = True
        elif eos_token_ids is not None:
            raise ConfigError(f"eos_token_ids: expected 0 to {vocab_size - 1}, got {token_id}")
    return table


def _is_name(source: Any) -> bool:
    return isinstance(source, str | Path)
