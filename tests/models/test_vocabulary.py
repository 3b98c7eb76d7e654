import pytest

from mentor_serve.errors import VocabularyMismatch
from mentor_serve.models import check_same_vocabulary


class FakeTokenizer:
    def __init__(self, *tokens: str) -> None:
        self._vocabulary = {token: index for index, token in enumerate(tokens)}

    def get_vocab(self) -> dict[str, int]:
        return self._vocabulary


def check(policy: FakeTokenizer, expert: FakeTokenizer, *widths: int) -> None:
    check_same_vocabulary(policy, expert, *widths)  # type: ignore[arg-type]


def test_equal_vocabularies_pass_even_where_the_logits_are_padded() -> None:
    check(FakeTokenizer("a", "b", "c"), FakeTokenizer("a", "b", "c"), 8, 8)


def test_the_first_token_that_differs_is_named() -> None:
    with pytest.raises(VocabularyMismatch, match="token id 1 is 'b' for the policy") as caught:
        check(FakeTokenizer("a", "b", "c"), FakeTokenizer("a", "c", "b"), 3, 3)
    assert "'c' for the expert" in str(caught.value)


def test_a_token_that_one_side_lacks_is_named() -> None:
    with pytest.raises(VocabularyMismatch, match=r"token id 2 is 'c' .* absent for the expert"):
        check(FakeTokenizer("a", "b", "c"), FakeTokenizer("a", "b"), 3, 3)


def test_logits_of_different_width_are_refused() -> None:
    with pytest.raises(VocabularyMismatch, match="vocab_size is 8 for the policy and 16"):
        check(FakeTokenizer("a"), FakeTokenizer("a"), 8, 16)
