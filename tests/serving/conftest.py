from __future__ import annotations

import pytest
from serving_fakes import FakeBackend, byte_tokenizer
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def backend(tokenizer: PreTrainedTokenizerFast) -> FakeBackend:
    return FakeBackend(tokenizer=tokenizer)
