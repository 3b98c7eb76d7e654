"""The policy's tokenizer, loaded once for the whole dashboard, to show the text of each token."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from mentor_dashboard.tokens import Decode
from mentor_serve.errors import ConfigError
from mentor_serve.models.loading import load_tokenizer


@st.cache_resource(max_entries=2, show_spinner="Loading the tokenizer ...")
def decoder(model: str) -> tuple[Decode | None, str]:
    """How to decode ids of `model`, or None and the reason why they cannot be decoded.

    The model's files may be on another machine than the dashboard; then ids are shown instead.
    """
    try:
        tokenizer = load_tokenizer(model)
    except ConfigError as error:
        return None, str(error)

    def decode(token_ids: Sequence[int]) -> str:
        return str(
            tokenizer.decode(
                [int(token_id) for token_id in token_ids],
                skip_special_tokens=False,
                clean_up_tokenization_spaces=False,
            )
        )

    return decode, ""
