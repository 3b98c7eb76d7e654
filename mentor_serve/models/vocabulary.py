"""Checks that policy and expert speak one vocabulary, as Eq. 6 needs.

`pi_mix` adds the two distributions token id by token id, so the same id must mean the same token in
both models. The check is strict: equal tokenizers and equal logits widths. It never remaps tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mentor_serve.errors import VocabularyMismatch
from mentor_serve.models.loading import load_logits_width, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_models_share_vocabulary(policy: str | Path, expert: str | Path) -> None:
    """`check_same_vocabulary` of two models by name; loads no weights.

    Raises:
        ConfigError: one of them cannot be found or read.
        VocabularyMismatch: policy and expert cannot be mixed.
    """
    check_same_vocabulary(
        load_tokenizer(policy),
        load_tokenizer(expert),
        load_logits_width(policy),
        load_logits_width(expert),
    )


def check_same_vocabulary(
    policy_tokenizer: PreTrainedTokenizerBase,
    expert_tokenizer: PreTrainedTokenizerBase,
    policy_width: int,
    expert_width: int,
) -> None:
    """Return if both tokenizers map the same tokens to the same ids and both models are as wide.

    Compared are the tokenizers' whole vocabularies (added tokens included) and then the widths of
    the logits (`load_logits_width`), which may exceed the tokenizer's length by padding. End tokens
    may differ: the policy's count.

    Raises:
        VocabularyMismatch: names the lowest id at which the two differ, or both widths.
    """
    policy_tokens = _by_id(policy_tokenizer)
    expert_tokens = _by_id(expert_tokenizer)
    for token_id in sorted(policy_tokens.keys() | expert_tokens.keys()):
        ours, theirs = policy_tokens.get(token_id), expert_tokens.get(token_id)
        if ours != theirs:
            raise VocabularyMismatch(
                "policy and expert must share one vocabulary: token id "
                f"{token_id} is {_show(ours)} for the policy ({len(policy_tokens)} tokens) and "
                f"{_show(theirs)} for the expert ({len(expert_tokens)} tokens); choose an expert "
                "of the same model family, or fine-tune one from the policy's base model"
            )
    if policy_width != expert_width:
        raise VocabularyMismatch(
            "policy and expert have equal tokenizers but logits of different width: vocab_size is "
            f"{policy_width} for the policy and {expert_width} for the expert; resize one of them "
            "(transformers: resize_token_embeddings) so that both config.json agree"
        )


def _by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return {token_id: token for token, token_id in vocabulary.items()}


def _show(token: str | None) -> str:
    return "absent" if token is None else repr(token)
