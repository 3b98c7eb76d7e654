"""Models and tokenizers: loading, the check of a shared vocabulary, chat prompts.

Importing this package pulls in neither torch nor transformers; the functions load them on use.
"""

from mentor_serve.models.loading import (
    end_token_ids,
    load_config,
    load_logits_width,
    load_model,
    load_tokenizer,
    resolve_model,
)
from mentor_serve.models.prompts import opens_thinking, render_messages
from mentor_serve.models.vocabulary import check_models_share_vocabulary, check_same_vocabulary

__all__ = [
    "check_models_share_vocabulary",
    "check_same_vocabulary",
    "end_token_ids",
    "load_config",
    "load_logits_width",
    "load_model",
    "load_tokenizer",
    "opens_thinking",
    "render_messages",
    "resolve_model",
]
