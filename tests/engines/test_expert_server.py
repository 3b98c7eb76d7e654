"""ExpertServer: answers against a plain forward pass, what is read, what is forgotten."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from advice_samples import ask, ask_all
from scipy.stats import chisquare

from mentor_serve.engines.advice import ExpertAnswers, check_answers
from mentor_serve.engines.expert import ExpertModel, ExpertServer
from mentor_serve.errors import InvalidRequest

LONG = [2 + i % 29 for i in range(40)]


def plain(model, token_ids, temperature=1.0):
    """log pi*(. | token_ids) by a plain forward pass."""
    with torch.no_grad():
        return (model(torch.tensor([token_ids])).logits[0, -1] / temperature).log_softmax(-1)


def assert_answers(model, sequences, queries, answers):
    """Every position's values equal those of a plain pass over the whole sequence before it."""
    check_answers(queries, answers, vocab_size=32)
    sample = 0
    for at, row in enumerate(queries.row_of_position.tolist()):
        tokens, position = sequences[row], int(queries.positions[at])
        expected = plain(model, tokens[:position], float(queries.temperatures[row])).numpy()
        assert answers.proposed_logprobs[at] == pytest.approx(expected[tokens[position]], abs=1e-4)
        part = slice(sample, sample + int(queries.num_samples[row]))
        sample = part.stop
        np.testing.assert_allclose(
            answers.sample_logprobs[part], expected[answers.sample_token_ids[part]], atol=1e-4
        )
    assert sample == len(answers.sample_token_ids)


def tokens_read(server, queries):
    before = server.slots.num_tokens_read
    answers = server.advise(queries)
    return server.slots.num_tokens_read - before, answers


def test_a_growing_sequence_is_read_once(tiny_llama):
    model = tiny_llama(2)
    server = ExpertServer(model)
    start, total = 0, 0
    for positions in ([5], [6, 9, 12], [13, 39]):
        queries = ask(1, LONG, positions, start=start, temperature=0.7)
        assert len(queries.token_ids) == positions[-1] + 1 - start
        count, answers = tokens_read(server, queries)
        assert_answers(model, [LONG], queries, answers)
        assert count == positions[-1] - start
        start, total = positions[-1], total + count
    assert total == 39


def test_a_rejected_draft_is_rolled_back(tiny_llama):
    model = tiny_llama(2)
    server = ExpertServer(model)
    server.advise(ask(1, LONG, [10, 20, 30]))
    changed = [*LONG[:20], 3, 3, 3, 3, 3]
    queries = ask(1, changed, [21, 24], start=20)
    count, answers = tokens_read(server, queries)
    assert_answers(model, [changed], queries, answers)
    assert count == 4


def test_more_samples_of_a_position_cost_one_token(tiny_llama):
    model = tiny_llama(2)
    server = ExpertServer(model)
    both = server.advise(ask(1, LONG, [30], num_samples=24))
    first = server.advise(ask(2, LONG, [30], num_samples=8))
    queries = ask(2, LONG, [30], start=29, first_sample=8, num_samples=16)
    count, rest = tokens_read(server, queries)
    assert count == 1
    joined = np.concatenate([first.sample_token_ids, rest.sample_token_ids])
    np.testing.assert_array_equal(joined, both.sample_token_ids)


def test_answers_depend_neither_on_the_call_nor_on_the_chunk(tiny_llama):
    """One row in two calls equals one call in a crowd of more sequences than slots."""
    model = tiny_llama(2)
    crowd = [[2 + i, *LONG] for i in range(7)]
    queries = ask_all(crowd, [12, 20, 33], num_samples=5)
    together = ExpertServer(model, max_sequences=3).advise(queries)
    assert_answers(model, crowd, queries, together)
    alone = ExpertServer(model)
    parts = [
        alone.advise(ask(4, crowd[4], [12, 20], num_samples=5)),
        alone.advise(ask(4, crowd[4], [33], start=20, num_samples=5)),
    ]
    samples = np.concatenate([part.sample_token_ids for part in parts])
    np.testing.assert_array_equal(samples, together.sample_token_ids[4 * 15 : 5 * 15])


def test_rows_may_want_different_numbers_of_samples(tiny_llama):
    model = tiny_llama(2)
    queries = replace(
        ask_all([LONG, LONG[3:], LONG[7:]], [4, 9]), num_samples=np.array([0, 70, 3], np.int32)
    )
    answers = ExpertServer(model).advise(queries)
    assert len(answers.sample_token_ids) == 2 * 73
    assert_answers(model, [LONG, LONG[3:], LONG[7:]], queries, answers)


def test_sequences_of_one_prompt_read_it_once(tiny_llama):
    model = tiny_llama(2)
    server = ExpertServer(model)
    group = [[*LONG, 4 + i, 9, 8] for i in range(4)]
    queries = ask_all(group, [42])
    count, answers = tokens_read(server, queries)
    assert_answers(model, group, queries, answers)
    # The first reads all 42, the others what follows the prompt.
    assert count == 42 + 3 * 2
    queries = ask(9, [*LONG, 8, 7], [41])
    count, answers = tokens_read(server, queries)
    assert_answers(model, [[*LONG, 8, 7]], queries, answers)
    assert count == 1


def test_a_prefix_is_copied_only_from_what_is_read(tiny_llama):
    """The second and third share more with each other than with the first, which reads for both."""
    model = tiny_llama(2)
    group = [[*LONG, 4, 4, 4], [*LONG, 9, 8, 7], [*LONG, 9, 8, 6]]
    queries = ask_all(group, [42])
    count, answers = tokens_read(ExpertServer(model), queries)
    assert_answers(model, group, queries, answers)
    assert count == 42 + 2 * 2


def test_a_prefix_that_is_read_already_is_not_waited_for(tiny_llama):
    model = tiny_llama(2)
    server = ExpertServer(model)
    server.advise(ask(0, [*LONG, 5], [40]))
    group = [[*LONG, 4 + i, 9] for i in range(4)]
    passes = server.slots.num_passes
    count, answers = tokens_read(server, ask_all(group, [41], sequence_ids=range(1, 5)))
    assert count == 4
    assert server.slots.num_passes == passes + 1
    assert_answers(model, group, ask_all(group, [41]), answers)


def test_a_copied_prefix_ends_before_the_first_position(tiny_llama):
    model = tiny_llama(2)
    server = ExpertServer(model)
    server.advise(ask(1, LONG, [39]))
    queries = ask(2, LONG, [20, 30])
    count, answers = tokens_read(server, queries)
    assert_answers(model, [LONG], queries, answers)
    # Of the 39 tokens in common, 19 may be copied: the 20th gives the logits asked for.
    assert count == 30 - 19


def test_a_kept_sequence_may_be_sent_whole_again(tiny_llama):
    model = tiny_llama(2)
    server = ExpertServer(model)
    server.advise(ask(1, LONG, [35]))
    queries = ask(1, LONG, [39])
    count, answers = tokens_read(server, queries)
    assert_answers(model, [LONG], queries, answers)
    assert count == 4


def test_the_first_token_of_all_can_be_asked_about(tiny_llama):
    model = tiny_llama(2)
    queries = ask(1, LONG, [1, 2])
    assert_answers(model, [LONG], queries, ExpertServer(model).advise(queries))


def test_what_was_evicted_is_missing_until_it_is_sent_whole(tiny_llama):
    model = tiny_llama(2)
    server = ExpertServer(model, max_sequences=3)
    crowd = [[2 + i, *LONG] for i in range(5)]
    server.advise(ask_all(crowd, [12]))
    queries = ask_all(crowd, [15], starts=[12] * 5)
    count, answers = tokens_read(server, queries)
    check_answers(queries, answers, vocab_size=32)
    assert answers.missing.tolist() == [True, True, False, False, False]
    assert np.isnan(answers.proposed_logprobs).tolist() == answers.missing.tolist()
    assert np.isnan(answers.sample_logprobs[:16]).all()
    assert not answers.sample_token_ids[:16].any()
    assert count == 3 * 3
    again = ask_all(crowd[:2], [15])
    assert_answers(model, crowd, again, server.advise(again))


def test_kept_sequences_are_answered_before_new_ones_evict_them(tiny_llama):
    model = tiny_llama(2)
    server = ExpertServer(model, max_sequences=3)
    crowd = [[2 + i, *LONG] for i in range(6)]
    server.advise(ask_all(crowd[:3], [12]))
    mixed = ask_all(crowd[::-1], [20], starts=[0, 0, 0, 12, 12, 12], sequence_ids=range(5, -1, -1))
    answers = server.advise(mixed)
    assert not answers.missing.any()
    assert_answers(model, crowd[::-1], mixed, answers)


def test_the_least_recently_asked_about_goes_first(tiny_llama):
    server = ExpertServer(tiny_llama(2), max_sequences=2)
    first, second, third = ([2 + i, *LONG] for i in range(3))
    server.advise(ask(1, first, [9]))
    server.advise(ask(2, second, [9]))
    server.advise(ask(1, first, [12], start=9))
    server.advise(ask(3, third, [9]))
    assert not server.advise(ask(1, first, [13], start=12)).missing.any()
    assert server.advise(ask(2, second, [12], start=9)).missing.all()


def test_released_sequences_are_forgotten(tiny_llama):
    server = ExpertServer(tiny_llama(2), max_sequences=2)
    server.advise(ask(1, LONG, [30]))
    server.release([np.int64(1), 77])
    assert server.advise(ask(1, LONG, [31], start=30)).missing.all()
    count, _ = tokens_read(server, ask(1, LONG, [30]))
    assert count == 30


def test_a_message_that_arrives_late_is_not_obeyed(tiny_llama):
    """A question that timed out may still run after a newer one, with drafts since rejected."""
    model = tiny_llama(2)
    server = ExpertServer(model)
    outdated = ask(1, LONG, [10, 20], call=1)
    current = [*LONG[:10], 3, *LONG[11:]]
    server.advise(ask(1, current, [15], call=2))
    count, late = tokens_read(server, outdated)
    assert late.missing.all()
    assert count == 0
    queries = ask(1, current, [18], start=15, call=3)
    assert_answers(model, [current], queries, server.advise(queries))


def test_samples_follow_the_expert(tiny_llama):
    """Chi-square of 20,000 samples at a fixed seed; a right sampler fails one seed in 1000."""
    model = tiny_llama(2)
    server = ExpertServer(model)
    queries = ask(1, LONG, [6], num_samples=20_000, temperature=2.0, seed=5)
    answers = server.advise(queries)
    counts = np.bincount(answers.sample_token_ids, minlength=32)
    expected = plain(model, LONG[:6], 2.0).exp().double().numpy() * 20_000
    frequent = expected >= 5
    observed = np.append(counts[frequent], counts[~frequent].sum())
    pooled = np.append(expected[frequent], expected[~frequent].sum())
    kept = pooled > 0
    assert observed[~kept].sum() == 0
    assert chisquare(observed[kept], pooled[kept] * 20_000 / pooled.sum()).pvalue > 1e-3
    same, other = (
        server.advise(ask(7, LONG, [6], num_samples=8, temperature=2.0, seed=seed))
        for seed in (5, 6)
    )
    np.testing.assert_array_equal(same.sample_token_ids, answers.sample_token_ids[:8])
    assert same.sample_token_ids.tolist() != other.sample_token_ids.tolist()


def test_positions_of_one_seed_have_draws_of_their_own(tiny_llama):
    """Were the uniforms shared, equal distributions would give equal samples."""
    model = tiny_llama(2)
    with torch.no_grad():
        # Logits that do not depend on the prefix.
        model.lm_head.weight.zero_()
    answers = ExpertServer(model).advise(ask(1, LONG, [6, 7], num_samples=16))
    assert answers.sample_token_ids[:16].tolist() != answers.sample_token_ids[16:].tolist()


def test_the_payload_is_what_is_pickled(tiny_llama):
    sequences = [[2 + i % 29, *LONG] for i in range(32)]
    server = ExpertServer(tiny_llama(2), max_sequences=32)
    whole = ask_all(sequences, [40])
    answers = server.advise(whole)
    for message in (whole, answers):
        assert 0 < len(pickle.dumps(message)) - message.num_bytes < 1200
    # One new token a sequence costs the same however long the sequence is.
    more = ask_all(sequences, [40], starts=[39] * 32)
    assert more.num_bytes == 32 * (8 + 4 + 4 + 2 * 4 + 4 + 4 + 4 + 8 + 4 + 4)
    assert answers.num_bytes == 32 * (4 + 8 * 4 + 8 * 4 + 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"token_ids": np.full(7, 32, np.int32)}, "0 to 31"),
        ({"token_ids": np.full(7, -1, np.int32)}, "0 to 31"),
        ({"token_ids": np.zeros(6, np.int32)}, r"token_ids: expected shape \(7,\)"),
        ({"positions": np.array([0, 6], np.int32)}, "beyond the start, got 0 with start 0"),
        ({"positions": np.array([6, 6], np.int32)}, "increasing"),
        ({"positions": np.array([3, 5], np.int32)}, "number 5, got token number 6"),
        ({"positions": np.array([6], np.int32)}, r"positions: expected shape \(2,\)"),
        ({"num_positions": np.array([0], np.int32), "positions": np.zeros(0, np.int32)}, "least 1"),
        ({"starts": np.array([-1], np.int32)}, "starts: expected at least 0, got -1"),
        ({"starts": np.array([300], np.int32)}, "at most 256 tokens before a position, got 306"),
        ({"temperatures": np.zeros(1, np.float32)}, "temperatures above 0"),
        ({"temperatures": np.full(1, np.nan, np.float32)}, "temperatures above 0"),
        ({"num_samples": np.array([-1], np.int32)}, "num_samples"),
        ({"seeds": np.zeros(2, np.int64)}, "seeds: expected shape"),
    ],
)
def test_impossible_queries_are_refused(tiny_llama, wrong, message):
    with pytest.raises(InvalidRequest, match=message):
        ExpertServer(tiny_llama(2)).advise(replace(ask(1, LONG, [3, 6]), **wrong))


def test_a_sequence_occurs_once_in_a_message(tiny_llama):
    with pytest.raises(InvalidRequest, match="distinct"):
        ExpertServer(tiny_llama(2)).advise(ask_all([LONG, LONG], [3], sequence_ids=[1, 1]))


def test_no_queries_get_no_answers(tiny_llama):
    answers = ExpertServer(tiny_llama(2)).advise(ask_all([], [3]))
    assert isinstance(answers, ExpertAnswers)
    assert answers.num_bytes == 0


class Colocated:
    """An `ExpertModel` over random responses to one prompt, and what its logits should be."""

    def __init__(self, model):
        self.model = model
        self.expert = ExpertModel(model, max_slots=4, max_tokens=64)
        self.prompt = tuple(LONG[:12])
        self.responses = [np.array(LONG[i : i + 20], np.int32) for i in range(3)]

    def tokens_read(self, slots, rows, positions):
        """Check the logits of some rows at some positions each; returns how much was read."""
        before = self.expert.slots.num_tokens_read
        responses = [self.responses[row] for row in rows]
        with torch.inference_mode():
            logits = self.expert.logits_at(slots, [self.prompt] * len(rows), responses, positions)
        wanted = [(row, p) for row, at in zip(rows, positions, strict=True) for p in at]
        assert logits.shape == (len(wanted), 32)
        for got, (row, p) in zip(logits, wanted, strict=True):
            expected = plain(self.model, [*self.prompt, *self.responses[row][:p].tolist()])
            torch.testing.assert_close(got.log_softmax(-1), expected, atol=1e-4, rtol=0)
        return self.expert.slots.num_tokens_read - before


def test_colocated_rows_read_their_prompt_once(tiny_llama):
    case = Colocated(tiny_llama(2))
    # All but the prompt's last token once, then what each row lacks.
    assert case.tokens_read([0, 1, 2], [0, 1, 2], [[0, 4], [3], [0]]) == 11 + (1 + 4) + (1 + 3) + 1
    assert case.tokens_read([2, 0], [2, 0], [[1, 2, 9], [5]]) == 9 + 1
    # A later row of the same prompt copies it.
    assert case.tokens_read([3], [1], [[0]]) == 1


def test_colocated_rows_follow_rollbacks_and_moves(tiny_llama):
    case = Colocated(tiny_llama(2))
    assert case.tokens_read([0, 2], [0, 2], [[3], [4, 9]]) == 11 + (1 + 3) + (1 + 9)
    case.responses[2][5:] = 7
    case.expert.rollback(2, 12 + 5)
    assert case.tokens_read([2], [2], [[7]]) == 2
    with torch.inference_mode():
        case.expert.free([0])
        case.expert.move([2], [0])
    assert case.tokens_read([0], [2], [[8]]) == 1
    # A position that was read before is reached by reading from there again.
    assert case.tokens_read([0], [2], [[6, 8]]) == 3
    # The freed row's prompt is still known by the one that moved.
    assert case.tokens_read([1], [1], [[0]]) == 1
