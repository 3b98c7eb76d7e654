from mentor_serve.evaluation import FIGURE_3_WORDS, word_shares


def test_a_response_counts_once_however_often_it_uses_a_word() -> None:
    shares = word_shares(["wait, wait, wait", "so it is"], ["wait", "check"])
    assert shares == {"wait": 0.5, "check": 0.0}


def test_case_does_not_matter_and_parts_of_words_do_not_count() -> None:
    texts = ["But.", "butter", "(but)", "a_but", "CHECK:", "checked"]
    assert word_shares(texts, ["but", "check"]) == {"but": 2 / 6, "check": 1 / 6}


def test_the_default_words_are_those_of_figure_3() -> None:
    assert len(FIGURE_3_WORDS) == 14
    assert word_shares(["let me verify"]) == {
        word: float(word == "verify") for word in FIGURE_3_WORDS
    }


def test_without_responses_every_share_is_zero() -> None:
    assert word_shares([], ["wait"]) == {"wait": 0.0}
